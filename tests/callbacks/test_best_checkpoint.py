from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from pydantic import ValidationError

from keepbest.callbacks import (
    BestCheckpointCallback,
    BestCheckpointCallbackConfig,
    CallBackBaseConfig,
    OfflineLossCallback,
    PeriodicCallback,
    PeriodicDataIteratorCallback,
    PeriodicDataIteratorCallbackConfig,
    assemble_callbacks,
)
from keepbest.errors import ConfigError, MissingMetricError
from tests.callbacks.context import Regression, StandInTrainer, make_context, make_counter, make_samples
from tests.callbacks.test_offline_loss import one_by_one
from tests.kit.pool import run_ranks
from tests.kit.runs import ledger, refs
from tests.kit.toys import make_trainer

KEY = "loss/val/total"
REF = "best_model.loss.val.total"
PREFIX = "best=loss.val.total/"


@pytest.mark.parametrize(
    ("interval", "first"),
    [({"every_n_epochs": 4}, 8), ({"every_n_updates": 7}, 7), ({"every_n_samples": 145, "batch_size": 4}, 7)],
)
def test_interval_that_ends_after_training_is_refused(interval, first, tmp_path):
    callbacks = [{"name": "OfflineLossCallback", "dataset_key": "val", **interval}]
    callbacks.append({"name": "BestCheckpointCallback", "metric_key": KEY, **interval})
    with pytest.raises(ConfigError, match=rf"after {first - 1} updates.* no best could be kept"):
        make_trainer(tmp_path, callbacks=callbacks, updates=first - 1).train()
    make_trainer(tmp_path, callbacks=callbacks, updates=first).train()
    assert refs(tmp_path) == {REF: f"E{first // 2}_U{first}_S{24 * first}"}


class RecorderConfig(CallBackBaseConfig):
    name: Literal["RecorderOfHooks"] = "RecorderOfHooks"


class Recorder(PeriodicCallback):
    """A child that evaluates no dataset: it notes when it is called, and logs that."""

    config_class = RecorderConfig

    def __init__(self, callback_config, **kwargs):
        super().__init__(callback_config, **kwargs)
        self.calls = []

    def before_training(self, *, update_counter, **kwargs):
        self.calls.append(("before_training", update_counter.update))

    def after_training(self, *, update_counter, **kwargs):
        self.calls.append(("after_training", update_counter.update))

    def periodic_callback(self, *, interval_type, update_counter, batch_size, **kwargs):
        self.calls.append((interval_type, update_counter.update, batch_size))
        self.log_writer.add_scalar("called", len(self.calls))

    def state_dict(self):
        return {"calls": list(self.calls)}

    def load_state_dict(self, state):
        self.calls = list(state["calls"])


class ModeConfig(PeriodicDataIteratorCallbackConfig):
    name: Literal["ModeOfEvaluation"] = "ModeOfEvaluation"


class Mode(PeriodicDataIteratorCallback):
    """A child that evaluates a dataset: it notes the batches it gets, and in which mode the model is."""

    config_class = ModeConfig

    def process_data(self, batch):
        self.seen = [*getattr(self, "seen", []), (len(batch["y"]), self.model.training, torch.is_grad_enabled())]
        return batch["y"]

    def process_results(self, results, *, interval_type, update_counter):
        self.results = results


# The kind that is read from YAML is imported by its dotted path.
RECORDER = {"kind": f"{__name__}.Recorder", "every_n_epochs": 77}


class Session:
    """A callback, and training around it as far as it can see."""

    def __init__(self, directory, *, datasets=None, resume=None, update=0, **settings):
        self.counter = make_counter()
        for _ in range(update):
            self.counter.next_update()
        self.context = make_context(datasets, update_counter=self.counter)
        self.context |= {"directory": Path(directory), "trainer": StandInTrainer(resume)}
        config = {"every_n_updates": 1, "metric_key": KEY} | settings
        self.callback = BestCheckpointCallback(BestCheckpointCallbackConfig(**config), **self.context)

    def go(self, *values):
        for value in values:
            self.counter.next_update()
            if value is not None:
                self.context["log_writer"].add_scalar(KEY, value)
            self.callback.after_update(update_counter=self.counter, batch_size=4, data_iter=iter(()))
            self.logged = {key: scalar.value for key, scalar in self.context["log_writer"].log_cache.items()}
            self.context["log_writer"].flush()

    def train(self, *values):
        self.callback.before_training(update_counter=self.counter)
        self.go(*values)
        self.callback.after_training(update_counter=self.counter)
        self.logged = {key: scalar.value for key, scalar in self.context["log_writer"].log_cache.items()}


