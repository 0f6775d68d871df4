from __future__ import annotations

import json
import logging
import math
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.errors import ConfigError, RankFailedError
from keepbest.ranks import Ranks
from keepbest.training.config import RunConfig
from keepbest.training.epoch import OnlineLosses
from tests.kit import toys
from tests.kit.pool import run_ranks

HALVED = partial(StepLR, step_size=1, gamma=0.5)
CHECKPOINTS = {"name": "CheckpointCallback", "every_n_updates": 1}


def train(directory, strategy, *parts):
    """Weights and logged lines of a run, which is interrupted and resumed after each of these numbers of updates."""
    for updates in parts:
        trainer = toys.make_trainer(
            directory,
            strategy=strategy,
            schedule=HALVED,
            clip_grad_norm=0.1,
            updates=updates,
            tracker="jsonl",
            callbacks=[CHECKPOINTS],
            resume=None if updates == parts[0] else "auto",
        )
        trainer.train()
    log = directory / "metrics.jsonl"
    return toys.whole_weights(trainer), [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("strategy", "world_size", "parts"),
    [("single", 1, [3, 6]), ("ddp", 2, [3, 6]), ("fsdp1", 2, [6]), ("fsdp2", 2, [6])],
)
def test_schedule_clipping_and_logs_are_those_of_plain_torch(strategy, world_size, parts, tmp_path):
    losses = []
    expected = toys.weights_by_hand(6, schedule=HALVED, most=0.1, online=losses)
    assert not torch.equal(expected["decoder.bias"], toys.weights_by_hand(6, schedule=HALVED)["decoder.bias"])
    weights, log = (
        train(tmp_path, strategy, *parts)
        if world_size == 1
        else run_ranks(train, world_size, tmp_path, strategy, *parts)[0]
    )
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)
    means = [sum(losses[first : first + 2]) / 2 for first in (0, 2, 4)]
    assert [line["loss/online/total"] for line in log] == pytest.approx(means, rel=1e-10)
    rates = [0.05 * 0.5**updates for updates in (2, 4, 6)]
    assert [line["learning_rate/encoder"] for line in log] == pytest.approx(rates)


def test_online_loss_can_be_monitored(tmp_path):
    monitor = {"name": "BestCheckpointCallback", "metric_key": "loss/online/total", "every_n_epochs": 1}
    trainer = toys.make_trainer(tmp_path, callbacks=[monitor])
    trainer.train()
    online = []
    toys.weights_by_hand(6, online=online)
    [keeper] = trainer.callbacks
    assert keeper.keeper.best_metric_value == pytest.approx(min(sum(online[i : i + 2]) / 2 for i in (0, 2, 4)))


