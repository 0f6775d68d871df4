"""A handler of the log that raises on rank 0 alone: every rank raises, none waits, and nothing is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import RankFailedError
from tests.faults.test_background import refusing
from tests.kit import toys
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, saved_at, update

REF = "best_model.loss"


class Raising(logging.Handler):
    """Raises on rank 0 for one message, once."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.has_raised = text, False

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage() and not self.has_raised and dist.get_rank() == 0:
            self.has_raised = True
            raise ValueError("no place for the log")


@contextmanager
def raising(text: str) -> Iterator[None]:
    handler, logger = Raising(text), logging.getLogger("keepbest")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def start_twice(directory: Path) -> float:
    run = Run(directory, rank_timeout=10.0)
    with raising("starts"):
        with pytest.raises(RankFailedError, match="no place for the log"):
            run.keeper.start()
        with run.keeper:
            run.observe(1.0)
    return run.keeper.best_metric_value


def test_start_can_be_repeated_where_its_log_raised(tmp_path):
    assert run_ranks(start_twice, 2, tmp_path) == [1.0, 1.0]


def observe_and_flush(run: Run) -> None:
    run.observe(1.0)
    run.keeper.flush()


def observe_a_new_best(directory: Path, is_async: bool) -> list:
    called: list[float] = []
    run = Run(
        directory, rank_timeout=10.0, async_save=is_async, on_new_best=lambda outcome, _: called.append(outcome.value)
    )
    with run.keeper, raising("new best 1.0"):
        with pytest.raises(RankFailedError, match="no place for the log"):
            observe_and_flush(run)
        run.observe(2.0, first=2)
        run.keeper.flush()
        assert run.keeper.best_path == directory / "checkpoints/snapshots/U1"
    return [run.keeper.best_metric_value, *called]


@pytest.mark.parametrize("is_async", [False, True])
def test_best_whose_log_raised_is_kept(is_async, tmp_path):
    assert run_ranks(observe_a_new_best, 2, tmp_path, is_async) == [[1.0, 1.0], [1.0]]
    assert saved_at(tmp_path, REF) == 1


def continue_without_a_best(directory: Path, is_async: bool) -> list:
    found = []
    with refusing(directory, "U1"), raising("not saved" if not is_async else "not written"):
        run = Run(directory, rank_timeout=10.0, async_save=is_async, on_save_error="warn")
        with run.keeper as keeper:
            with pytest.raises(RankFailedError, match="no place for the log"):
                run.observe(*[1.0, *[9.0] * 5000])
            found.append(keeper.state.last_iteration is not None)
            run.observe(3.0, first=6000)
            found.append(keeper.best_metric_value <= 9.0)
    return found


@pytest.mark.parametrize("is_async", [False, True])
def test_lost_best_whose_log_raised_is_replaced(is_async, tmp_path):
    assert run_ranks(continue_without_a_best, 2, tmp_path, is_async) == [[True, True]] * 2


def save_unlike_buffers(directory: Path) -> float:
    model = nn.BatchNorm1d(1)
    with BestKeeper(model, directory=directory, metric_key="loss", rank_timeout=10.0) as keeper:
        keeper.observe(5.0, update(1))
        with raising("buffers differ"):
            model.running_mean.fill_(float(dist.get_rank()))
            with pytest.raises(RankFailedError, match="no place for the log"):
                keeper.observe(4.0, update(2))
        keeper.observe(3.0, update(3))
    return keeper.best_metric_value


def test_no_weight_travels_where_the_log_raised_before(tmp_path):
    assert run_ranks(save_unlike_buffers, 2, tmp_path) == [3.0, 3.0]
    state = torch.load(tmp_path / "checkpoints" / REF / "model.pt", weights_only=True)
    assert state["running_mean"].tolist() == [0.0]


def close_all(keepers: list[BestKeeper]) -> None:
    for keeper in keepers:
        keeper.close()


def close_two(directory: Path) -> list[str]:
    keepers = [BestKeeper(nn.Linear(1, 1), directory=directory / name, metric_key="loss") for name in "ab"]
    for keeper in keepers:
        keeper.start()
    with raising("no best is kept"), pytest.raises(RankFailedError, match="no place for the log"):
        close_all(keepers)
    keepers[1].close()
    return [keeper.name for keeper in keepers]


def test_end_whose_log_raised_is_an_error_on_every_rank(tmp_path):
    assert run_ranks(close_two, 2, tmp_path) == [[REF, REF]] * 2


def train_two_epochs(directory: Path, text: str, reason: str | None) -> str:
    trainer = toys.make_trainer(directory, epochs=2, strategy="ddp")
    if reason is not None:
        trainer.stop(reason)
    with raising(text), pytest.raises(RankFailedError, match="no place for the log"):
        trainer.train()
    return str(trainer.update_counter.iteration)


@pytest.mark.parametrize(
    ("text", "reason", "epoch"), [("epoch 1: ", None, "E1_"), ("training stopped", "enough", "E0_")]
)
def test_log_of_training_that_raised_ends_it_on_every_rank(text, reason, epoch, tmp_path):
    [iteration] = set(run_ranks(train_two_epochs, 2, tmp_path, text, reason))
    assert iteration.startswith(epoch)
