"""An `OSError` of the code of the user is what it is, on every rank: no refusal of the disk, and no best is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import KeepBestError, RankFailedError
from keepbest.run.verify import verify
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.log import unreachable
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, ledger, saved_at, snapshots
from tests.kit.seams import use

REF = "best_model.loss"


class Failing:
    """Raises on one rank for as long as it is armed, in the place of code of the user."""

    def __init__(self, rank: int) -> None:
        self.rank, self.is_armed = rank, False

    def __call__(self, *_: Any, **__: Any) -> Any:
        if self.is_armed and dist.get_rank() == self.rank:
            raise PermissionError(13, "no access", "/data/tokens.bin")
        return {}


class Provider:
    """A training state of the user."""

    def __init__(self, failing: Failing) -> None:
        self.failing = failing

    def state_dict(self) -> dict[str, Any]:
        return self.failing() or {"seen": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failing()


def place(model: nn.Module, where: str, failing: Failing) -> dict[str, Any]:
    """What a keeper of `model` gets besides, so that `failing` is called in it."""
    if where == "hook":
        model.register_state_dict_pre_hook(failing)
    return {"training_state": {"mine": Provider(failing)}} if where == "provider" else {}


def what_is_raised(work: Any) -> list[str]:
    try:
        work()
    except KeepBestError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def observe(directory: Path, where: str, rank: int, settings: dict[str, Any]) -> list[Any]:
    failing, model = Failing(rank), nn.Linear(1, 1)
    run = Run(directory, model, on_save_error="warn", rank_timeout=10.0, **place(model, where, failing), **settings)
    with run.keeper as keeper:
        run.observe(3.0)
        keeper.flush()
        failing.is_armed = True
        value = (lambda: failing() or 2.0) if where == "metric" else 2.0
        raised = what_is_raised(lambda: run.observe(value, first=2))
        failing.is_armed = False
        run.observe(1.0, first=3)
    return [*raised, keeper.best_metric_value]


@pytest.mark.parametrize("settings", [{}, {"async_save": True}, {"format": "dcp"}], ids=str)
@pytest.mark.parametrize("where", ["hook", "provider", "metric"])
@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_the_user_loses_no_best(where, rank, settings, tmp_path):
    for name, message, best in run_ranks(observe, 2, tmp_path, where, rank, settings):
        assert (name, best) == ("RankFailedError", 1.0)
        assert f"rank {rank} of 2: PermissionError: [Errno 13] no access: '/data/tokens.bin'" in message
        assert "intact" not in message  # as a refusal of the disk has it
    assert not any("lost" in line for line in ledger(tmp_path))


def start(directory: Path, where: str) -> list[str]:
    failing, model = Failing(1), nn.Linear(1, 1)
    beside = place(model, where, failing)
    keeper = BestKeeper(model, directory=directory, metric_key="loss", **beside)
    failing.is_armed = True
    return what_is_raised(keeper.start)


@pytest.mark.parametrize("where", ["hook", "provider"])
def test_error_of_the_user_at_the_start_is_its_own(where, tmp_path):
    for name, message in run_ranks(start, 2, tmp_path, where):
        assert (name, "PermissionError" in message) == ("RankFailedError", True)
    assert list(tmp_path.iterdir()) == []


def load_best(directory: Path, where: str) -> list[str]:
    failing, model = Failing(1), nn.Linear(1, 1)
    run = Run(directory, model, training_state={"mine": Provider(failing)})
    with run.keeper:
        run.observe(1.0)
    if where == "model":
        model.register_load_state_dict_pre_hook(failing)
    failing.is_armed = True
    wanted = {"training_state": {"mine": Provider(failing)}} if where == "provider" else {}
    return what_is_raised(lambda: load(directory, REF, model, **wanted))


@pytest.mark.parametrize("where", ["model", "provider"])
def test_error_of_the_user_in_a_load_is_its_own(where, tmp_path):
    for name, message in run_ranks(load_best, 2, tmp_path, where):
        assert (name, "PermissionError" in message) == ("RankFailedError", True)


def observe_and_flush(run: Run, value: float) -> None:
    run.observe(value)
    run.keeper.flush()


@pytest.mark.parametrize("is_async", [False, True])
def test_best_whose_log_is_out_of_reach_is_kept(is_async, tmp_path):
    run = Run(tmp_path, on_save_error="warn", async_save=is_async)
    with unreachable("new best 1.0"), run.keeper:
        with pytest.raises(RankFailedError, match="ConnectionError: no such host") as raised:
            observe_and_flush(run, 1.0)
        run.observe(2.0, first=2)
    assert type(raised.value) is RankFailedError
    assert not any("lost" in line for line in ledger(tmp_path))
    assert (run.keeper.best_metric_value, saved_at(tmp_path, REF)) == (1.0, 1)


def refuse_links(operation: Operation) -> None:
    if operation.name == "link":
        raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("is_async", [False, True])
def test_log_that_fails_after_a_commit_takes_no_best_away(is_async, tmp_path):
    with use(tmp_path, files=SteppedFiles(before(refuse_links))):
        run = Run(tmp_path, on_save_error="warn", async_save=is_async)
        with run.keeper:
            text, error = "since their links are refused", "a handler of the log raised ConnectionError"
            with unreachable(text) as handler, pytest.raises(RankFailedError, match=error) as raised:
                observe_and_flush(run, 1.0)
            run.observe(2.0, first=2)
            assert run.keeper.best_metric_value == 1.0
    assert (type(raised.value), handler.modules) == (RankFailedError, ["ref_links"])
    assert (snapshots(tmp_path), verify(tmp_path)) == ({"U1"}, [])
    load(tmp_path, REF, run.model)


def test_log_that_fails_at_a_resume_is_no_refusal_of_the_disk(tmp_path):
    with Run(tmp_path).keeper as keeper:
        keeper.observe(1.0, update=1)
    run = Run(tmp_path, resume="ledger", min_delta=0.5)
    with unreachable("is decided anew"), pytest.raises(RankFailedError, match="a handler of the log") as raised:
        run.keeper.start()
    assert type(raised.value) is RankFailedError
