from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.callbacks.trainer_view import TrainerView
from keepbest.data.container import DataContainer
from keepbest.errors import ConfigError
from keepbest.ranks import Ranks
from keepbest.training.config import TrainerConfig
from keepbest.training.trainer import Trainer
from tests.kit import toys
from tests.kit.pool import run_ranks


class HookRecorderConfig(CallBackBaseConfig):
    name: Literal["HookRecorder"] = "HookRecorder"
    runs_last: bool = False
    stop_at: int | None = None


class HookRecorder(CallbackBase):
    """Notes every hook with the iteration at which it was called."""

    config_class: ClassVar[type[CallBackBaseConfig]] = HookRecorderConfig
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, callback_config: HookRecorderConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.runs_last = callback_config.runs_last  # type: ignore[misc]

    @property
    def state_key(self) -> str:
        return f"hooks/{self.runs_last}"

    def note(self, hook: str, update_counter: Any, *more: Any) -> None:
        self.calls.append(("last" if self.runs_last else "first", hook, str(update_counter.iteration), *more))

    def before_training(self, *, update_counter: Any, **kwargs: Any) -> None:
        self.note("before_training", update_counter)

    def after_training(self, *, update_counter: Any, **kwargs: Any) -> None:
        self.note("after_training", update_counter)

    def track_after_accumulation_step(self, *, update_counter, batch, losses, accumulation_step, **kwargs) -> None:
        self.note("accumulation", update_counter, accumulation_step, len(batch), sorted(losses))

    def track_after_update_step(self, *, update_counter: Any, losses: dict[str, Tensor], **kwargs: Any) -> None:
        self.note("update_step", update_counter, tuple(losses["total"].shape))

    def after_update(self, *, update_counter: Any, batch_size: int, **kwargs: Any) -> None:
        self.note("after_update", update_counter, batch_size)
        if update_counter.update == self.callback_config.stop_at:
            self.trainer.stop("enough")

    def after_epoch(self, *, update_counter: Any, batch_size: int, **kwargs: Any) -> None:
        self.note("after_epoch", update_counter, batch_size)

    def at_eval(self, *, update_counter: Any, batch_size: int, **kwargs: Any) -> None:
        self.note("at_eval", update_counter, batch_size)


def record(directory: Path, *configs: HookRecorderConfig, evaluate: bool = False, **settings: Any) -> list[Any]:
    HookRecorder.calls.clear()
    trainer = toys.make_trainer(directory, callbacks=list(configs), **settings)
    trainer.eval(update=3) if evaluate else trainer.train()
    return list(HookRecorder.calls)


def train(strategy: str, accumulation_steps: int, directory: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    losses = {"kind": "keepbest.callbacks.OfflineLossCallback", "dataset_key": "val", "every_n_epochs": 3}
    trainer = toys.make_trainer(
        directory, strategy=strategy, accumulation_steps=accumulation_steps, callbacks=[losses], tracker="jsonl"
    )
    trainer.train()
    lines = (directory / "metrics.jsonl").read_text().splitlines() if trainer.ranks.is_main else ["{}"]
    return toys.whole_weights(trainer), json.loads(lines[-1])


@pytest.mark.parametrize(
    ("strategy", "world_size", "accumulation_steps"),
    [
        ("ddp", 1, 1),
        ("ddp", 2, 3),
        ("ddp", 3, 1),
        ("ddp", 4, 2),
        ("fsdp1", 1, 1),
        ("fsdp1", 2, 3),
        ("fsdp1", 4, 1),
        ("fsdp2", 1, 2),
        ("fsdp2", 3, 1),
        ("fsdp2", 4, 3),
    ],
)
def test_every_number_of_ranks_makes_the_updates_of_one_process(strategy, world_size, accumulation_steps, tmp_path):
    expected = toys.weights_by_hand(6)
    results = run_ranks(train, world_size, strategy, accumulation_steps, tmp_path)
    for weights, _ in results:
        assert sorted(weights) == sorted(expected)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)
    model = toys.auto_encoder().double()
    model.load_state_dict(expected)
    data = toys.Waves(17, phase=0.5).values.double()
    with torch.no_grad():
        total = model.losses(model(data), data)["total"].mean().item()
    logged = results[0][1]
    assert (logged["epoch"], logged["update"], logged["sample"]) == (3, 6, 144)
    assert logged["loss/val/total"] == pytest.approx(total, rel=1e-9)