def test_attributes_have_the_names_and_meaning_of_the_seed(tmp_path):
    session = Session(tmp_path, tolerances=[5, 0, 1])
    callback = session.callback
    assert (callback.metric_key, callback.model_names, callback.save_frozen_weights) == (KEY, None, True)
    assert (callback.higher_is_better, callback.eval_callbacks) == (False, [])
    assert (callback.best_metric_value, callback.tolerance_counter) == (math.inf, 0)
    assert callback.tolerances_is_exceeded == {0: False, 1: False, 5: False}
    assert callback.metric_at_exceeded_tolerance == {}
    session.train(3.0, 2.0, 2.0, 2.5, 1.0, 1.5)
    assert (callback.best_metric_value, callback.tolerance_counter) == (1.0, 1)
    assert callback.tolerances_is_exceeded == {0: True, 1: True, 5: False}
    assert callback.metric_at_exceeded_tolerance == {0: 2.0, 1: 2.0}
    assert session.logged == {
        f"best_model/{KEY}": 1.0, f"best_model/{KEY}/tolerance=0": 2.0, f"best_model/{KEY}/tolerance=1": 2.0,
        f"best_model/{KEY}/tolerance=5": 1.0,
    }  # fmt: skip
    assert refs(tmp_path) == {
        REF: "E2_U5_S60", f"{REF}.tolerance=0": "E1_U2_S24", f"{REF}.tolerance=1": "E1_U2_S24",
        f"{REF}.tolerance=5": "E2_U5_S60",
    }  # fmt: skip


