"""A run with everything: evaluation, best checkpoints and resume checkpoints, stopped and resumed on other ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from keepbest import load
from keepbest.callbacks import BestCheckpointCallback
from tests.kit import toys
from tests.kit.pool import run_ranks

CALLBACKS = [
    {"name": "CheckpointCallback", "every_n_updates": 2},
    {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1},
    {
        "name": "BestCheckpointCallback",
        "metric_key": "loss/val/total",
        "every_n_updates": 1,
        "tolerances": [0, 2],
        "eval_callbacks": [{"name": "OfflineLossCallback", "dataset_key": "train", "every_n_epochs": 1}],
    },
]
# Learns too fast, so that the loss goes up and down: tolerance 0 is exceeded before the best, tolerance 2 after it.
OPTIMIZERS = dict.fromkeys(("encoder", "decoder"), partial(torch.optim.SGD, lr=0.8, momentum=0.9))
UPDATES = 10


def run(directory: Path, strategy: str, resume: str | None, updates: int) -> dict[str, Any]:
    trainer = toys.make_trainer(
        directory,
        callbacks=CALLBACKS,
        optimizers=OPTIMIZERS,
        strategy=strategy,
        resume=resume,
        updates=updates,
        tracker="jsonl",
    )
    trainer.train()
    [best] = [callback for callback in trainer.callbacks if isinstance(callback, BestCheckpointCallback)]
    return {
        "best": best.best_metric_value,
        "counter": best.tolerance_counter,
        "exceeded": best.tolerances_is_exceeded,
        "at_exceeded": best.metric_at_exceeded_tolerance,
    }


def losses_by_hand() -> list[float]:
    data = toys.Waves(17, phase=0.5).values.double()
    losses = []
    for update in range(1, UPDATES + 1):
        model = toys.auto_encoder().double()
        model.load_state_dict(toys.weights_by_hand(update, OPTIMIZERS))
        with torch.no_grad():
            losses.append(model.losses(model(data), data)["total"].mean().item())
    return losses


@pytest.mark.parametrize(
    ("strategy", "world_size", "other_strategy", "other_world_size", "stop"),
    [("ddp", 2, "ddp", 2, 4), ("fsdp2", 2, "fsdp1", 3, 5), ("fsdp1", 2, "ddp", 1, 7)],
)
def test_stopped_and_resumed_run_keeps_the_best(strategy, world_size, other_strategy, other_world_size, stop, tmp_path):
    run_ranks(run, world_size, tmp_path, strategy, None, stop)
    results = run_ranks(run, other_world_size, tmp_path, other_strategy, "auto", UPDATES)

    losses = losses_by_hand()
    best, counter, at_exceeded = float("inf"), 0, {}
    for loss in losses:
        best, counter = (loss, 0) if loss < best else (best, counter + 1)
        for tolerance in (0, 2):
            if counter > tolerance:
                at_exceeded.setdefault(tolerance, best)
    assert 0 < losses.index(best) < UPDATES - 1, "the best must not be the first or the last for this to show anything"
    for result in results:
        assert result["best"] == pytest.approx(best, rel=1e-9)
        assert result["counter"] == counter
        assert result["exceeded"] == {tolerance: tolerance in at_exceeded for tolerance in (0, 2)}
        assert result["at_exceeded"] == pytest.approx(at_exceeded, rel=1e-9)

    loaded = toys.auto_encoder(seed=99).double()
    load(tmp_path, "best_model.loss.val.total", loaded)
    expected = toys.weights_by_hand(losses.index(best) + 1, OPTIMIZERS)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    assert "best=loss.val.total/loss/train/total" in (tmp_path / "metrics.jsonl").read_text()
