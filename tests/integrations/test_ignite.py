"""Ignite's own Checkpoint and EarlyStopping are the oracle of what is kept."""

from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
import pytest
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from keepbest.errors import ConfigError, IterationError, MissingMetricError, RunExistsError
from keepbest.integrations.ignite import BestCheckpoint
from tests.integrations.ignite_runs import (
    METRIC,
    Resume,
    keep_peer,
    kept,
    make_run,
    weights_of,
    weights_of_checkpoint,
)
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import ledger, refs, snapshots

VALUES = [5.0, 3.0, 4.0, 6.0, 3.5, 2.0, 7.0, 2.5]
SLOW = [5.0, 4.6, 4.2, 3.9, 3.8, 3.75, 3.7, 0.0]  # improves, but often by less than 0.5


def attach(directory, run, **settings):
    best = BestCheckpoint(run.model, METRIC, directory=directory, **settings)
    best.attach(run.trainer, run.evaluator)
    return best


def observed(directory):
    return [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]


def keep(directory, strategy, settings):
    run = make_run(VALUES, strategy=strategy)
    best = attach(directory, run, tolerances=[0, 1, 2, 5], keep_top_k=3, **settings)
    peers = {n_saved: keep_peer(directory / str(n_saved), run, n_saved) for n_saved in (1, 3)}
    run.train(len(VALUES))
    saved = {n_saved: [(-each.priority, each.filename) for each in peer._saved] for n_saved, peer in peers.items()}
    return best.keeper.state, saved


@pytest.mark.parametrize(
    ("world_size", "settings"), [(1, {}), (2, {}), (2, {"async_save": True, "format": "safetensors"})]
)
def test_best_and_top_k_are_those_of_checkpoint(world_size, settings, tmp_path):
    results = run_ranks(keep, world_size, tmp_path, "ddp", settings, init=world_size > 1)
    assert [state for state, _ in results] == [results[0][0]] * world_size
    found, saved = kept(tmp_path), results[0][1]
    [(value, name)] = saved[1]
    assert found[""] == ("E6_U12", value, weights_of_checkpoint(tmp_path / "1" / name))
    ours = sorted(found[f".top={place}"][1:] for place in (1, 2, 3))
    assert ours == sorted((value, weights_of_checkpoint(tmp_path / "3" / name)) for value, name in saved[3])
    assert len({str(weights) for _, weights in ours}) == 3


def keep_sharded(directory, settings):
    run, whole = make_run(VALUES, strategy="fsdp2"), []

    def record():
        full = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        whole.append(weights_of(full))

    run.evaluator.add_event_handler(Events.COMPLETED, record)
    attach(directory, run, keep_top_k=3, **settings)
    run.train(len(VALUES))
    return whole


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_sharded_models_are_kept_whole(file_format, tmp_path):
    # Ignite's Checkpoint writes the shards of one rank, so the oracle is what torch puts together.
    whole = run_ranks(keep_sharded, 2, tmp_path, {"format": file_format})[0]
    found = kept(tmp_path)
    for ref, epoch in {"": 6, ".top=1": 6, ".top=2": 8, ".top=3": 2}.items():
        assert found[ref] == (f"E{epoch}_U{2 * epoch}", VALUES[epoch - 1], whole[epoch - 1])


def stop_early(directory, values, stopper):
    """Where a run of its own for each patience ends, and what Ignite's handlers have as the best by then."""
    found = {}
    for patience in (1, 2, 3):
        run = make_run(values)
        peer = keep_peer(directory / str(patience), run, 1)
        stopping = EarlyStopping(patience, peer.score_function, run.trainer, **stopper)
        run.evaluator.add_event_handler(Events.COMPLETED, stopping)
        run.train(len(values))
        found[patience] = run.trainer.state.epoch, -stopping.best_score, peer.last_checkpoint
    return found


def keep_tolerances(directory, values, settings):
    run = make_run(values)
    attach(directory, run, tolerances=[0, 1, 2], **settings)
    run.train(len(values))


def test_tolerance_keeps_what_early_stopping_with_one_more_of_patience_would_have_kept(tmp_path):
    run_ranks(keep_tolerances, 2, tmp_path / "run", VALUES, {})
    stopped = run_ranks(stop_early, 2, tmp_path / "peer", VALUES, {})[0]
    assert [epoch for epoch, *_ in stopped.values()] == [3, 4, 5]  # none of them saw the best of all
    found = kept(tmp_path / "run")
    for patience, (_, value, path) in stopped.items():
        assert found[f".tolerance={patience - 1}"] == ("E2_U4", value, weights_of_checkpoint(path))


