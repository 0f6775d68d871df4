"""The contract, and what only the handler of Ignite does."""

from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Average

from keepbest import load
from keepbest.errors import ConfigError, IterationError, MetricError, MissingMetricError
from keepbest.integrations.ignite import BestCheckpoint
from tests.integrations.contract import TrainerContract, assert_continues
from tests.integrations.faces.face import VALUES, failing, weights_of
from tests.integrations.faces.ignite import METRIC, Ignite, Resume, make_engines
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import ledger, refs

SLOW = [5.0, 4.6, 4.2, 3.9, 3.8, 3.75, 3.7, 0.0]  # improves, but often by less than 0.5
FACE = Ignite()


class TestContract(TrainerContract):
    face = FACE


def observed(directory):
    """Those of abandoned timelines too."""
    return [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]


def test_min_delta_equals_a_cumulative_early_stopping_threshold(tmp_path):
    FACE.train(tmp_path / "run", SLOW, save_every=None, tolerances=[0, 1, 2], min_delta=0.5)

    def stop_early(name, **stopper):
        return [FACE.stop_early(tmp_path / name / str(patience), SLOW, patience, stopper) for patience in (1, 2, 3)]

    stopped = stop_early("peer", threshold=0.5, cumulative=True)
    assert [epoch for epoch, *_ in stopped] == [2, 5, 6]
    found = FACE.kept(tmp_path / "run")
    assert [found[f".tolerance={tolerance}"][1] for tolerance in range(3)] == [value for _, value, _ in stopped]
    assert len({value for _, value, _ in stopped}) == 2
    # Without that, many small steps are no improvement, and the reference moves with them.
    assert [epoch for epoch, *_ in stop_early("other", threshold=0.5)] == [2, 3, 4]


def test_optimizer_of_the_best_can_be_loaded(tmp_path):
    engines, fresh = make_engines([3.0, 2.0]), make_engines([])
    engines.attach(tmp_path, training_state={"optimizer": engines.optimizer})
    engines.train(2)
    assert_continues(tmp_path, fresh.model, fresh.optimizer, like=engines.optimizer)


def fail_on_rank_0(directory):
    """Its own handler writes a checkpoint then, as Ignite's documentation shows."""
    engines = make_engines(VALUES, strategy="none", fails_at=3 if idist.get_rank() == 0 else None)
    resume = Resume(directory, engines, engines.attach(directory, async_save=True))
    engines.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _: resume.write(engines.trainer))
    engines.train(4)


def resume_from_failure(directory):
    engines = make_engines(VALUES, strategy="none")
    resume = Resume(directory, engines, engines.attach(directory))
    resume.load(resume.newest)
    # Ignite counts an update that it did not finish.
    engines.trainer.state.iteration, engines.trainer.state.epoch = 4, 2
    engines.train(4)


def test_checkpoint_of_a_rank_that_fails_waits_for_nobody(tmp_path):
    with start_ranks(fail_on_rank_0, 2, tmp_path) as ranks:
        outcomes = ranks.collect()
    assert type(outcomes[0].exception) is ZeroDivisionError
    run_ranks(resume_from_failure, 2, tmp_path)
    assert observed(tmp_path) == ["E1_U2", "E2_U4", "E3_U6", "E4_U8"]


def evaluate_within_epochs(directory):
    engines = make_engines(VALUES, evaluate_at=Events.ITERATION_COMPLETED(every=3) | Events.COMPLETED)
    engines.attach(directory)
    engines.train(6)
    engines.evaluator.run([None])  # after training, of some other data


def test_evaluation_at_the_end_is_not_observed_twice(tmp_path):
    run_ranks(evaluate_within_epochs, 2, tmp_path)
    assert observed(tmp_path) == ["E2_U3", "E3_U6", "E5_U9", "E6_U12"]


