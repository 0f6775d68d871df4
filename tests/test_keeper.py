from __future__ import annotations

import math
import os
import shutil
import signal
import stat

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.decision import Best
from keepbest.errors import ConfigError, InvalidMetricError, IterationError, RunExistsError, SnapshotError
from tests.kit.child import pause
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import Run, ledger, refs, saved_at, set_weights, snapshots, update
from tests.kit.seams import use

BEST = "best_model.loss"


def history(directory):
    run = Run(directory, tolerances=[5, 0, 1])
    with run.keeper:
        outcomes = run.observe(3.0, 2.0, 2.5, math.nan, 1.0, 1.0)
    return [(o.value, o.is_new_best, o.newly_exceeded, o.save_failed) for o in outcomes], run.keeper.state


@pytest.mark.parametrize(("world_size", "init"), [(1, False), (1, True), (2, True)])
def test_refs_and_ledger_tell_the_whole_history(world_size, init, tmp_path):
    results = run_ranks(history, world_size, tmp_path, init=init)
    assert repr(results) == repr([results[0]] * world_size)
    outcomes, state = results[0]
    assert [outcome[1:] for outcome in outcomes] == [
        (True, (), False), (True, (), False), (False, (0,), False), (False, (1,), False), (True, (), False),
        (False, (), False),
    ]  # fmt: skip
    assert state.best == Best(1.0, update(5))
    assert state.exceeded == {0: Best(2.0, update(2)), 1: Best(2.0, update(2))}
    folder = tmp_path / "checkpoints"
    assert refs(tmp_path) == {
        BEST: "U5", f"{BEST}.tolerance=0": "U2", f"{BEST}.tolerance=1": "U2", f"{BEST}.tolerance=5": "U5",
    }  # fmt: skip
    assert {ref: saved_at(tmp_path, ref) for ref in refs(tmp_path)} == {
        ref: int(name[1:]) for ref, name in refs(tmp_path).items()
    }
    assert snapshots(tmp_path) == {"U2", "U5"}
    assert {path.name for path in folder.iterdir()} == {*refs(tmp_path), "snapshots", "ledger.jsonl", "lock"}
    lines = ledger(tmp_path)
    assert (lines[0]["event"], lines[0]["version"]) == ("run", 6)
    seen = [(line["iteration"], line["value"], line.get("refs")) for line in lines if line["event"] == "observation"]
    assert seen == [
        ("U1", 3.0, {BEST: "U1"}), ("U2", 2.0, {BEST: "U2"}), ("U3", 2.5, {f"{BEST}.tolerance=0": "U2"}),
        ("U4", "nan", {f"{BEST}.tolerance=1": "U2"}), ("U5", 1.0, {BEST: "U5"}), ("U6", 1.0, None),
    ]  # fmt: skip


def test_provisional_ref_is_dropped_when_the_run_goes_on(tmp_path):
    run = Run(tmp_path, tolerances=[1])
    with run.keeper:
        run.observe(2.0, 3.0)
    assert refs(tmp_path) == {BEST: "U1", f"{BEST}.tolerance=1": "U1"}
    run = Run(tmp_path, tolerances=[1], resume="ledger")
    run.keeper.start()
    assert refs(tmp_path) == {BEST: "U1"}
    assert (run.keeper.state.tolerance_counter, run.keeper.state.exceeded) == (1, {})
    run.observe(1.0, 4.0, 4.0, first=3)
    run.keeper.close()
    assert refs(tmp_path) == {BEST: "U3.r1", f"{BEST}.tolerance=1": "U3.r1"}
    assert run.keeper.state.exceeded == {1: Best(1.0, update(3))}


def test_tolerance_that_closes_before_there_is_a_best_has_no_ref(tmp_path):
    run = Run(tmp_path, tolerances=[0])
    with run.keeper:
        run.observe(math.nan, 1.0)
    assert refs(tmp_path) == {BEST: "U2"}
    assert run.keeper.state.exceeded == {0: None}


def test_exception_in_the_block_records_nothing_more(tmp_path):
    run = Run(tmp_path, tolerances=[3])
    before = []

    def train():
        with run.keeper:
            run.observe(1.0, 2.0)
            before.extend(ledger(tmp_path))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert ledger(tmp_path) == before
    assert refs(tmp_path) == {BEST: "U1"}
    with pytest.raises(ConfigError, match="closed"):
        run.observe(0.5, first=3)
    with Run(tmp_path, tolerances=[3], resume="ledger").keeper as keeper:  # the folder is free
        assert keeper.state == run.keeper.state


