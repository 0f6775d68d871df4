"""Resume checkpoints as snapshots: which one is resumed after a kill, a restart elsewhere, or an end."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.resume import find_to_resume
from keepbest.capture.share import Items
from keepbest.errors import ConfigError, StorageError
from keepbest.iteration import TrainingIteration
from keepbest.modules.parts import Part
from keepbest.ranks import Ranks
from keepbest.remote.verify import verify_run
from keepbest.run.checkpoints import checkpoint_refs
from keepbest.run.layout import LEDGER
from keepbest.run.names import LATEST
from keepbest.run.reader import find_ref, read_history
from keepbest.run.verify import verify
from keepbest.saving.resume_saver import ResumeSaver
from tests.kit import toys
from tests.kit.files import Fault, Operation, SteppedFiles, before
from tests.kit.runs import snapshots
from tests.kit.seams import use

CHECKPOINTS = {"name": "CheckpointCallback", "every_n_updates": 1, "keep_last": None}
BESTS = [
    {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1},
    {
        "name": "BestCheckpointCallback",
        "metric_key": "loss/val/total",
        "higher_is_better": True,  # so that the first one is the best
        "every_n_updates": 1,
        "save_training_state": True,
    },
]


class FailsConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_resume.Fails"
    at: int
    on: tuple[int, ...] = (0, 1)


class FailsError(Exception):
    pass


class Fails(toys.Recorder):
    """Raises at an update, on some ranks. The others do something else together."""

    config_class = FailsConfig

    def periodic_callback(self, *, update_counter: Any, **_kwargs: Any) -> None:
        if update_counter.update == self.callback_config.at:
            if self.ranks.rank in self.callback_config.on:
                raise FailsError
            self.ranks.agree("do something else", lambda: None)


class StopsConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_resume.Stops"


class Stops(toys.Recorder):
    config_class = StopsConfig

    def periodic_callback(self, **_kwargs: Any) -> None:
        self.trainer.stop("enough")


def train(directory: Path, *callbacks: Any, **settings: Any) -> list[int]:
    """The updates that were made."""
    trainer = toys.make_trainer(directory, callbacks=list(callbacks), **settings)
    begun: list[int] = []
    trainer.train(on_start=lambda: begun.append(trainer.update_counter.update))
    return list(range(begun[0] + 1, trainer.update_counter.update + 1))


def fail(directory: Path, *callbacks: Any, at: int, **settings: Any) -> None:
    with pytest.raises(FailsError):
        train(directory, FailsConfig(every_n_updates=1, at=at), *callbacks, **settings)


def refs_in(directory: Path) -> list[str]:
    return list(checkpoint_refs(read_history(directory)))


def saver_of(directory: Path, *, stamp: float = 0.0, keep_last: int | None = 1) -> tuple[ResumeSaver, nn.Linear]:
    model = nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, stamp)
    items = Items(model, (Part("model", ""),), save_frozen_weights=True, training_state={"trainer": Place()})
    return ResumeSaver(directory, items, Ranks.connect(), keep_last=keep_last), model


class Place:
    def state_dict(self) -> dict[str, Any]:
        return {"update": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict


def at(update: int) -> TrainingIteration:
    return TrainingIteration(update=update)


def save(directory: Path, *updates: int) -> None:
    saver, model = saver_of(directory)
    saver.start(at(0), None)
    for update in updates:
        torch.nn.init.constant_(model.weight, float(update))
        saver.save(at(update))
    saver.leave()


def test_kill_at_any_operation_leaves_a_complete_checkpoint(tmp_path, request):
    directory, copies = tmp_path / "run", tmp_path / "copies"
    done: list[str] = []
    is_watched = False

    def copy(operation: Operation) -> None:
        if not is_watched:
            return
        shutil.copytree(directory, copies / str(len(done)), symlinks=True)
        done.append(operation.name)

    with use(directory, files=SteppedFiles(before(copy))):
        saver, model = saver_of(directory, stamp=1.0)
        saver.start(at(0), None)
        saver.save(at(1))
        is_watched = True
        torch.nn.init.constant_(model.weight, 2.0)
        saver.save(at(2))
        is_watched = False
        saver.leave()
    assert {"rename", "sync", "write"} <= set(done)
    seen = set()
    for number in range(0, len(done), 4 if request.config.getoption("--quick") else 1):
        killed = copies / str(number)
        assert [fault for fault in verify(killed) if fault.kind == "damage"] == []
        found = find_to_resume(killed, "auto", Ranks.connect())
        assert found is not None
        loaded = load(killed, found.ref, fresh := nn.Linear(1, 1, bias=False))
        assert fresh.weight.item() == loaded.iteration.update
        seen.add((found.ref, loaded.iteration.update))
        save(killed, 3)  # as a process that comes next
        assert verify(killed) == []
    assert seen == {(LATEST, 1), (LATEST, 2)}


@pytest.mark.parametrize("operation", ["create", "rename", "sync"])
def test_refused_checkpoint_leaves_the_one_before(operation, tmp_path):
    save(tmp_path, 1)
    fault = Fault(operation)
    with use(tmp_path, files=SteppedFiles(before(fault))):
        saver, _ = saver_of(tmp_path)
        saver.start(at(1), find_ref(tmp_path, read_history(tmp_path), LATEST).folder)
        fault.first, fault.last = fault.calls[operation] + 1, 10**9
        with pytest.raises(StorageError, match="write the resume checkpoint U2"):
            saver.save(at(2))
        assert snapshots(tmp_path) == {"U1"}
        fault.last = 0
        saver.save(at(3))
        saver.leave()
    assert verify(tmp_path) == []
    assert refs_in(tmp_path) == ["resume.U3"]


def test_checkpoint_without_a_line_frees_its_space(tmp_path):
    def refuse(operation: Operation) -> None:
        if operation.name == "sync" and operation.path.name == LEDGER and is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    is_full = False
    with use(tmp_path, files=SteppedFiles(before(refuse))):
        saver, _ = saver_of(tmp_path)
        saver.start(at(0), None)
        saver.save(at(1))
        is_full = True
        with pytest.raises(StorageError, match="write the resume checkpoint U2"):
            saver.save(at(2))
        assert snapshots(tmp_path) == {"U1"}
        is_full = False
        saver.leave()


def test_bests_stay_while_a_checkpoint_names_them(tmp_path):
    saver, model = saver_of(tmp_path)
    with BestKeeper(model, directory=tmp_path, metric_key="loss") as keeper:
        saver.start(at(0), None)
        keeper.observe(3.0, at(1))
        saver.save(at(1))
        keeper.observe(2.0, at(2))
        bests = {name for name in snapshots(tmp_path) if name not in read_history(tmp_path).checkpoints}
        assert bests == {"U1", "U2"}
        saver.save(at(2))
        bests = {name for name in snapshots(tmp_path) if name not in read_history(tmp_path).checkpoints}
        assert bests == {"U2"}
        saver.leave()


def test_restart_from_an_earlier_one_is_what_auto_continues(tmp_path):
    train(tmp_path, CHECKPOINTS, updates=4)
    fail(tmp_path, CHECKPOINTS, at=3, updates=4, resume=tmp_path / "checkpoints/resume.E1_U2_S48")
    assert "resume.E2_U4_S96" in refs_in(tmp_path)  # nothing was saved since, so it can still be returned to
    assert train(tmp_path, CHECKPOINTS, updates=3, resume="auto") == [3]
    assert refs_in(tmp_path) == ["resume.E0_U1_S24", "resume.E1_U2_S48", "resume.E1_U3_S72"]


def test_abandoned_one_is_resumed_where_it_is_named(tmp_path):
    train(tmp_path, CHECKPOINTS, updates=4)
    path = tmp_path / "checkpoints/resume.E2_U4_S96"
    fail(tmp_path, CHECKPOINTS, at=3, updates=4, resume=tmp_path / "checkpoints/resume.E1_U2_S48")
    assert train(tmp_path, CHECKPOINTS, updates=5, resume=path.resolve()) == [5]


def test_checkpoint_of_another_run_begins_a_copy_of_it(tmp_path):
    callbacks = [*BESTS, CHECKPOINTS]
    train(tmp_path / "old", *callbacks, updates=2)
    path = tmp_path / "old/checkpoints/resume.latest"
    fail(tmp_path / "new", *callbacks, at=3, updates=4, resume=path)
    assert refs_in(tmp_path / "new") == []
    assert train(tmp_path / "new", *callbacks, updates=3, resume=path) == [3]
    assert read_history(tmp_path / "new").run_id == read_history(tmp_path / "old").run_id
    assert verify(tmp_path / "new") == []


def test_auto_after_a_return_to_the_best_continues_from_it(tmp_path):
    callbacks = [*BESTS, CHECKPOINTS]
    train(tmp_path, *callbacks, updates=4)
    best = find_ref(tmp_path, read_history(tmp_path), "best_model.loss.val.total").manifest.iteration.update
    assert best == 1
    fail(tmp_path, *callbacks, at=2, updates=4, resume="best")
    assert train(tmp_path, *callbacks, updates=4, resume="auto") == [2, 3, 4]
    assert verify(tmp_path) == []


def test_run_that_starts_anew_is_not_continued_from_the_old(tmp_path):
    train(tmp_path, CHECKPOINTS, updates=2)
    fail(tmp_path, CHECKPOINTS, at=1, updates=4)
    assert train(tmp_path, CHECKPOINTS, updates=1, resume="auto") == [1]


@pytest.mark.parametrize("hurt", [shutil.rmtree, lambda folder: (folder / "trainer.pt").unlink()])
def test_auto_takes_an_earlier_one_where_the_latest_is_gone(hurt, tmp_path):
    train(tmp_path, CHECKPOINTS, updates=3)
    hurt(find_ref(tmp_path, read_history(tmp_path), LATEST).folder)
    assert train(tmp_path, CHECKPOINTS, updates=4, resume="auto") == [3, 4]


def test_checkpoint_that_is_gone_is_forgotten_by_any_start(tmp_path):
    saver, model = saver_of(tmp_path, keep_last=None)
    saver.start(at(0), None)
    for update in (1, 2):
        saver.save(at(update))
    saver.leave()
    shutil.rmtree(find_ref(tmp_path, read_history(tmp_path), LATEST).folder)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", resume="ledger"):
        assert refs_in(tmp_path) == ["resume.U1"]
    assert verify(tmp_path) == []
    found = find_to_resume(tmp_path, "auto", Ranks.connect())
    assert found is not None
    assert found.ref == "resume.U1"


def test_remote_copy_has_the_bests_alone(tmp_path):
    remote = (tmp_path / "copy").as_uri()
    saver, model = saver_of(tmp_path / "run")
    with BestKeeper(model, directory=tmp_path / "run", metric_key="loss", remote=remote) as keeper:
        saver.start(at(0), None)
        keeper.observe(3.0, at(1))
        saver.save(at(1))
        saver.leave()
    assert len(snapshots(tmp_path / "run")) == 2
    assert snapshots(tmp_path / "copy") == {"U1"}
    assert verify_run(remote) == []
    with BestKeeper(model, directory=tmp_path / "new", metric_key="loss", remote=remote, resume="ledger"):
        assert verify(tmp_path / "new") == []


def test_run_that_ends_between_two_checkpoints_saves_one(tmp_path):
    rare = {**CHECKPOINTS, "every_n_updates": 2}
    train(tmp_path, rare, updates=3)
    assert refs_in(tmp_path) == ["resume.E1_U2_S48", "resume.E1_U3_S72"]
    train(tmp_path, {**rare, "every_n_updates": 9}, StopsConfig(every_n_updates=4), updates=6, resume="auto")
    assert refs_in(tmp_path)[-1] == "resume.E2_U4_S96"


def test_folder_of_checkpoints_has_one_owner(tmp_path):
    first, _ = saver_of(tmp_path)
    first.start(at(0), None)
    second, _ = saver_of(tmp_path)
    with pytest.raises(ConfigError, match=r"another trainer of this process saves resume .* keepbest\.abandon"):
        second.start(at(0), None)
    first.leave()
    second.start(at(0), None)
    second.leave()


class SparseLayer(nn.Module):
    """Has what the format of resume checkpoints cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sparse", torch.eye(3).to_sparse())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


def test_model_that_no_checkpoint_holds_is_refused_at_start(tmp_path):
    model = toys.auto_encoder()
    model.encoder.append(SparseLayer())
    with pytest.raises(ConfigError, match="sparse"):
        train(tmp_path, CHECKPOINTS, model=model)
    assert not (tmp_path / "checkpoints").exists()