def test_run_resumed_within_an_epoch_observes_the_same(tmp_path):
    every_iteration = {"evaluate_at": Events.ITERATION_COMPLETED}
    for fails_at in (4, None):
        engines = make_engines(VALUES, fails_at=fails_at, **every_iteration)
        best = engines.attach(tmp_path / "parts")
        resume = Resume(tmp_path, engines, best)
        engines.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=5), resume.write)
        resume.load(resume.newest)
        with failing(fails_at):
            engines.train(5)
    whole = FACE.train(tmp_path / "whole", VALUES[:5], save_every=None, framework=every_iteration)
    assert best.keeper.state == whole.states[0]
    assert sorted(set(observed(tmp_path / "parts"))) == sorted(observed(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("events", "times"),
    [
        (Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED(every=4), ["E1_U2", "E2_U4", "E3_U6", "E4_U8"]),
        (Events.STARTED | Events.EPOCH_COMPLETED, ["E0_U0", "E1_U2", "E2_U4", "E3_U6", "E4_U8"]),
    ],
    ids=["coincide", "evaluated-at-the-start"],
)
@pytest.mark.parametrize("is_resumed", [False, True])
def test_evaluation_that_repeats_one_is_observed_once(events, times, is_resumed, tmp_path):
    data, values = [None], [*VALUES[:4], VALUES[-1]]  # before training it is the last of them
    engines = make_engines(values, evaluate_at=Events.TERMINATE)
    best = engines.attach(tmp_path / "run")
    engines.trainer.add_event_handler(events, lambda: engines.evaluator.run(data))
    engines.train(2)
    if is_resumed:
        state, trained = best.state_dict(), engines.trainer.state_dict()
        engines = make_engines(values, evaluate_at=Events.TERMINATE)
        best = engines.attach(tmp_path / "run")
        engines.trainer.add_event_handler(events, lambda: engines.evaluator.run(data))
        best.load_state_dict(state)
        engines.trainer.load_state_dict(trained)
    engines.train(4)
    assert observed(tmp_path / "run") == times
    assert best.keeper.best_metric_value == min(values[:4] if times[0] == "E1_U2" else values)


def test_two_evaluations_of_one_iteration_are_refused(tmp_path):
    engines = make_engines(VALUES)
    engines.attach(tmp_path)
    engines.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: engines.evaluator.run([None]))
    with pytest.raises(IterationError, match=r"at E1_U2 .* ran on other data before"):
        engines.train(2)


def add_evaluator(engines, *sets):
    """Each epoch it runs on all of these sets, the first of which has the values that a keeper observes elsewhere."""

    def look_up(_, batch):
        epoch = engines.trainer.state.epoch
        return VALUES[epoch - 1] if batch is sets[0][0] else float(epoch)

    evaluator = Engine(look_up)
    Average().attach(evaluator, METRIC)
    for data in sets:
        engines.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _, data=data: evaluator.run(data))
    return evaluator


@pytest.mark.parametrize("is_first", [True, False])
def test_one_of_two_sets_of_an_evaluator_is_observed(is_first, tmp_path):
    engines = make_engines(VALUES, evaluate_at=Events.STARTED)
    sets = [torch.tensor(0.0)], [torch.tensor(1.0)]
    best = BestCheckpoint(engines.model, METRIC, directory=tmp_path, tolerances=[1])
    best.attach(engines.trainer, add_evaluator(engines, *sets), data=sets[0 if is_first else 1])
    engines.train(8)
    values = VALUES if is_first else range(1, 9)
    assert FACE.observed(tmp_path) == [(f"E{step}_U{2 * step}", value) for step, value in enumerate(values, start=1)]
    assert FACE.kept(tmp_path)[""][:2] == (("E6_U12", 2.0) if is_first else ("E1_U2", 1.0))


def test_data_that_is_never_evaluated_is_warned_of_early(tmp_path, caplog):
    engines = make_engines(VALUES, evaluate_at=Events.STARTED)
    best = BestCheckpoint(engines.model, METRIC, directory=tmp_path)
    # Made anew for each run, as `evaluator.run(make_loader())` does.
    evaluator = add_evaluator(engines, [torch.tensor(0.0)], [torch.tensor(1.0)])
    best.attach(engines.trainer, evaluator, data=[torch.tensor(0.0)])
    engines.train(4)
    found = [record.getMessage() for record in caplog.records if record.name.startswith("keepbest")]
    assert len(found) == 2
    assert "at E2_U4 and before, the evaluator ran on other data alone than attach() was given" in found[0]
    assert "no best is kept, since nothing was observed: run the evaluator that was attached" in found[1]


def test_evaluator_beside_the_observed_one_is_left_alone(tmp_path):
    engines = make_engines([5.0, 4.0, 6.0])
    engines.attach(tmp_path)
    add_evaluator(engines, [torch.tensor(0.0)])
    engines.train(3)
    assert FACE.observed(tmp_path) == [("E1_U2", 5.0), ("E2_U4", 4.0), ("E3_U6", 6.0)]


def observe_score(directory):
    """Of the values, the largest but that of the first epoch is best."""
    engines = make_engines(VALUES)

    def score(evaluator):
        return evaluator.state.metrics[METRIC] - (9.0 if engines.trainer.state.epoch == 7 else 0.0)

    saver = DiskSaver(directory / "own", require_empty=False)
    own = Checkpoint({"model": engines.model}, saver, score_function=score, score_name="score", n_saved=1)
    engines.evaluator.add_event_handler(Events.COMPLETED, own)
    engines.attach(directory, metric_key="score", score_function=score, tolerances=[0])
    engines.train(8)
    return str(own.last_checkpoint)