def test_worse_model_replaces_no_better_one_after_a_resume(tmp_path):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(3.0)
        run.keeper.flush(pin="first")
        run.observe(2.0, 1.0, first=2)
    run = Run(tmp_path)
    run.keeper.start(at=update(1))
    assert run.keeper.state.best == Best(3.0, update(1))
    run.keeper.release("first")
    [outcome] = run.observe(1.5, first=2)
    assert outcome.is_new_best
    assert run.keeper.best_metric_value == 1.5
    assert run.keeper.best_path == tmp_path / "checkpoints" / "snapshots" / "U3"
    assert (refs(tmp_path), snapshots(tmp_path)) == ({BEST: "U3"}, {"U3", "U2.r1"})
    assert run.observe(1.0, first=3)[0].is_new_best  # of the timeline, and a tie with the best of the run
    assert refs(tmp_path) == {BEST: "U3"}
    run.observe(0.5, first=4)
    assert (refs(tmp_path), snapshots(tmp_path)) == ({BEST: "U4.r1"}, {"U4.r1"})
    run.keeper.close()
    assert saved_at(tmp_path, BEST) == 4
    run = Run(tmp_path, resume="ledger")
    with run.keeper:
        run.observe(0.25, first=5)
    assert refs(tmp_path) == {BEST: "U5.r2"}


@pytest.mark.parametrize("interruption", range(7))
@pytest.mark.parametrize("by", ["ledger", "iteration", "state"])
def test_resumed_run_ends_like_the_uninterrupted_one(by, interruption, tmp_path):
    values = [3.0, 2.0, 2.5, math.nan, 1.0, 1.5, 1.5]
    whole = Run(tmp_path / "whole", tolerances=[0, 1, 4])
    with whole.keeper:
        whole.observe(*values)
    first = Run(tmp_path / "run", tolerances=[0, 1, 4])
    first.keeper.start()
    first.observe(*values[:interruption])
    state = first.keeper.state_dict()
    first.keeper.flush()
    first.keeper.abandon()
    folder = tmp_path / "run"
    run = Run(folder, tolerances=[0, 1, 4], resume="ledger" if by == "ledger" else None)
    if by == "state":
        run.keeper.load_state_dict(state)
    run.keeper.start(at=update(interruption) if by == "iteration" else None)
    assert run.keeper.state == first.keeper.state
    assert run.keeper.state_dict()["run_id"] == state["run_id"]
    run.observe(*values[interruption:], first=interruption + 1)
    run.keeper.close()
    assert run.keeper.state == whole.keeper.state
    assert {ref: saved_at(folder, ref) for ref in refs(folder)} == {
        ref: saved_at(tmp_path / "whole", ref) for ref in refs(tmp_path / "whole")
    }


def test_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    for each in (run, other):
        with each.keeper:
            each.observe(1.0)
    before = (tmp_path / "a" / "checkpoints" / "ledger.jsonl").read_bytes()
    with pytest.raises(RunExistsError, match="resume it"):
        Run(tmp_path / "a").observe(0.5)
    stranger = Run(tmp_path / "a")
    stranger.keeper.load_state_dict(other.keeper.state_dict())
    with pytest.raises(RunExistsError, match="the state that was loaded is of run"):
        stranger.keeper.start()
    with pytest.raises(ConfigError, match="'lower is better'"):
        Run(tmp_path / "a", higher_is_better=True, resume="ledger").keeper.start()
    assert (tmp_path / "a" / "checkpoints" / "ledger.jsonl").read_bytes() == before


def test_state_is_loaded_before_the_start_and_must_be_one(tmp_path):
    run = Run(tmp_path)
    weights = {f"layers.{number}": torch.ones(9) for number in range(99)}
    for nonsense in ({}, {"run_id": "a", "timeline": 0, "state": {}}, weights, None, [1]):
        with pytest.raises(ConfigError, match=r"state_dict\(\) of a keeper returned, found a \w+") as caught:
            run.keeper.load_state_dict(nonsense)
        assert len(str(caught.value)) < 200
    with run.keeper, pytest.raises(ConfigError, match="too late"):
        run.keeper.load_state_dict(run.keeper.state_dict())