def test_a_single_process_needs_no_process_group(tmp_path):
    trainer = toys.make_trainer(tmp_path, accumulation_steps=2)
    trainer.train()
    for name, value in toys.weights_by_hand(6).items():
        torch.testing.assert_close(toys.whole_weights(trainer)[name], value, rtol=1e-10, atol=1e-12)


def test_order_of_the_hooks(tmp_path):
    calls = record(
        tmp_path,
        HookRecorderConfig(every_n_epochs=1, runs_last=True),
        HookRecorderConfig(every_n_epochs=1),
        epochs=1,
        accumulation_steps=2,
    )
    names = ["error", "size", "total"]
    expected = []
    for before, after in (("E0_U0_S0", "E0_U1_S24"), ("E0_U1_S24", "E1_U2_S48")):
        for step in (0, 1):
            expected += [(who, "accumulation", before, step, 12, names) for who in ("first", "last")]
        expected += [(who, "update_step", after, (24,)) for who in ("first", "last")]
        # What runs last does so after the end of the epoch too: a resume checkpoint has to hold it.
        hooks = ["after_update", "after_epoch"] if after.startswith("E1") else ["after_update"]
        expected += [(who, hook, after, 12) for who in ("first", "last") for hook in hooks]
    assert calls == [
        *[(who, "before_training", "E0_U0_S0") for who in ("first", "last")],
        *expected,
        *[(who, "after_training", "E1_U2_S48") for who in ("first", "last")],
    ]


def test_stop_ends_training_after_the_callbacks_of_the_update(tmp_path):
    calls = record(tmp_path, HookRecorderConfig(every_n_updates=1, stop_at=4), epochs=9)
    assert [call[:3] for call in calls[-3:]] == [
        ("first", "after_update", "E2_U4_S96"),
        ("first", "after_epoch", "E2_U4_S96"),
        ("first", "after_training", "E2_U4_S96"),
    ]


def test_eval_calls_at_eval_only_and_stamps_the_update(tmp_path):
    calls = record(tmp_path, HookRecorderConfig(every_n_updates=1), evaluate=True)
    assert calls == [("first", "at_eval", "E1_U3_S72", 24)]


