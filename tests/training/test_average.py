"""The averaged weights are those of a loop by hand, with torch's own `AveragedModel`, bit for bit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keepbest import load
from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.errors import ConfigError
from keepbest.models import Model
from keepbest.training.config import TrainerConfig
from tests.kit import cli_runs as runs
from tests.kit import toys
from tests.kit.pool import run_ranks
from tests.kit.runs import refs

DECAY = 0.4
UPDATES = 12
TOLERANCES = (0, 1, 9)
METRIC = "loss/val/total"
# Learns too fast, so that the loss goes up and down.
FAST = partial(torch.optim.SGD, lr=0.5, momentum=0.95)
CALLBACKS = [
    {"name": "CheckpointCallback", "every_n_updates": 5},
    {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1},
    {"name": "BestCheckpointCallback", "metric_key": METRIC, "every_n_updates": 1, "tolerances": list(TOLERANCES)},
]


class Normalizing(toys.AutoEncoder):
    """Has buffers: averages, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder[1] = nn.BatchNorm1d(7)


class Single(Model):
    """Has no submodels of its own, and so only one unit of FSDP."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.AutoEncoder()

    def forward(self, batch):
        code = self.inner.encoder(batch)
        return {"code": code, "output": self.inner.decoder(code)}

    def losses(self, outputs, batch):
        return self.inner.losses(outputs, batch)


def build(kind):
    torch.manual_seed(3)
    return kind().double()


def train(directory, kind, strategy, updates=UPDATES, resume=None, **settings):
    """The averaged weights, whole, when training has ended."""
    trainer = toys.make_trainer(
        directory,
        model=build(kind).float(),
        optimizers=FAST,
        callbacks=CALLBACKS,
        strategy=strategy,
        updates=updates,
        resume=resume,
        **{"ema_decay": DECAY, **settings},
    )
    trainer.train()
    options = StateDictOptions(full_state_dict=True)
    return None if trainer.average is None else get_model_state_dict(trainer.average.model, options=options)


def train_by_hand(kind, world_size):
    """After each update: the averaged weights, and their loss on the validation set. In one process, without keepbest.

    As on the ranks, each has its part of a batch, and gradients are the mean of theirs; buffers are rank 0's.
    """
    model = build(kind)
    optimizer = FAST(model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    data, validation = toys.Waves().values.double(), toys.Waves(17, phase=0.5).values.double()
    size, history = toys.EFFECTIVE_BATCH_SIZE, []
    for update in range(UPDATES):
        epoch, place = divmod(update, toys.SAMPLES // size)
        order = torch.randperm(toys.SAMPLES, generator=torch.Generator().manual_seed(11 + epoch))
        batch = data[order[place * size : (place + 1) * size]]
        buffers = [buffer.clone() for buffer in model.buffers()]
        for rank in reversed(range(world_size)):
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            part = batch[rank::world_size].contiguous()
            model.losses(model(part), part)["total"].mean().backward()
        for parameter in model.parameters():
            parameter.grad /= world_size
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        weights = {name: value.clone() for name, value in averaged.module.state_dict().items()}
        averaged.module.eval()
        with torch.no_grad():
            loss = averaged.module.losses(averaged.module(validation), validation)["total"].mean().item()
        history.append((weights, loss))
    return history


def bests_by_hand(losses):
    """{ref: update} that are to be kept."""
    best, drought, kept = None, 0, {}
    for update, loss in enumerate(losses):
        best, drought = (update, 0) if best is None or loss < losses[best] else (best, drought + 1)
        for tolerance in TOLERANCES:
            if drought > tolerance:
                kept.setdefault(tolerance, best)
    name = f"best_model.{METRIC.replace('/', '.')}"
    return {name: best, **{f"{name}.tolerance={tolerance}": kept.get(tolerance, best) for tolerance in TOLERANCES}}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def assert_keeps_what_was_trained_by_hand(directory, kind, world_size, finals):
    history = train_by_hand(kind, world_size)
    expected = bests_by_hand([loss for _, loss in history])
    assert {0, UPDATES - 1}.isdisjoint(expected.values()), "the best must not be the first or the last"
    assert len(set(expected.values())) == 2, "a tolerance must have kept another than the best"
    assert refs(directory).keys() == expected.keys()
    for ref, update in expected.items():
        model = build(kind)
        loaded = load(directory, ref, model)
        assert (loaded.iteration.update, loaded.value) == (update + 1, pytest.approx(history[update][1], rel=1e-12))
        assert_equal(model.state_dict(), history[update][0])
    for final in finals:
        assert_equal(final, history[-1][0])


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (Normalizing, "single"),
        (Normalizing, "ddp"),
        *[(kind, f"fsdp{n}") for kind in (toys.AutoEncoder, Single) for n in (1, 2)],
    ],
)
def test_best_is_evaluated_and_kept_of_the_average(kind, strategy, tmp_path):
    world_size = 1 if strategy == "single" else 2
    finals = run_ranks(train, world_size, tmp_path, kind, strategy, init=world_size > 1)
    assert_keeps_what_was_trained_by_hand(tmp_path, kind, world_size, finals[:1])


@pytest.mark.parametrize("strategies", [("ddp", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "fsdp1"), ("fsdp1", "ddp")])
def test_resumed_run_keeps_what_one_that_was_never_stopped_does(strategies, tmp_path):
    run_ranks(train, 2, tmp_path, toys.AutoEncoder, strategies[0], 7)
    finals = run_ranks(train, 2, tmp_path, toys.AutoEncoder, strategies[1], UPDATES, "auto")
    assert_keeps_what_was_trained_by_hand(tmp_path, toys.AutoEncoder, 2, finals)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (None, DECAY, "kept no average of its weights, this one keeps an average.*remove trainer.ema_decay"),
        (DECAY, None, "kept an average of its weights, this one keeps no average.*set trainer.ema_decay"),
    ],
)
def test_run_is_not_resumed_with_weights_of_another_sort(first, then, message, tmp_path):
    train(tmp_path, toys.AutoEncoder, "single", 5, ema_decay=first)
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, toys.AutoEncoder, "single", resume="auto", ema_decay=then)


class FreezingConfig(CallBackBaseConfig):
    name: Literal["Freezing"] = "Freezing"


class Freezing(CallbackBase):
    config_class: ClassVar[type[FreezingConfig]] = FreezingConfig

    def after_update(self, *, update_counter: Any, **_kwargs: Any) -> None:
        if update_counter.update == 1:
            self.trainer.model.decoder.requires_grad_(requires_grad=False)


def test_what_is_frozen_in_training_is_frozen_in_the_average(tmp_path):
    best = {**CALLBACKS[-1], "save_frozen_weights": False}
    callbacks = [{"kind": f"{__name__}.Freezing", "every_n_updates": 1}, CALLBACKS[1], best]
    toys.make_trainer(tmp_path, callbacks=callbacks, ema_decay=DECAY, optimizers=toys.OPTIMIZERS).train()
    [folder] = (tmp_path / "checkpoints").glob("best_model.loss.val.total")
    assert [path.name for path in folder.glob("*.pt")] == ["encoder.pt"]


def test_run_is_evaluated_with_the_averaged_weights_that_it_kept(tmp_path):
    run = runs.describe_run(tmp_path / "run", epochs=3, strategy="ddp", precision="float64", ema_decay=DECAY)
    runs.succeeded(runs.train_on_ranks(2, runs.write_config(tmp_path / "config.yaml", run)))
    [outcome] = runs.succeeded(runs.eval_on_ranks(1, tmp_path / "run"))
    value = runs.checkpoints(tmp_path / "run")[runs.BEST].value
    [again] = [line.split()[1] for line in outcome.output.splitlines() if line.startswith(f"{runs.METRIC} ")]
    assert float(again) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, math.nan, "much"])
def test_decay_that_cannot_be_right(decay):
    with pytest.raises(ValidationError, match="ema_decay"):
        TrainerConfig(epochs=1, effective_batch_size=2, ema_decay=decay)