def test_iterations_that_go_back_are_refused_and_change_nothing(tmp_path):
    run = Run(tmp_path)
    with run.keeper:
        run.observe(2.0, first=5)
        for iteration in (update(5), update(4), TrainingIteration(epoch=9)):
            with pytest.raises(IterationError):
                run.keeper.observe(1.0, iteration)
        assert run.keeper.state.best == Best(2.0, update(5))
        assert run.observe(1.0, first=6)[0].is_new_best


def test_keepers_of_one_model_share_a_snapshot_and_its_gather(tmp_path):
    reads = []
    run = Run(tmp_path)
    run.model.register_state_dict_post_hook(lambda *_: reads.append(1))
    other = BestKeeper(run.model, directory=tmp_path, metric_key="accuracy", tolerances=[0])
    with run.keeper, other:
        set_weights(run.model, 1)
        assert run.keeper.observe(1.0, update(1)).is_new_best
        read_once = len(reads)
        assert other.observe(0.5, update(1)).is_new_best
        assert len(reads) == read_once > 0
        assert refs(tmp_path) == {BEST: "U1", "best_model.accuracy": "U1"}
        set_weights(run.model, 2)
        run.keeper.observe(2.0, update(2))
        other.observe(0.6, update(2))
        assert (refs(tmp_path), snapshots(tmp_path)) == ({BEST: "U1", "best_model.accuracy": "U2"}, {"U1", "U2"})
        set_weights(run.model, 3)
        run.keeper.observe(0.1, update(3))
        other.observe(0.1, update(3))
    assert refs(tmp_path) == {BEST: "U3", "best_model.accuracy": "U2", "best_model.accuracy.tolerance=0": "U2"}
    assert snapshots(tmp_path) == {"U2", "U3"}
    assert {ref: saved_at(tmp_path, ref) for ref in (BEST, "best_model.accuracy")} == {
        BEST: 3,
        "best_model.accuracy": 2,
    }