def test_min_delta_is_the_threshold_of_early_stopping_that_is_cumulative(tmp_path):
    run_ranks(keep_tolerances, 1, tmp_path / "run", SLOW, {"min_delta": 0.5}, init=False)
    cumulative = {"threshold": 0.5, "cumulative": True}
    stopped = run_ranks(stop_early, 1, tmp_path / "peer", SLOW, cumulative, init=False)[0]
    assert [epoch for epoch, *_ in stopped.values()] == [2, 5, 6]
    values = {patience: value for patience, (_, value, _) in stopped.items()}
    found = kept(tmp_path / "run")
    assert {patience: found[f".tolerance={patience - 1}"][1] for patience in values} == values
    assert len(set(values.values())) == 2
    # Without that, many small steps are no improvement, and the reference moves with them.
    others = run_ranks(stop_early, 1, tmp_path / "other", SLOW, {"threshold": 0.5}, init=False)[0]
    assert [epoch for epoch, *_ in others.values()] == [2, 3, 4]


def train_in_pieces(directory, pieces, settings):
    """Trains piece by piece, each from the last checkpoint of the one before; a piece may end in the middle."""
    every = settings.pop("every", 1)
    for epochs, fails_at in pieces:
        run = make_run(VALUES, fails_at=fails_at)
        best = attach(directory, run, tolerances=[0, 1, 2], keep_top_k=3, **settings)
        resume = Resume(directory / "resume", run, best)
        run.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every), resume.write)
        resume.load()
        if fails_at is None:
            run.train(epochs)
        else:
            with pytest.raises(ZeroDivisionError):
                run.train(epochs)
    return best.keeper.state


@pytest.mark.parametrize(
    ("pieces", "settings"),
    [
        ([(8, 4), (8, 7), (8, None)], {"async_save": True}),
        ([(8, 8), (8, None)], {"every": 2}),
        ([(3, None), (8, None)], {}),  # the first part was closed
    ],
)
def test_run_that_goes_on_from_a_checkpoint_ends_like_one_that_was_never_stopped(pieces, settings, tmp_path):
    whole = run_ranks(train_in_pieces, 2, tmp_path / "whole", [(8, None)], settings)
    resumed = run_ranks(train_in_pieces, 2, tmp_path / "resumed", pieces, settings)
    assert resumed == whole
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert len(refs(tmp_path / "whole")) == 7


def keep_until(directory, values, **settings):
    """Fails in the last epoch; there is a checkpoint of every second one."""
    run = make_run(values, fails_at=len(values))
    best = attach(directory, run, tolerances=[1], **settings)
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), Resume(directory / "resume", run, best).write)
    with pytest.raises(ZeroDivisionError):
        run.train(len(values))


def test_what_the_newest_checkpoint_names_is_there_though_a_better_one_came_later(tmp_path):
    keep_until(tmp_path, [5.0, 3.0, 2.0, 9.0])
    assert (set(refs(tmp_path).values()), snapshots(tmp_path)) == ({"E3_U6"}, {"E2_U4", "E3_U6"})
    run = make_run([5.0, 3.0, 7.0, 7.0])
    best = attach(tmp_path, run, tolerances=[1])
    Resume(tmp_path / "resume", run, best).load()
    run.train(4)
    assert {ref: entry[:2] for ref, entry in kept(tmp_path).items()} == {
        "": ("E3_U6", 2.0),
        ".tolerance=1": ("E2_U4", 3.0),
    }


def test_run_that_failed_is_left_as_it_was_and_never_overwritten(tmp_path):
    keep_until(tmp_path, VALUES[:3])
    before = ledger(tmp_path)
    assert list(refs(tmp_path)) == ["best_model.loss"]
    run = make_run(VALUES)
    attach(tmp_path, run)
    with pytest.raises(RunExistsError, match="resume it"):
        run.train(3)
    assert ledger(tmp_path) == before
    run = make_run(VALUES)
    best = attach(tmp_path, run, tolerances=[1])
    Resume(tmp_path / "resume", run, best).load()
    run.train(3)
    assert observed(tmp_path) == ["E1_U2", "E2_U4", "E3_U6"]
    assert set(refs(tmp_path)) == {"best_model.loss", "best_model.loss.tolerance=1"}  # closed


def fail_on_rank_0(directory):
    """Its own handler writes a checkpoint then, as Ignite's documentation shows."""
    run = make_run(VALUES, strategy="none", fails_at=3 if idist.get_rank() == 0 else None)
    resume = Resume(directory / "resume", run, attach(directory, run, async_save=True))
    run.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _: resume.write(run.trainer))
    run.train(4)


def go_on_from_failure(directory):
    run = make_run(VALUES, strategy="none")
    Resume(directory / "resume", run, attach(directory, run)).load()
    run.trainer.state.iteration, run.trainer.state.epoch = 4, 2  # Ignite counts an update that it did not finish
    run.train(4)