def test_higher_is_better_starts_at_the_other_infinity(tmp_path):
    assert Session(tmp_path, metric_key="accuracy/val").callback.best_metric_value == -math.inf
    assert Session(tmp_path, metric_key="speed", higher_is_better=True).callback.higher_is_better
    with pytest.raises(ConfigError, match="set higher_is_better"):
        Session(tmp_path, metric_key="speed")


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_epochs": 1},
        {"metric": KEY},
        {"metric_key": None},
        {"tolerances": [-1]},
        {"tolerances": [1, 1]},
        {"tolerances": [0.5]},
        {"min_delta": -1.0},
        {"metric_reduction": "median"},
        {"name": "BestCheckpoint"},
        {"model_names": ["encoder"]},
        {"model_names": []},
        {"eval_callbacks": [{"name": "OfflineLossCallback", "dataset_key": "test"}]},
        {"eval_callbacks": [{"name": "Unknown"}]},
        {"eval_callbacks": [{"kind": f"{__name__}.Recorder", "every_n_epochs": 1}] * 2},
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings, tmp_path):
    with pytest.raises((ValidationError, ConfigError)):
        Session(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


EXAMPLE = """
callbacks:
  - kind: keepbest.callbacks.OfflineLossCallback
    every_n_epochs: 1
    dataset_key: val
  - kind: keepbest.callbacks.BestCheckpointCallback
    name: BestCheckpointCallback
    every_n_epochs: 1
    metric_key: loss/val/total
    model_names:
      - encoder
    eval_callbacks:
      - kind: keepbest.callbacks.OfflineLossCallback
        every_n_epochs: 1
        dataset_key: train
"""


def train_the_example(directory):
    trainer = make_trainer(directory, tracker="jsonl", **yaml.safe_load(EXAMPLE))
    trainer.train()
    return trainer.callbacks[1].best_metric_value


@pytest.mark.parametrize("world_size", [1, 2])
def test_example_of_the_seed_runs_with_our_names(world_size, tmp_path):
    if world_size == 1:
        best = train_the_example(tmp_path)
    else:
        best, other = run_ranks(train_the_example_on_ranks, world_size, tmp_path)
        assert best == other
    folder = tmp_path / "checkpoints" / REF
    assert {path.name for path in folder.iterdir()} == {"encoder.pt", "snapshot.json"}
    assert json.loads((folder / "snapshot.json").read_text())["value"] == best
    [log] = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    keys = {key for record in records for key in record.get("scalars", record)}
    assert {f"{PREFIX}loss/train/total", f"{PREFIX}loss/train/error", KEY, f"best_model/{KEY}"} <= keys


def train_the_example_on_ranks(directory):
    trainer = make_trainer(directory, tracker="jsonl", strategy="ddp", **yaml.safe_load(EXAMPLE))
    trainer.train()
    return trainer.callbacks[1].best_metric_value


def test_children_run_on_new_bests_and_on_no_schedule(tmp_path):
    children = [RECORDER, {"name": "ModeOfEvaluation", "dataset_key": "val", "every_n_epochs": 9, "batch_size": 3}]
    session = Session(tmp_path, tolerances=[0], eval_callbacks=children)
    recorder, mode = session.callback.eval_callbacks
    assert session.callback.get_children() == [recorder]
    session.context["model"].train()
    session.callback.before_training(update_counter=session.counter)
    session.go(3.0)
    assert session.logged == {KEY: 3.0, f"best/{KEY}": 3.0, f"{PREFIX}called": 2.0}
    session.go(math.nan, 2.0, 2.0)
    assert session.logged == {KEY: 2.0}
    session.callback.after_training(update_counter=session.counter)
    assert recorder.calls == [("before_training", 0), ("eval", 1, 4), ("eval", 3, 4), ("after_training", 4)]
    assert mode.seen == [(3, False, False), (1, False, False)] * 2
    assert mode.results.tolist() == [sample["y"].item() for sample in make_samples(4)]
    assert session.context["model"].training


def test_iterator_child_takes_its_own_batches_of_the_hooks_size(tmp_path):
    session = Session(
        tmp_path, eval_callbacks=[{"name": "ModeOfEvaluation", "dataset_key": "val", "every_n_epochs": 1}]
    )
    session.callback.before_training(update_counter=session.counter)
    session.counter.next_update()
    session.context["log_writer"].add_scalar(KEY, 1.0)
    batches = iter(["batch of training"])
    session.callback.after_update(update_counter=session.counter, batch_size=2, data_iter=batches)
    assert session.callback.eval_callbacks[0].seen == [(2, False, False)] * 2
    assert list(batches) == ["batch of training"]


def test_evaluation_runs_the_children_and_keeps_nothing(tmp_path):
    session = Session(tmp_path / "run", tolerances=[0], eval_callbacks=[RECORDER])
    for _ in range(2):
        session.callback.at_eval(update_counter=session.counter, batch_size=5)
    assert session.callback.eval_callbacks[0].calls == [("eval", 0, 5)] * 2
    assert (session.callback.best_metric_value, session.callback.tolerance_counter) == (math.inf, 0)
    assert not (tmp_path / "run").exists()


def evaluate_on_new_best(directory, lengths):
    datasets = {"val": make_samples(4), **{f"set{length}": make_samples(length) for length in lengths}}
    children = [
        {"name": "OfflineLossCallback", "dataset_key": f"set{length}", "every_n_epochs": 1, "batch_size": 2}
        for length in lengths
    ]
    session = Session(directory, datasets=datasets, eval_callbacks=children)
    session.callback.before_training(update_counter=session.counter)
    session.go(1.0)
    assert isinstance(session.callback.eval_callbacks[0], OfflineLossCallback)
    return {key: value for key, value in session.logged.items() if key.startswith(PREFIX)}


def test_metrics_of_children_are_the_same_on_any_number_of_ranks(tmp_path):
    lengths = (2, 10, 11)
    expected = {
        f"{PREFIX}{key.replace('val', f'set{length}')}": value
        for length in lengths
        for key, value in one_by_one(length).items()
    }
    found = [run_ranks(evaluate_on_new_best, size, tmp_path / str(size), lengths) for size in (1, 2, 3)]
    for by_rank in found:
        assert by_rank == [by_rank[0]] * len(by_rank)
        assert by_rank[0] == pytest.approx(expected, abs=1e-12, rel=0)
        assert by_rank[0].keys() == expected.keys()


def lack_the_key(directory, logs_on):
    session = Session(directory)
    session.callback.before_training(update_counter=session.counter)
    session.go(1.0)
    with pytest.raises(KeyError) as caught:
        session.go(0.5 if session.context["ranks"].rank in logs_on else None)
    assert type(caught.value) is MissingMetricError
    return str(caught.value)


@pytest.mark.parametrize(("logs_on", "lacking"), [([0], "1 of 2 ranks:\n  rank 1"), ([], "2 of 2 ranks:\n  rank 0")])
def test_metric_that_was_not_logged_is_a_key_error_on_every_rank(logs_on, lacking, tmp_path):
    outcomes = run_ranks(lack_the_key, 2, tmp_path, logs_on)
    assert outcomes == [outcomes[0]] * 2
    assert f"the monitored metric '{KEY}' is missing on {lacking}" in outcomes[0]


def go_on_from_nothing(directory, tolerances):
    session = Session(directory, resume="auto", update=3, tolerances=tolerances)
    try:
        session.callback.before_training(update_counter=session.counter)
    except NotImplementedError as error:
        return str(error)
    session.go(1.0)
    return session.callback.tolerance_counter


def test_tolerances_without_a_past_are_refused_on_every_rank(tmp_path):
    outcomes = run_ranks(go_on_from_nothing, 2, tmp_path / "a", [2])
    assert outcomes == [outcomes[0]] * 2
    assert outcomes[0].startswith("cannot resume at E1_U3_S36 with tolerances: there is neither a saved state")
    assert run_ranks(go_on_from_nothing, 2, tmp_path / "b", None) == [0, 0]


@pytest.mark.parametrize("knows_by", ["state", "ledger"])
def test_resumed_callback_ends_like_the_uninterrupted_one(knows_by, tmp_path):
    values = [3.0, 2.0, 2.5, 2.5, 1.0, 1.5]
    whole = Session(tmp_path / "whole", tolerances=[0, 1, 4], eval_callbacks=[RECORDER])
    whole.train(*values)
    for interruption in range(1, 6):
        folder = tmp_path / str(interruption)
        first = Session(folder, tolerances=[0, 1, 4], eval_callbacks=[RECORDER])
        first.callback.before_training(update_counter=first.counter)
        first.go(*values[:interruption])
        first.callback.keeper.flush(pin="latest")
        state = first.callback.state_dict()
        first.go(0.5)  # what a crash makes undone
        first.callback.keeper.abandon()
        second = Session(folder, tolerances=[0, 1, 4], eval_callbacks=[RECORDER], resume="auto", update=interruption)
        if knows_by == "state":
            before = json.dumps(state)
            second.callback.load_state_dict(state)
            assert json.dumps(state) == before
            assert second.callback.eval_callbacks[0].calls[0] == ("before_training", 0)
        second.train(*values[interruption:])
        assert second.callback.keeper.state == whole.callback.keeper.state
        assert second.callback.metric_at_exceeded_tolerance == whole.callback.metric_at_exceeded_tolerance
        assert second.logged == whole.logged
        assert ledger(folder)[0]["run"] == state["keeper"]["run_id"]


def test_two_on_the_same_metric_need_ids(tmp_path):
    context = {**make_context(), "directory": tmp_path, "trainer": StandInTrainer()}
    config = {"name": "BestCheckpointCallback", "every_n_updates": 1, "metric_key": KEY}
    with pytest.raises(ConfigError, match="cannot be distinguished"):
        assemble_callbacks([config, config], **context)
    with pytest.raises(ConfigError, match="cannot be distinguished"):
        assemble_callbacks([{**config, "id": "a"}, {**config, "id": "A"}], **context)
    first, second = assemble_callbacks([config, {**config, "id": "b"}], **context)
    for callback in (first, second):
        callback.before_training(update_counter=make_counter())
    assert {first.keeper.name, second.keeper.name} == {REF, f"{REF}.id=b"}


def test_model_is_saved_as_it_is_trained(tmp_path):
    session = Session(tmp_path)
    session.train(1.0)
    saved = torch.load(tmp_path / "checkpoints" / REF / "model.pt", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in Regression().state_dict().items())