def test_keepers_of_different_parts_have_own_snapshots(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    run = Run(tmp_path, model)
    part = BestKeeper(model, directory=tmp_path, metric_key="loss", id="first layer", model_names=["0"])
    with run.keeper, part:
        run.observe(1.0)
        part.observe(1.0, update(1))
    ref = "best_model.loss.id=first%20layer"
    names = refs(tmp_path)
    assert names[BEST] == "U1"
    assert names[ref].startswith("U1.")
    assert {path.name for path in part.best_path.iterdir()} == {"0.pt", "snapshot.json"}
    assert list(torch.load(part.best_path / "0.pt", weights_only=True)) == ["weight", "bias"]
    set_weights(model, 7)
    assert load(tmp_path, ref, model).parts == ("0",)
    assert [float(layer.bias[0].detach()) for layer in model] == [1.0, 7.0]


def start_twins(directory, ids):
    keepers = [Run(directory, id=name).keeper for name in ids]
    keepers[0].start()
    keepers[1].start()
    for keeper in keepers:
        keeper.observe(1.0, update(1))
        keeper.close()
    return sorted(keeper.name for keeper in keepers)


def test_keepers_of_one_metric_need_ids(tmp_path):
    with pytest.raises(ConfigError, match="give one of them an id"):
        run_ranks(start_twins, 2, tmp_path / "a", [None, None])
    names = ["best_model.loss", "best_model.loss.id=b"]
    assert run_ranks(start_twins, 2, tmp_path / "b", [None, "b"]) == [names] * 2
    assert set(refs(tmp_path / "b")) == set(names)


def test_pinned_snapshots_stay_until_pinned_anew_or_released(tmp_path, caplog):
    run = Run(tmp_path, tolerances=[0])
    with run.keeper:
        run.observe(5.0, 4.0, 4.5)  # closes tolerance 0 with U2
        run.observe(3.0, first=4)
        run.keeper.flush(pin="latest")
        run.observe(2.0, first=5)
        assert snapshots(tmp_path) == {"U2", "U4", "U5"}
        run.keeper.flush(pin="E1")
        run.observe(1.0, first=6)
        run.keeper.flush(pin="latest")
        assert snapshots(tmp_path) == {"U2", "U5", "U6"}
        run.keeper.release("E1")
        assert snapshots(tmp_path) == {"U2", "U6"}
        run.keeper.release("E1")  # as a loop does that was resumed from before the first time
        assert "was ever pinned" not in caplog.text
        run.keeper.release("latst")
        assert "nothing was ever pinned under 'latst'; pinned are: 'latest'; did you mean 'latest'?" in caplog.text
    run = Run(tmp_path, tolerances=[0])
    run.keeper.start(at=update(6))
    run.keeper.release("E1")
    run.observe(0.5, first=7)
    assert snapshots(tmp_path) == {"U2", "U6", "U7.r1"}


def test_pin_survives_a_resume_and_keeps_what_its_state_names(tmp_path):
    run = Run(tmp_path, tolerances=[1])
    with run.keeper:
        run.observe(3.0, 4.0)
        run.keeper.flush(pin="latest")
        state = run.keeper.state_dict()
        run.observe(1.0, first=3)
    run = Run(tmp_path, tolerances=[1])
    run.keeper.load_state_dict(state)
    with run.keeper:
        [outcome] = run.observe(5.0, first=3)
    assert outcome.newly_exceeded == (1,)
    assert (saved_at(tmp_path, f"{BEST}.tolerance=1"), saved_at(tmp_path, BEST)) == (1, 3)


def test_non_finite_values_count_as_no_improvement_or_raise(tmp_path):
    ignoring = Run(tmp_path / "a", higher_is_better=True)
    with ignoring.keeper:
        assert [outcome.is_new_best for outcome in ignoring.observe(math.nan, math.inf, 0.0, -math.inf)] == [0, 0, 1, 0]
    raising = Run(tmp_path / "b", on_nonfinite="raise")
    with raising.keeper:
        raising.observe(1.0)
        with pytest.raises(InvalidMetricError, match="loss is nan at U2"):
            raising.observe(math.nan, first=2)


def test_best_can_be_restored_into_the_live_model(tmp_path):
    run = Run(tmp_path)
    assert (run.keeper.best_metric_value, run.keeper.best_path) == (math.inf, None)
    with run.keeper:
        with pytest.raises(SnapshotError, match="has no ref"):
            run.keeper.restore_best()
        run.observe(2.0, 1.0, 1.5)
        assert run.keeper.best_metric_value == 1.0
        run.keeper.restore_best()
        assert float(run.model.weight.detach()) == 2.0
    assert Run(tmp_path / "other", higher_is_better=True).keeper.best_metric_value == -math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_key": "frobnication"}, "higher_is_better"),
        ({"tolerances": [1, 1]}, "differ"),
        ({"min_delta": -1}, "min_delta"),
        ({"metric_reduction": "median"}, "metric_reduction"),
        ({"on_nonfinite": "warn"}, "on_nonfinite"),
        ({"on_save_error": "ignore"}, "on_save_error"),
        ({"resume": "yes"}, "resume"),
        ({"model_names": ["encoder"]}, "no submodel 'encoder'; there are: none"),
        ({"rank_timeout": 0}, "rank_timeout"),
    ],
)
def test_impossible_settings_are_refused_before_any_write(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def hold_the_folder(directory):
    run = Run(directory)
    run.observe(1.0)
    pause("holding")
    return os.getpid()


def test_folder_is_refused_while_its_process_lives(tmp_path):
    with start_ranks(hold_the_folder, 1, tmp_path, init=False) as ranks:
        ranks.wait_for(0, "holding")
        holder = rf'in use by another process .*"pid": {ranks.processes[0].pid}'
        with use(tmp_path, lock_patience=0.0), pytest.raises(RunExistsError, match=holder):
            Run(tmp_path, resume="ledger").keeper.start()
        ranks.signal(0, signal.SIGKILL)
        ranks.collect()
    run = Run(tmp_path, resume="ledger")
    with run.keeper:
        assert run.keeper.state.best == Best(1.0, update(1))


def keep_with_umask(directory, mask):
    os.umask(mask)
    history(directory)


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_have_the_modes_that_the_umask_gives(mask, tmp_path):
    run_ranks(keep_with_umask, 1, tmp_path / "run", mask, init=False)
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(paths) > 10
    for path in paths:
        if not path.is_symlink():
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_run_copied_without_its_links_loads_and_resumes(tmp_path):
    run = Run(tmp_path / "run", tolerances=[0])
    with run.keeper:
        run.observe(2.0, 3.0, 1.0)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert not (copy / "checkpoints" / BEST).is_symlink()
    assert load(copy, BEST, run.model).iteration == update(3)
    assert load(copy, f"{BEST}.tolerance=0", run.model).value == 2.0
    assert float(run.model.weight.detach()) == 1.0
    run = Run(copy, tolerances=[0], resume="ledger")
    with run.keeper:
        run.observe(0.5, first=4)
    assert refs(copy) == {BEST: "U4.r1", f"{BEST}.tolerance=0": "U1"}