def stop_early(directory: Path) -> int:
    trainer = toys.make_trainer(
        directory,
        strategy="ddp",
        optimizers={"encoder": partial(torch.optim.SGD, lr=0.0), "decoder": partial(torch.optim.SGD, lr=0.0)},
        callbacks=[
            {"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 1},
            {"name": "MetricEarlyStopper", "metric_key": "loss/val/total", "tolerance": 2, "every_n_updates": 1},
        ],
    )
    trainer.train()
    return trainer.update_counter.update


def test_early_stopper_stops_all_ranks_at_the_same_update(tmp_path):
    # Nothing is learned: the first interval is the best one, and the third after it exceeds the tolerance.
    assert run_ranks(stop_early, 2, tmp_path) == [4, 4]


@pytest.mark.parametrize(("end", "updates"), [({"updates": 3}, 3), ({"samples": 49}, 3), ({"epochs": 2}, 4)])
def test_ends_of_training(end, updates, tmp_path):
    trainer = toys.make_trainer(tmp_path, **{"epochs": None, **end})
    trainer.train()
    assert trainer.update_counter.update == updates


def test_bf16_computes_in_bfloat16_and_keeps_float32_parameters(tmp_path):
    seen = []
    model = toys.auto_encoder()
    model.decoder.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    trainer = toys.make_trainer(
        tmp_path,
        model=model,
        precision="bf16",
        updates=2,
        callbacks=[{"name": "OfflineLossCallback", "dataset_key": "val", "every_n_updates": 2}],
    )
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(seen) > 2


def test_frozen_submodel_stays_and_needs_no_optimizer(tmp_path):
    model = toys.auto_encoder()
    model.encoder.requires_grad_(requires_grad=False)
    before = {name: value.double() for name, value in model.encoder.state_dict().items()}
    trainer = toys.make_trainer(tmp_path, model=model, optimizers={"decoder": toys.ADAM})
    trainer.train()
    assert list(trainer.optimizers) == ["decoder"]
    for name, value in before.items():
        assert torch.equal(model.encoder.state_dict()[name], value)


def test_error_in_a_callback_comes_through_and_the_log_is_kept(tmp_path):
    class FailingConfig(CallBackBaseConfig):
        name: Literal["Failing"] = "Failing"

    class Failing(CallbackBase):
        config_class = FailingConfig

        def after_update(self, *, update_counter: Any, **kwargs: Any) -> None:
            self.log_writer.add_scalar("update", update_counter.update)
            if update_counter.update == 2:
                raise RuntimeError("second update")

    trainer = toys.make_trainer(tmp_path, callbacks=[FailingConfig(every_n_updates=1)], tracker="tensorboard")
    with pytest.raises(RuntimeError, match="second update"):
        trainer.train()
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"update" in events.read_bytes()


class OnlookerConfig(CallBackBaseConfig):
    name: Literal["Onlooker"] = "Onlooker"


class Onlooker(CallbackBase):
    """Keeps what it sees of the trainer after the second update."""

    config_class = OnlookerConfig
    seen: ClassVar[dict[str, Any]] = {}

    def after_update(self, *, update_counter: Any, **kwargs: Any) -> None:
        if update_counter.update == 2:
            view = self.trainer
            assert isinstance(view, TrainerView)
            self.seen |= {"model": view.model, "average": view.average, "optimizers": list(view.optimizers)}
            self.seen |= {"update": view.update_counter.update, "callbacks": view.callbacks, "resume": view.resume}


def test_callback_sees_the_run_through_its_trainer(tmp_path):
    trainer = toys.make_trainer(tmp_path, callbacks=[OnlookerConfig(every_n_updates=1)], ema_decay=0.5, resume="auto")
    trainer.train()
    assert Onlooker.seen == {
        "model": trainer.model,
        "average": trainer.average,
        "optimizers": ["encoder", "decoder"],
        "update": 2,
        "callbacks": trainer.callbacks,
        "resume": "auto",
    }
    assert trainer.average is not None


class WithoutTotal(toys.AutoEncoder):
    def losses(self, outputs, batch):
        return {"error": super().losses(outputs, batch)["error"]}


class MeanLoss(toys.AutoEncoder):
    def losses(self, outputs, batch):
        return {"total": super().losses(outputs, batch)["total"].mean()}


@pytest.mark.parametrize(
    ("model", "message"),
    [(WithoutTotal, r"must contain 'total', found \['error'\]"), (MeanLoss, r"24 samples .*'total' has shape \(\)")],
)
def test_losses_of_another_form_are_refused(model, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        toys.make_trainer(tmp_path, model=model()).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effective_batch_size": 54}, "53 samples, fewer than the effective batch"),
        ({"accumulation_steps": 5}, "must be divisible by 1 ranks x 5 accumulation steps"),
        ({"strategy": "ddp"}, "needs a process group"),
        ({"train_dataset": "training"}, "there is no dataset 'training'"),
    ],
)
def test_settings_that_cannot_be_right(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        toys.make_trainer(tmp_path, **settings)


def refused_with_two_ranks(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        toys.make_trainer(directory, strategy="single")
    return str(caught.value)


def test_strategy_single_refuses_several_ranks(tmp_path):
    for message in run_ranks(refused_with_two_ranks, 2, tmp_path):
        assert "trains on one rank, but there are 2" in message


def different_weights(strategy: str, directory: Path) -> dict[str, Tensor]:
    ranks = Ranks.connect()
    trainer = toys.make_trainer(directory, model=toys.auto_encoder(seed=ranks.rank), strategy=strategy)
    return toys.whole_weights(trainer)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_all_ranks_start_with_the_weights_of_rank_0(strategy, tmp_path):
    expected = toys.auto_encoder(seed=0).double().state_dict()
    for weights in run_ranks(different_weights, 2, strategy, tmp_path):
        for name, value in expected.items():
            assert torch.equal(weights[name], value)


def test_data_container_without_training_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no dataset 'train'"):
        Trainer(
            TrainerConfig(epochs=1, effective_batch_size=2),
            toys.auto_encoder(),
            DataContainer({"val": toys.Waves()}),
            tmp_path,
            Ranks.connect(),
            optimizers=toys.ADAM,
        )