def test_score_of_a_function_is_observed_as_ignite_takes_it(tmp_path):
    [path, _] = run_ranks(observe_score, 2, tmp_path)
    assert set(refs(tmp_path)) == {"best_model.score", "best_model.score.tolerance=0"}
    loaded = load(tmp_path, "best_model.score", model := FACE.model())
    assert (str(loaded.iteration), loaded.value) == ("E4_U8", 6.0)
    assert weights_of(model.state_dict()) == FACE.weights_of_checkpoint(tmp_path / "own" / path)


@pytest.mark.parametrize(
    ("value", "message"), [({"a": 1.0}, r"the metric 'loss' must be a number, got {'a': 1\.0}"), (None, "as None")]
)
def test_metric_that_is_no_number_is_refused_by_its_name(value, message, tmp_path):
    engines = make_engines(VALUES)
    engines.evaluator.add_event_handler(Events.COMPLETED, lambda engine: engine.state.metrics.update({METRIC: value}))
    engines.attach(tmp_path)
    with pytest.raises(MetricError, match=message):
        engines.train(1)


def test_score_with_the_name_of_a_loss_needs_a_direction(tmp_path):
    settings = {"directory": tmp_path, "score_function": lambda _: 1.0}
    with pytest.raises(ConfigError, match="but of 'loss' a lower one is, by its name"):
        BestCheckpoint(FACE.model(), "loss", **settings)
    assert BestCheckpoint(FACE.model(), "loss", higher_is_better=False, **settings).keeper is None
    with pytest.raises(ConfigError, match="score_function must be a function of the evaluator, found 'loss'"):
        BestCheckpoint(FACE.model(), "score", directory=tmp_path, score_function="loss")


def test_trainer_that_runs_more_epochs_continues_in_its_folder(tmp_path):
    engines = make_engines(VALUES)
    best = engines.attach(tmp_path / "parts", tolerances=[1, 5])
    engines.train(3)
    assert set(refs(tmp_path / "parts")) == {f"best_model.loss{end}" for end in ("", ".tolerance=1", ".tolerance=5")}
    engines.train(8)
    whole = FACE.train(tmp_path / "whole", VALUES, save_every=None, tolerances=[1, 5])
    assert best.keeper.state == whole.states[0]
    assert FACE.kept(tmp_path / "parts") == FACE.kept(tmp_path / "whole")


def test_trainer_that_starts_over_is_not_resumed_with_a_state(tmp_path):
    """Ignite trains anew where all epochs are done already."""
    engines = make_engines(VALUES)
    resume = Resume(tmp_path, engines, engines.attach(tmp_path))
    engines.trainer.add_event_handler(Events.EPOCH_COMPLETED, resume.write)
    engines.train(2)
    again = make_engines(VALUES)
    Resume(tmp_path, again, again.attach(tmp_path, resume="ledger")).load(resume.newest)
    weights = weights_of(again.model.state_dict())
    with pytest.raises(ConfigError, match="has observed E2_U4, but the trainer starts at iteration 0"):
        again.train(2)
    assert weights_of(again.model.state_dict()) == weights


def test_state_that_is_loaded_in_training_is_the_present_one(tmp_path):
    engines = make_engines([3.0, 2.0, 1.0])
    adapter, states = engines.attach(tmp_path), []

    @engines.trainer.on(Events.EPOCH_COMPLETED)
    def load_the_present_one():
        states.append(adapter.state_dict())
        adapter.load_state_dict(states[-1])

    engines.train(2)
    assert [state["state"]["last_iteration"] for state in states] == ["E1_U2", "E2_U4"]
    engines.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: adapter.load_state_dict(states[0]))
    with pytest.raises(
        ConfigError, match=r"runs already, so best_model.loss cannot go back.*load it before trainer.run"
    ):
        engines.train(3)


def test_evaluator_that_was_cut_off_has_no_new_value(tmp_path):
    """Its metrics are still those of its run before."""
    engines = make_engines(VALUES)
    engines.attach(tmp_path)
    engines.evaluator.add_event_handler(
        Events.ITERATION_STARTED, lambda _: engines.trainer.state.epoch == 2 and engines.evaluator.terminate()
    )
    with pytest.raises(MissingMetricError, match="terminated before it computed 'loss'"):
        engines.train(3)
    assert observed(tmp_path) == ["E1_U2"]


