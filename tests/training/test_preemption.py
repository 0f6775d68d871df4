"""Training that is asked to stop by a signal, and continues later."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch.utils.data import DataLoader

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.cli.work import train
from keepbest.errors import PreemptedError
from keepbest.ranks import Ranks
from keepbest.training.preemption import Preemption
from tests.kit import cli_runs as runs
from tests.kit.pool import start_ranks

EPOCHS = 6  # of two updates


class SignallerConfig(CallBackBaseConfig):
    name: Literal["Signaller"] = "Signaller"
    number: int
    update: int
    rank: int


class Signaller(CallbackBase):
    """Sends a signal to its own process, as SLURM would, after one update on one rank."""

    config_class: ClassVar[type[SignallerConfig]] = SignallerConfig

    def after_update(self, *, update_counter: Any, **_kwargs: Any) -> None:
        config = self.callback_config
        if update_counter.update == config.update and self.ranks.rank == config.rank:
            os.kill(os.getpid(), config.number)


def describe(directory: Path, strategy: str, *, checkpoints: bool = True, **best: Any) -> dict[str, Any]:
    callbacks = [runs.evaluation(), runs.best(tolerances=[0, 1, 3], **best)]
    callbacks += [{"name": "CheckpointCallback", "every_n_epochs": 3}] if checkpoints else []
    return runs.describe_run(directory, epochs=EPOCHS, strategy=strategy, callbacks=callbacks)


def with_signal(content: dict[str, Any], number: int, update: int, rank: int) -> dict[str, Any]:
    signaller = {
        "name": f"{__name__}.Signaller",
        "number": int(number),
        "update": update,
        "rank": rank,
        "every_n_updates": 1,
    }
    signaller["kind"] = signaller.pop("name")
    trainer = {**content["trainer"], "callbacks": [*content["trainer"]["callbacks"], signaller]}
    return {**content, "trainer": trainer}


@pytest.mark.parametrize(
    ("world_size", "strategy", "number", "rank", "async_save"),
    [
        (1, "single", signal.SIGTERM, 0, False),
        (2, "ddp", signal.SIGUSR1, 1, True),
        (2, "fsdp2", signal.SIGTERM, 0, True),
        (3, "fsdp1", signal.SIGINT, 2, False),
    ],
)
def test_all_ranks_stop_together_and_resume_bit_for_bit(world_size, strategy, number, rank, async_save, tmp_path):
    content = describe(tmp_path / "whole", strategy, async_save=async_save)
    path = runs.write_config(tmp_path / "config.yaml", content)
    runs.succeeded(runs.train_on_ranks(world_size, path))

    content = describe(tmp_path / "parts", strategy, async_save=async_save)
    signalled = runs.write_config(tmp_path / "signalled.yaml", with_signal(content, number, 7, rank))
    with start_ranks(train, world_size, signalled, ["trainer.resume=auto"]) as ranks:
        stopped = ranks.collect(timeout=100)
    # Sent during update 7, it travels while update 8 runs.
    assert [type(outcome.exception) for outcome in stopped] == [PreemptedError] * world_size
    assert {str(outcome.exception) for outcome in stopped} == {str(stopped[0].exception)}
    assert "did at E4_U8_S192" in str(stopped[0].exception)
    assert (tmp_path / "parts/checkpoints/resume.latest").resolve() == (
        tmp_path / "parts/checkpoints/resume.E4_U8_S192"
    ).resolve()
    assert not any(checkpoint.exceeded is False for checkpoint in runs.checkpoints(tmp_path / "parts").values())

    runs.succeeded(runs.train_on_ranks(world_size, runs.write_config(path, content), "trainer.resume=auto"))
    runs.assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("update", [2 * EPOCHS - 1, 2 * EPOCHS])
def test_signal_during_the_last_updates_lets_training_end(update, tmp_path):
    content = with_signal(describe(tmp_path / "run", "ddp"), signal.SIGTERM, update, 1)
    runs.succeeded(runs.train_on_ranks(2, runs.write_config(tmp_path / "config.yaml", content)))
    assert {checkpoint.exceeded for checkpoint in runs.checkpoints(tmp_path / "run").values()} >= {None}


def test_checkpoint_of_the_same_iteration_is_not_saved_twice(tmp_path):
    # The resume checkpoint of the third epoch is due at the very update at which the signal is heard.
    content = with_signal(describe(tmp_path / "run", "single"), signal.SIGTERM, 5, 0)
    with start_ranks(train, 1, runs.write_config(tmp_path / "config.yaml", content), []) as ranks:
        [outcome] = ranks.collect(timeout=100)
    assert "did at E3_U6_S144" in str(outcome.exception)
    lines = (tmp_path / "run/checkpoints/ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines if '"checkpoint"' in line] == ["E3_U6_S144"]


def test_run_without_checkpoints_says_it_will_start_over(tmp_path):
    content = with_signal(describe(tmp_path / "run", "single", checkpoints=False), signal.SIGTERM, 5, 0)
    path = runs.write_config(tmp_path / "config.yaml", content)
    ended = runs.real_keepbest("train", path)
    assert ended.returncode == os.EX_TEMPFAIL == 75
    assert "there is no CheckpointCallback: when this run is started again" in ended.stderr
    assert "training was asked to stop by a signal, and did at E3_U6_S144" in ended.stderr
    content = describe(tmp_path / "run", "single", checkpoints=False)
    runs.succeeded(runs.train_on_ranks(1, runs.write_config(path, content), "trainer.resume=auto"))
    [best] = [each for ref, each in runs.checkpoints(tmp_path / "run").items() if ref == runs.BEST]
    runs.succeeded(runs.train_on_ranks(1, path, f"directory={tmp_path / 'whole'}"))
    assert best.value == runs.checkpoints(tmp_path / "whole")[runs.BEST].value


@pytest.fixture
def heeds_the_keyboard():
    """As in a terminal; a job that a shell runs in the background ignores the keyboard."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("heeds_the_keyboard")
def test_second_interrupt_is_obeyed_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    preemption = Preemption(Ranks.connect())

    def interrupt_twice() -> None:
        with preemption:
            assert not preemption.is_agreed()
            os.kill(os.getpid(), signal.SIGINT)
            assert [preemption.is_agreed() for _ in range(2)] == [False, True]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def say_and_wait(begun):
    begun.send("a child that Python has just forked drops its signals")
    while True:
        signal.pause()


def test_sigterm_to_a_forked_child_ends_it():
    here, there = multiprocessing.Pipe(duplex=False)
    with Preemption(Ranks.connect()) as preemption:
        child = multiprocessing.get_context("fork").Process(target=say_and_wait, args=(there,), daemon=True)
        child.start()
        try:
            here.recv()
            os.kill(child.pid, signal.SIGTERM)
            child.join(10)  # as Python does when it exits, which waits for as long as it takes
            assert child.exitcode == -signal.SIGTERM
        finally:
            child.kill()
        assert [preemption.is_agreed() for _ in range(2)] == [False, False]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signal_to_all_leaves_those_who_load_data(number):
    samples = torch.arange(20.0)
    with Preemption(Ranks.connect()):
        batches = iter(DataLoader(samples, num_workers=2, multiprocessing_context="fork"))
        seen = [next(batches)]
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, number)
        seen += batches
    assert len(children) == 2
    assert torch.equal(torch.cat(seen), samples)


def test_outside_of_the_main_thread_no_signal_is_caught():
    handlers = []

    def look() -> None:
        with Preemption(Ranks.connect()) as preemption:
            handlers.append(signal.getsignal(signal.SIGTERM))
            handlers.append(preemption.is_agreed())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM), False]
