"""What TensorBoard itself shows of a run: its own reader is the judge."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from tests.kit import toys
from tests.kit.pool import run_ranks

KEY = "loss/val"
TOLERANCES = [0, 1, 2, 9]
LEFT = [5.0, 3.0, 4.0, 6.0, 2.0, 1.0, 3.0]  # falls below the other after the fourth
TAKEN = [5.0, 3.0, 4.0, 6.0, 3.5, 3.25, 2.5, 7.0, math.nan, 2.0]
CHECKPOINT = 4


class ScriptedConfig(CallBackBaseConfig):
    name: Literal["Scripted"] = "Scripted"
    values: list[float]


class Scripted(CallbackBase):
    """Logs a given value at every update; the ranks log values around it, of which it is the mean."""

    config_class: ClassVar[type[ScriptedConfig]] = ScriptedConfig

    def after_update(self, *, update_counter: Any, **_kwargs: Any) -> None:
        offset = [-8.0, 8.0][self.ranks.rank]
        self.log_writer.add_scalar(KEY, self.callback_config.values[update_counter.update - 1] + offset)


def train(directory, values, resume, updates):
    best = {"name": "BestCheckpointCallback", "metric_key": KEY, "every_n_updates": 1}
    trainer = toys.make_trainer(
        directory,
        strategy="ddp",
        updates=updates,
        tracker="tensorboard",
        resume=resume,
        callbacks=[
            {"kind": f"{__name__}.Scripted", "values": values, "every_n_updates": 1},
            {**best, "tolerances": TOLERANCES},
            {**best, "id": "steep", "min_delta": 1.5},
            {"name": "CheckpointCallback", "every_n_updates": CHECKPOINT, "keep_last": None},
        ],
    )
    trainer.train()


def marks_by_hand(values, tolerances, min_delta=0.0):
    """{what comes after the key: [(update, value)]}."""
    best, drought, closed, marks = math.inf, 0, set(), {}
    for update, value in enumerate(values, start=1):
        if best - value > min_delta:
            best, drought = value, 0
            marks.setdefault("", []).append((update, value))
        else:
            drought += 1
        for tolerance in tolerances:
            if drought > tolerance and tolerance not in closed:
                closed.add(tolerance)
                marks[f"/tolerance={tolerance}"] = [(update, best)]
    return marks


def scalars(directory):
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {key: [(each.step, each.value) for each in events.Scalars(key)] for key in events.Tags()["scalars"]}


def test_bests_and_closed_tolerances_are_marked_after_a_resume(tmp_path):
    run_ranks(train, 2, tmp_path, LEFT, None, len(LEFT))
    found = scalars(tmp_path)
    assert found[f"best/{KEY}"] == [(1, 5.0), (2, 3.0), (5, 2.0), (6, 1.0)]
    # From the checkpoint of update 4, not from the one at the end.
    run_ranks(train, 2, tmp_path, TAKEN, tmp_path / "checkpoints" / "resume.E2_U4_S96", len(TAKEN))
    found = scalars(tmp_path)
    expected = {f"best/{KEY}{end}": marks for end, marks in marks_by_hand(TAKEN, TOLERANCES).items()}
    steep = marks_by_hand(TAKEN, [], min_delta=1.5)
    assert len(expected) == len(TOLERANCES)  # one of them is never exceeded
    assert {key: marks for key, marks in found.items() if key.startswith("best/")} == {
        **expected,
        f"best/{KEY}/id=steep": steep[""],
    }
    assert [step for step, _ in found[KEY]] == list(range(1, len(TAKEN) + 1))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # rank 0's, one for each start