def make_engines_that_evaluate_two_batches():
    engines = make_engines(VALUES, evaluate_at=Events.EPOCH_COMPLETED(once=99))
    engines.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: engines.evaluator.run([None, None]))
    return engines


@pytest.mark.parametrize(
    ("skips_end", "which"),
    [(False, "'loss' of all data, and has the value of a part"), (True, "'loss', and has the value of other weights")],
)
def test_evaluation_of_a_part_of_the_data_is_not_observed(skips_end, which, tmp_path):
    engines = make_engines_that_evaluate_two_batches()
    engines.attach(tmp_path)

    def cut_off(evaluator):
        if engines.trainer.state.epoch == 2:
            evaluator.terminate_epoch(skip_epoch_completed=skips_end)

    engines.evaluator.add_event_handler(Events.ITERATION_COMPLETED, cut_off)
    with pytest.raises(MissingMetricError, match=f"terminated before it computed {which}"):
        engines.train(3)
    assert observed(tmp_path) == ["E1_U2"]


def test_epoch_of_an_evaluator_may_be_ended_when_it_is_over(tmp_path):
    engines = make_engines_that_evaluate_two_batches()
    engines.attach(tmp_path)
    engines.evaluator.add_event_handler(Events.ITERATION_COMPLETED(every=2), Engine.terminate_epoch)
    engines.train(2)
    assert observed(tmp_path) == ["E1_U2", "E2_U4"]


@pytest.mark.parametrize(("skip_completed", "expected"), [(False, ["", ".tolerance=5"]), (True, [""])])
def test_terminated_run_is_closed_unless_its_end_is_skipped(skip_completed, expected, tmp_path):
    engines = make_engines(VALUES)
    engines.attach(tmp_path, tolerances=[5])
    engines.trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=3), lambda: engines.trainer.terminate(skip_completed=skip_completed)
    )
    engines.train(8)
    assert sorted(refs(tmp_path)) == [f"best_model.loss{end}" for end in expected]
    FACE.train(tmp_path, VALUES[:1], save_every=None, tolerances=[5], resume="ledger")  # in the same process
    assert observed(tmp_path)[-1] == "E1_U2"


def test_exception_reaches_other_handlers_and_is_raised_again(tmp_path):
    engines, heard = make_engines(VALUES, fails_at=2), []
    engines.attach(tmp_path)
    engines.trainer.add_event_handler(Events.EXCEPTION_RAISED, heard.append)
    with failing(2):
        engines.train(3)
    assert {type(error) for error in heard} == {ZeroDivisionError}


def test_handler_is_attached_once(tmp_path):
    engines = make_engines(VALUES)
    best = engines.attach(tmp_path)
    with pytest.raises(ConfigError, match="attached already"):
        best.attach(engines.trainer, engines.evaluator)


def attach_late(directory, name, once):
    engines = make_engines(VALUES)
    engines.trainer.add_event_handler(Events[name](once=once), lambda: engines.attach(directory))
    with pytest.raises(
        ConfigError, match=r"attached while the trainer ran, .* before trainer\.run\(\), or in a handler"
    ):
        engines.train(3)


@pytest.mark.parametrize(("name", "once"), [("EPOCH_STARTED", 1), ("ITERATION_COMPLETED", 2), ("EPOCH_COMPLETED", 3)])
def test_attaching_to_a_trainer_that_runs_is_an_error(name, once, tmp_path):
    run_ranks(attach_late, 2, tmp_path, name, once)
    assert not (tmp_path / "checkpoints").exists()


def test_attaching_in_a_handler_of_the_start_observes_all(tmp_path):
    engines = make_engines(VALUES)
    engines.trainer.add_event_handler(Events.STARTED, lambda: engines.attach(tmp_path))
    engines.train(2)
    assert observed(tmp_path) == ["E1_U2", "E2_U4"]


def test_attaching_after_a_run_that_failed_observes_the_next(tmp_path):
    engines = make_engines(VALUES)
    engines.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engines.train(2)
    engines.attach(tmp_path)
    engines.train(4)  # Ignite ends the run that failed first
    engines.train(4)
    assert observed(tmp_path)[-1].startswith("E4_")


def test_attaching_at_the_end_of_a_run_observes_the_next(tmp_path):
    engines = make_engines(VALUES)
    engines.trainer.add_event_handler(Events.COMPLETED(once=1), lambda: engines.attach(tmp_path))
    engines.train(1)
    engines.train(3)
    assert observed(tmp_path) == ["E2_U4", "E3_U6"]


def test_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "ignite.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "ignite.md", "exec"), {"__name__": "__main__"})
    assert set(refs(tmp_path / "runs" / "a")) >= {"best_model.loss", "best_model.loss.top=3"}
