"""Starting over: the run that is there is moved beside, whole and readable, or nothing is changed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError, RunExistsError, StorageError
from keepbest.run.aside import move_aside
from keepbest.run.files import Files
from keepbest.run.layout import CHECKPOINTS
from keepbest.run.lock import RunLock
from keepbest.run.verify import verify
from tests.kit import cli_runs as runs
from tests.kit.files import Fault, Operation, SteppedFiles, before
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import Run, ledger, refs, saved_at, snapshots, update
from tests.kit.seams import use

REF = "best_model.loss"


def keep(directory: Path, *values: float, **settings) -> Run:
    run = Run(directory, **settings)
    with run.keeper:
        run.observe(*values)
    return run


def start_over(directory: Path, settings: dict) -> list:
    run = Run(directory, existing="set_aside", **settings)
    other = BestKeeper(run.model, directory=directory, metric_key="acc", existing="set_aside", **settings)
    with run.keeper, other:
        for number, value in enumerate([9.0, 8.0], start=1):
            run.observe(value, first=number)
            other.observe(value, update(number))
    return [run.keeper.state.best.value, other.state.best.value]


@pytest.mark.parametrize("settings", [{}, {"format": "dcp"}], ids=str)
def test_run_that_is_there_is_set_aside_whole(settings, tmp_path):
    keep(tmp_path / "a", 5.0, 3.0, tolerances=[0])
    before_ = runs.tree(tmp_path / "a" / "checkpoints")
    (tmp_path / "a" / "mine.txt").write_text("not of keepbest")
    (tmp_path / "a.1").write_text("taken")
    assert run_ranks(start_over, 2, tmp_path / "a", settings) == [[8.0, 9.0]] * 2
    after = runs.tree(tmp_path / "a.2" / "checkpoints")
    assert {name: data for name, data in after.items() if name != "lock"} == {
        name: data for name, data in before_.items() if name != "lock"
    }
    assert load(tmp_path / "a.2", REF, nn.Linear(1, 1)).value == 3.0
    assert verify(tmp_path / "a.2") == verify(tmp_path / "a") == []
    assert refs(tmp_path / "a") == {REF: "U2", "best_model.acc": "U1"}
    assert (tmp_path / "a" / "mine.txt").read_text() == "not of keepbest"
    assert run_ranks(start_over, 1, tmp_path / "a", settings) == [[8.0, 9.0]]
    assert (tmp_path / "a.3" / "checkpoints" / "ledger.jsonl").exists()


def test_nothing_is_set_aside_where_nothing_is_there_or_it_is_resumed(tmp_path):
    run = keep(tmp_path / "a", 5.0, existing="set_aside")
    again = Run(tmp_path / "a", existing="set_aside")
    again.keeper.load_state_dict(run.keeper.state_dict())
    with again.keeper:
        again.observe(4.0, first=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert saved_at(tmp_path / "a", REF) == 2


def test_run_of_another_keeper_that_resumed_it_is_not_set_aside(tmp_path):
    keep(tmp_path / "a", 5.0)
    first = Run(tmp_path / "a", resume="ledger")
    with first.keeper:
        with pytest.raises(RunExistsError, match="resume it"):
            Run(tmp_path / "a", metric_key="acc", existing="set_aside").keeper.start()
        first.observe(4.0, first=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def hold(directory: Path, is_first: bool) -> None:
    from tests.kit.child import pause

    run = Run(directory, resume="ledger" if is_first else None)
    run.keeper.start()
    pause("holds")


def test_run_in_use_is_not_set_aside(tmp_path):
    keep(tmp_path / "a", 5.0)
    before_ = runs.tree(tmp_path)
    with start_ranks(hold, 1, tmp_path / "a", True, init=False) as ranks:
        ranks.wait_for(0, "holds")
        with use(tmp_path / "a", lock_patience=0.0), pytest.raises(RunExistsError, match="in use by another process"):
            Run(tmp_path / "a", existing="set_aside").keeper.start()
    assert set(runs.tree(tmp_path)) == set(before_)


def test_lock_of_a_folder_that_was_moved_is_taken_where_it_was_asked_for(tmp_path, monkeypatch):
    place, aside = tmp_path / "a", tmp_path / "b"
    place.mkdir()
    lock, moved = RunLock(place / "lock"), []

    def move_while_it_waits(*_: object) -> None:
        if not moved:
            moved.append(place.rename(aside))
            place.mkdir()

    monkeypatch.setattr(lock, "_take", move_while_it_waits)  # the moment between another's move and its release
    lock.acquire()
    assert "pid" in (place / "lock").read_text()
    assert (aside / "lock").read_text() == ""
    lock.release()


def start_refused(root: Path, fault: Fault) -> bool:
    """Whether the start that sets the run in `root` aside raises where one of its operations is refused."""
    keep(root / "a", 5.0)
    events = ledger(root / "a")
    with use(root / "a", files=SteppedFiles(before(fault))):
        keeper = Run(root / "a", existing="set_aside").keeper
        try:
            keeper.start()
            fails = False
        except StorageError:
            fails = True
        keeper.abandon()
    fault.end()
    [run] = [path for path in root.iterdir() if (path / "checkpoints" / "snapshots" / "U1").exists()]
    assert ledger(run) == events
    assert verify(run) == []
    with Run(root / "a", existing="set_aside").keeper as again:  # when the disk is repaired
        assert again.observe(7.0, update(1)).is_new_best
    return fails


@pytest.mark.parametrize("operation", ["make_folder", "create", "rename", "sync_folder", "remove"])
def test_refused_move_loses_nothing(operation, tmp_path):
    outcomes = []
    for number in range(1, 30):
        fault = Fault(operation, number, number)
        outcomes.append(start_refused(tmp_path / str(number), fault))
        if not fault.refused:
            break
    # At last nothing was refused.
    assert (any(outcomes), outcomes[-1], len(outcomes) < 29) == (True, False, True)


def test_place_beside_on_another_disk_is_an_error_with_what_to_do(tmp_path):
    keep(tmp_path / "a", 5.0)

    def refuse(operation: Operation) -> None:
        if operation.name == "rename" and operation.path.parent.name == "a.1":
            raise OSError(errno.EXDEV, "Invalid cross-device link")

    message = r"cannot be moved to .*a\.1, beside it \(.*cross-device.*\); choose another directory"
    with use(tmp_path / "a", files=SteppedFiles(before(refuse))), pytest.raises(StorageError, match=message):
        Run(tmp_path / "a", existing="set_aside").keeper.start()
    assert verify(tmp_path / "a") == []


def test_remote_copy_of_the_run_is_not_replaced(tmp_path):
    remote = f"file://{tmp_path / 'remote'}"
    keep(tmp_path / "a", 5.0, remote=remote)
    before_ = runs.tree(tmp_path)
    with pytest.raises(RunExistsError, match=r"remote holds a run, .* give the new run another remote"):
        Run(tmp_path / "a", existing="set_aside", remote=remote).keeper.start()
    assert set(runs.tree(tmp_path)) == set(before_)
    keep(tmp_path / "a", 4.0, existing="set_aside", remote=f"{remote}-2")
    assert load(remote, model=nn.Linear(1, 1)).value == load(tmp_path / "a.1", model=nn.Linear(1, 1)).value == 5.0
    assert load(f"{remote}-2", model=nn.Linear(1, 1)).value == 4.0


def test_set_aside_and_resume_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="existing='set_aside' would never happen"):
        Run(tmp_path, resume="ledger", existing="set_aside")


def test_run_behind_a_link_is_set_aside_where_it_is(tmp_path):
    keep(tmp_path / "disk" / "a", 5.0)
    (tmp_path / "current").symlink_to(tmp_path / "disk" / "a")
    keep(tmp_path / "current", 4.0, existing="set_aside")
    assert load(tmp_path / "disk" / "a.1", model=nn.Linear(1, 1)).value == 5.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "disk"]


def test_run_that_is_there_is_refused_with_what_to_do(tmp_path):
    keep(tmp_path / "a", 5.0)
    ways = r"resume it \(load_state_dict\(\), or resume='ledger'\), set it aside \(existing='set_aside'\), or choose"
    with pytest.raises(RunExistsError, match=ways):  # the contract of the adapters has those of frameworks
        Run(tmp_path / "a").keeper.start()


def test_trainer_sets_aside_what_belongs_to_the_run(tmp_path):
    config = runs.write_config(tmp_path / "config.yaml", runs.describe_run(tmp_path / "a", epochs=1))
    assert runs.keepbest("train", config).exit_code == 0
    kept = runs.tree(tmp_path / "a")
    refused = runs.keepbest("train", config)
    assert refused.exit_code == 1
    assert "resume it (trainer.resume=auto), set it aside (trainer.existing=set_aside), or choose" in refused.stderr
    assert runs.keepbest("train", config, "trainer.existing=set_aside", "trainer.epochs=2").exit_code == 0
    aside, locks = runs.tree(tmp_path / "a.1"), {"checkpoints/lock"}
    assert {name: aside[name] for name in aside.keys() - locks} == {name: kept[name] for name in kept.keys() - locks}
    assert {"config.yaml", "metrics.jsonl"} <= kept.keys()
    assert snapshots(tmp_path / "a") != set()
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 5  # one for each update, and the end


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_move_that_was_cut_off_is_continued(moved, tmp_path):
    keep(tmp_path / "a", 5.0)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "a" / name).write_text(name)
    taken = tmp_path / "a.1"  # of somebody else, with the same names
    taken.mkdir()
    (taken / "config.yaml").write_text("mine")
    left = iter(range(moved))  # renames before the end

    def die(operation: Operation) -> None:
        if operation.name == "rename" and next(left, None) is None:
            raise Killed

    names = ["config.yaml", "metrics.jsonl", CHECKPOINTS]
    with pytest.raises(Killed):
        move_aside(tmp_path / "a", names, SteppedFiles(before(die)))
    assert move_aside(tmp_path / "a", names, Files()) == tmp_path / "a.2"
    assert sorted(path.name for path in (tmp_path / "a.2").iterdir()) == sorted(names)
    assert [path.name for path in taken.iterdir()] == ["config.yaml"]
    assert load(tmp_path / "a.2", model=nn.Linear(1, 1)).value == 5.0
    assert list((tmp_path / "a").iterdir()) == []


def test_move_that_was_cut_off_is_not_continued_by_another_run(tmp_path):
    (tmp_path / "a.1").mkdir()
    (tmp_path / "a.1" / ".tmp-unfinished").touch()
    (tmp_path / "a.1" / "config.yaml").write_text("of the run that was moved")
    keep(tmp_path / "a", 5.0)
    (tmp_path / "a" / "config.yaml").write_text("of the run that was resumed")
    assert move_aside(tmp_path / "a", ["config.yaml", CHECKPOINTS], Files()) == tmp_path / "a.2"
    assert (tmp_path / "a.1" / "config.yaml").read_text() == "of the run that was moved"


def test_directory_of_somebody_else_is_passed_over(tmp_path, monkeypatch):
    keep(tmp_path / "a", 5.0)
    (tmp_path / "a.1").mkdir()
    look = Path.iterdir

    def refuse(path):
        if path.name == "a.1":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "iterdir", refuse)  # root, who runs the tests in CI, may look everywhere
    assert move_aside(tmp_path / "a", [CHECKPOINTS], Files()) == tmp_path / "a.2"