def test_checkpoint_that_is_written_when_one_rank_fails_waits_for_nobody(tmp_path):
    with start_ranks(fail_on_rank_0, 2, tmp_path) as ranks:
        outcomes = ranks.collect()
    assert type(outcomes[0].exception) is ZeroDivisionError
    run_ranks(go_on_from_failure, 2, tmp_path)
    assert observed(tmp_path) == ["E1_U2", "E2_U4", "E3_U6", "E4_U8"]


def misname(directory):
    run = make_run(VALUES)
    best = BestCheckpoint(run.model, "accuracy", directory=directory)
    best.attach(run.trainer, run.evaluator)
    run.train(2)


def test_metric_that_the_evaluator_does_not_have_is_told_on_all_ranks_with_those_that_it_has(tmp_path):
    with start_ranks(misname, 2, tmp_path) as ranks:
        errors = [outcome.exception for outcome in ranks.collect()]
    assert [type(error) for error in errors] == [MissingMetricError] * 2
    assert "'accuracy' is not among the metrics of the evaluator; there are: loss" in str(errors[0])


def evaluate_within_epochs(directory):
    run = make_run(VALUES, evaluate_at=Events.ITERATION_COMPLETED(every=3) | Events.COMPLETED)
    attach(directory, run)
    run.train(6)
    run.evaluator.run([None])  # after training, of whatever data


def test_evaluations_every_so_many_iterations_and_at_the_end_are_observed_once_each(tmp_path):
    run_ranks(evaluate_within_epochs, 2, tmp_path)
    assert observed(tmp_path) == ["E2_U3", "E3_U6", "E5_U9", "E6_U12"]


def test_run_that_goes_on_from_within_an_epoch_observes_what_one_that_was_never_stopped_does(tmp_path):
    every_iteration = {"evaluate_at": Events.ITERATION_COMPLETED}
    for fails_at in (4, None):
        run = make_run(VALUES, fails_at=fails_at, **every_iteration)
        best = attach(tmp_path / "parts", run)
        resume = Resume(tmp_path / "resume", run, best)
        run.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=5), resume.write)
        resume.load()
        if fails_at is None:
            run.train(5)
        else:
            with pytest.raises(ZeroDivisionError):
                run.train(5)
    whole = make_run(VALUES, **every_iteration)
    other = attach(tmp_path / "whole", whole)
    whole.train(5)
    assert best.keeper.state == other.keeper.state
    assert sorted(set(observed(tmp_path / "parts"))) == sorted(observed(tmp_path / "whole"))


def test_two_evaluations_of_one_iteration_are_refused_rather_than_chosen_from(tmp_path):
    run = make_run(VALUES)
    attach(tmp_path, run)
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: run.evaluator.run([None]))
    with pytest.raises(IterationError, match="E1_U2"):
        run.train(2)


def test_trainer_that_runs_on_for_more_epochs_goes_on_in_its_folder(tmp_path):
    run = make_run(VALUES)
    best = attach(tmp_path / "parts", run, tolerances=[1, 5])
    run.train(3)
    assert set(refs(tmp_path / "parts")) == {f"best_model.loss{end}" for end in ("", ".tolerance=1", ".tolerance=5")}
    run.train(8)
    whole = make_run(VALUES)
    other = attach(tmp_path / "whole", whole, tolerances=[1, 5])
    whole.train(8)
    assert best.keeper.state == other.keeper.state
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


@pytest.mark.parametrize(("skip_completed", "expected"), [(False, ["", ".tolerance=5"]), (True, [""])])
def test_terminated_run_is_closed_unless_its_end_is_skipped(skip_completed, expected, tmp_path):
    run = make_run(VALUES)
    attach(tmp_path, run, tolerances=[5])
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=3), lambda: run.trainer.terminate(skip_completed=skip_completed)
    )
    run.train(8)
    assert sorted(refs(tmp_path)) == [f"best_model.loss{end}" for end in expected]
    again = make_run(VALUES)
    attach(tmp_path, again, tolerances=[5], resume="ledger")
    again.train(1)  # in the same process
    assert observed(tmp_path)[-1] == "E1_U2"


def test_handlers_of_exceptions_are_called_and_the_exception_is_raised_all_the_same(tmp_path):
    run, heard = make_run(VALUES, fails_at=2), []
    attach(tmp_path, run)
    run.trainer.add_event_handler(Events.EXCEPTION_RAISED, heard.append)
    with pytest.raises(ZeroDivisionError):
        run.train(3)
    assert {type(error) for error in heard} == {ZeroDivisionError}


def test_handler_is_attached_once(tmp_path):
    run = make_run(VALUES)
    best = attach(tmp_path, run)
    with pytest.raises(ConfigError, match="attached already"):
        best.attach(run.trainer, run.evaluator)


def test_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "ignite.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "ignite.md", "exec"), {"__name__": "__main__"})
    assert set(refs(tmp_path / "runs" / "a")) >= {"best_model.loss", "best_model.loss.top=3"}