def test_each_epoch_is_a_line_of_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    evaluation = {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_epochs": 2}
    toys.make_trainer(tmp_path, callbacks=[evaluation]).train()
    lines = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    keys = [[value.split()[0] for value in line.partition(": ")[2].split(", ")] for line in lines]
    online = ["loss/online/total", "learning_rate/encoder", "learning_rate/decoder"]
    assert keys[0] == [*online, "loss/online/error", "loss/online/size"]
    assert keys[1] == ["loss/val/error", "loss/val/size", "loss/val/total", *online[:2], "and"]
    assert "learning_rate/encoder 0.05" in lines[0]
    assert lines[1].endswith("and 3 more")


def test_groups_have_a_learning_rate_each(tmp_path):
    def grouped(parameters):
        return torch.optim.SGD([{"params": [each], "lr": 0.1 * number} for number, each in enumerate(parameters)])

    toys.make_trainer(tmp_path, optimizers=dict.fromkeys(toys.OPTIMIZERS, grouped), epochs=1, tracker="jsonl").train()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert [line[f"learning_rate/decoder/{number}"] for number in (0, 1)] == [0.0, 0.1]


def test_schedule_of_a_config_is_made_for_each_optimizer():
    config = {"directory": "runs/a", "model": {"kind": "x"}, "data": {}, "optimizer": {"kind": "torch.optim.SGD"}}
    config["trainer"] = {"epochs": 1, "effective_batch_size": 1}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    steps = {"kind": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.25}
    schedule = RunConfig(**config, schedule=steps).schedule_factory()(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(ConfigError, match=r"cannot build .*StepLR"):
        RunConfig(**config, schedule={"kind": "torch.optim.lr_scheduler.StepLR"}).schedule_factory()(optimizer)
    assert RunConfig(**config).schedule_factory() is None


class FragileConfig(CallBackBaseConfig):
    fails: bool = False


class Fragile(CallbackBase):
    """Notes that it was called, then fails if it is to."""

    config_class = FragileConfig
    called: ClassVar[list[tuple[str, bool]]] = []

    @property
    def state_key(self):
        return f"fragile/{self.callback_config.fails}"

    def note(self, hook):
        self.called.append((hook, self.callback_config.fails))
        if self.callback_config.fails:
            raise RuntimeError(f"in {hook}")

    def after_update(self, **_):
        self.note("after_update") if self.callback_config.fails and self.trainer.update_counter.update == 2 else None

    def after_exception(self, **_):
        self.note("after_exception")

    def after_training(self, **_):
        self.note("after_training")


@pytest.mark.parametrize(("updates", "hook"), [(1, "after_training"), (2, "after_exception")])
def test_callback_that_fails_keeps_no_other_from_its_last_hook(updates, hook, tmp_path, caplog):
    Fragile.called.clear()
    callbacks = [
        {"kind": FragileConfig.__module__ + ".Fragile", "every_n_updates": 1, "fails": each} for each in (True, False)
    ]
    trainer = toys.make_trainer(tmp_path, callbacks=callbacks, updates=updates)
    with pytest.raises(RuntimeError, match="in after_update" if updates == 2 else "in after_training"):
        trainer.train()
    assert Fragile.called[-2:] == [(hook, True), (hook, False)]
    assert (updates == 1) or "in after_exception" in caplog.text


def infinite_on_both(sign):
    losses = OnlineLosses()
    losses.add({"total": torch.tensor([sign[dist.get_rank()] * math.inf])})
    return losses.take_means(Ranks.connect())["total"]


def test_infinite_losses_of_both_signs_do_not_end_training():
    assert all(map(math.isnan, run_ranks(infinite_on_both, 2, (1, -1))))
    assert run_ranks(infinite_on_both, 2, (1, 1)) == [math.inf, math.inf]


@pytest.mark.parametrize("schedule", [ReduceLROnPlateau, lambda _: None])
def test_schedule_that_cannot_take_a_step_is_refused(schedule, tmp_path):
    with pytest.raises(ConfigError, match="expected an LRScheduler of torch"):
        toys.make_trainer(tmp_path, schedule=schedule)


@pytest.mark.parametrize(("before", "after"), [(HALVED, None), (None, HALVED)], ids=["removed", "added"])
def test_resume_with_other_schedules_is_refused(before, after, tmp_path):
    toys.make_trainer(tmp_path, schedule=before, updates=1, callbacks=[CHECKPOINTS]).train()
    with pytest.raises(ConfigError, match="set schedule as it was, or start a new run"):
        toys.make_trainer(tmp_path, schedule=after, updates=2, callbacks=[CHECKPOINTS], resume="auto").train()


def lose_a_device(directory):
    def fail():
        raise RuntimeError("the device is lost")

    trainer = toys.make_trainer(directory, strategy="ddp")
    if trainer.ranks.rank == 1:
        trainer._losses.state_dict = fail  # no device fails at a moment that could be named
    with pytest.raises(RankFailedError) as caught:
        trainer.train()
    return str(caught.value)


def test_losses_that_cannot_be_read_on_one_rank_end_training_on_all(tmp_path):
    for message in run_ranks(lose_a_device, 2, tmp_path):
        assert "failed to add up the losses in training on rank 1 of 2: RuntimeError: the device is lost" in message


class Alternating(toys.AutoEncoder):
    """Has one of its losses in every other update alone."""

    updates = 0

    def losses(self, outputs, batch):
        found = super().losses(outputs, batch)
        self.updates += 1
        return found if self.updates % 2 else {"total": found["total"]}


class SizesConfig(CallBackBaseConfig):
    every_n_updates: int = 1


class Sizes(CallbackBase):
    """Keeps the mean of this loss at each update that has it."""

    config_class = SizesConfig
    seen: ClassVar[list[float]] = []

    def track_after_update_step(self, *, losses, **_):
        self.seen += [losses["size"].mean().item()] if "size" in losses else []


def test_loss_of_some_updates_is_divided_by_their_samples(tmp_path):
    Sizes.seen.clear()
    toys.make_trainer(tmp_path, model=Alternating(), tracker="jsonl", callbacks=[SizesConfig()]).train()
    logged = [json.loads(line)["loss/online/size"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx(Sizes.seen, rel=1e-12)
