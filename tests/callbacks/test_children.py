"""What a `BestCheckpointCallback` passes on to its children, and where they log."""

from __future__ import annotations

from typing import Literal

from keepbest.callbacks import CallBackBaseConfig, PeriodicCallback, assemble_callbacks
from tests.callbacks.context import StandInTrainer, make_context, make_counter, make_samples
from tests.callbacks.test_best_checkpoint import KEY, Session


class HeardConfig(CallBackBaseConfig):
    name: Literal["HeardHooks"] = "HeardHooks"


class Heard(PeriodicCallback):
    """A child that notes each hook with its arguments, apart from the counter."""

    config_class = HeardConfig

    def __init__(self, callback_config, **kwargs):
        super().__init__(callback_config, **kwargs)
        self.heard = []

    def _note(self, hook, arguments):
        self.heard.append((hook, {name: value for name, value in arguments.items() if name != "update_counter"}))

    def before_training(self, **kwargs):
        self._note("before_training", kwargs)

    def periodic_callback(self, **kwargs):
        self._note("periodic_callback", kwargs)

    def before_preemption(self, **kwargs):
        self._note("before_preemption", kwargs)

    def after_exception(self, **kwargs):
        self._note("after_exception", kwargs)

    def before_checkpoint(self, **kwargs):
        self._note("before_checkpoint", kwargs)

    def after_training(self, **kwargs):
        self._note("after_training", kwargs)


def test_children_get_every_hook_with_its_arguments(tmp_path):
    session = Session(tmp_path, eval_callbacks=[{"kind": f"{__name__}.Heard", "every_n_epochs": 9}])
    callback, counter, error = session.callback, session.counter, ValueError("of the user")
    callback.before_training(update_counter=counter, own=1)
    session.counter.next_update()
    session.context["log_writer"].add_scalar(KEY, 1.0)
    callback.after_update(update_counter=counter, batch_size=4, data_iter=iter(()), own=2)
    callback.before_checkpoint(name="E1")
    callback.before_preemption(update_counter=counter, batch_size=4)
    callback.after_exception(update_counter=counter, error=error, is_between_updates=True)
    callback.after_training(update_counter=counter, own=3)
    [child] = callback.eval_callbacks
    assert child.heard == [
        ("before_training", {"own": 1}),
        ("periodic_callback", {"interval_type": "eval", "batch_size": 4, "data_iter": None, "own": 2}),
        ("before_checkpoint", {"name": "E1"}),
        ("before_preemption", {"batch_size": 4}),
        ("after_exception", {"error": error, "is_between_updates": True}),
        ("after_training", {"own": 3}),
    ]


def test_children_of_callbacks_with_ids_log_apart(tmp_path):
    counter = make_counter()
    context = make_context({"val": make_samples(4)}, update_counter=counter)
    context |= {"directory": tmp_path, "trainer": StandInTrainer()}
    child = {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1}
    config = {"name": "BestCheckpointCallback", "every_n_updates": 1, "metric_key": KEY, "eval_callbacks": [child]}
    callbacks = assemble_callbacks([config, {**config, "id": "calm", "min_delta": 0.5}], **context)
    counter.next_update()
    context["log_writer"].add_scalar(KEY, 1.0)
    for callback in callbacks:
        callback.before_training(update_counter=counter)
        callback.after_update(update_counter=counter, batch_size=4)
        callback.after_training(update_counter=counter)
    keys = {key for key in context["log_writer"].log_cache if key.endswith("loss/val/total")}
    assert keys >= {"best=loss.val.total/loss/val/total", "best=loss.val.total/id=calm/loss/val/total"}


def test_state_goes_by_the_name_that_torch_gives_it(tmp_path):
    first = Session(tmp_path)
    first.train(2.0, 3.0)
    second = Session(tmp_path, update=2)
    second.callback.load_state_dict(state_dict=first.callback.state_dict())
    second.callback.before_training(update_counter=second.counter)
    assert (second.callback.best_metric_value, second.callback.tolerance_counter) == (2.0, 1)
