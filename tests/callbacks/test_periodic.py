from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepbest.callbacks import CallBackBaseConfig, PeriodicCallback
from tests.callbacks.context import make_context, make_counter


class Recorder(PeriodicCallback):
    config_class = CallBackBaseConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def periodic_callback(self, *, interval_type, update_counter, batch_size, data_iter=None, **kwargs):
        self.calls.append((interval_type, update_counter.update, batch_size, data_iter, kwargs))


def drive(callback, updates, **counter_settings):
    """Calls the hooks as a trainer does."""
    counter = make_counter(**counter_settings)
    callback.before_training(update_counter=counter)
    for _ in range(updates):
        counter.next_update()
        arguments = {"update_counter": counter, "batch_size": 4, "data_iter": "shared", "more": 1}
        callback.track_after_accumulation_step(
            update_counter=counter, batch={}, losses={}, batch_size=4, accumulation_step=0
        )
        callback.track_after_update_step(update_counter=counter, losses={}, batch_size=4)
        callback.after_update(**arguments)
        if counter.is_full_epoch:
            callback.after_epoch(**arguments)
    callback.after_training(update_counter=counter)


@given(n=st.integers(1, 7), updates_per_epoch=st.integers(1, 5), effective_batch_size=st.integers(1, 9))
def test_called_once_at_each_interval(n, updates_per_epoch, effective_batch_size):
    expected = {
        "epoch": [update for update in range(1, 31) if update % (n * updates_per_epoch) == 0],
        "update": [update for update in range(1, 31) if update % n == 0],
        "sample": sorted({-(-sample // effective_batch_size) for sample in range(n, 30 * effective_batch_size + 1, n)}),
    }
    for kind, updates in expected.items():
        callback = Recorder(CallBackBaseConfig(**{f"every_n_{kind}s": n}, batch_size=2), **make_context())
        drive(callback, 30, updates_per_epoch=updates_per_epoch, effective_batch_size=effective_batch_size)
        assert callback.calls == [(kind, update, 4, "shared", {"more": 1}) for update in updates]


def test_evaluation_does_not_wait_for_the_interval():
    callback = Recorder(CallBackBaseConfig(every_n_epochs=7), **make_context())
    callback.at_eval(update_counter=make_counter(), batch_size=3)
    assert callback.calls == [("eval", 0, 3, None, {})]


def test_state_keys_tell_intervals_apart():
    keys = {
        Recorder(config, **make_context()).state_key
        for config in (CallBackBaseConfig(every_n_epochs=1), CallBackBaseConfig(every_n_updates=1))
    }
    assert keys == {"Recorder/every_n_epochs=1", "Recorder/every_n_updates=1"}
