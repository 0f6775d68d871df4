"""`save_on_exception`: a last resume checkpoint is saved where all ranks come, between two updates, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.data.container import DataContainer
from keepbest.errors import DesyncError
from tests.callbacks.test_resume import CHECKPOINTS, FailsConfig, FailsError, refs_in, train
from tests.kit import toys
from tests.kit.pool import run_ranks


def fail_on(directory: Path, ranks: tuple[int, ...]) -> str:
    saves = {**CHECKPOINTS, "every_n_updates": 2, "save_on_exception": True}
    fails = FailsConfig(every_n_updates=1, at=3, on=ranks)
    with pytest.raises((FailsError, DesyncError)) as caught:
        train(directory, fails, saves, strategy="ddp", updates=4)
    return type(caught.value).__name__


@pytest.mark.parametrize(
    ("ranks", "raised", "kept"),
    [((0, 1), ["FailsError"] * 2, "resume.E1_U3_S72"), ((1,), ["DesyncError", "FailsError"], "resume.E1_U2_S48")],
)
def test_exception_is_saved_at_only_where_all_ranks_come(ranks, raised, kept, tmp_path):
    assert run_ranks(fail_on, 2, tmp_path, ranks) == raised
    assert refs_in(tmp_path)[-1] == kept


class Breaks(torch.optim.SGD):
    def step(self, *_arguments: Any, **_settings: Any) -> None:  # type: ignore[override]
        raise FailsError


def test_exception_in_the_middle_of_an_update_saves_nothing(tmp_path, caplog):
    saves = {**CHECKPOINTS, "save_on_exception": True}
    with pytest.raises(FailsError):
        train(
            tmp_path,
            saves,
            updates=4,
            optimizers={"encoder": toys.ADAM, "decoder": lambda parameters: Breaks(parameters, lr=0.1)},
        )
    assert refs_in(tmp_path) == []
    assert "an update was under way" in caplog.text


class Broken(torch.utils.data.Dataset[torch.Tensor]):
    """The training samples, of which none can be read after some."""

    def __init__(self, readable: int) -> None:
        self.samples, self.left = toys.Waves(), readable

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise FailsError
        return self.samples[index]


def test_batch_that_cannot_be_read_is_an_exception_to_save_at(tmp_path):
    saves = {**CHECKPOINTS, "every_n_updates": 9, "save_on_exception": True}
    trainer = toys.make_trainer(tmp_path, callbacks=[saves], updates=4)
    trainer.data_container = DataContainer({"train": Broken(30), "val": toys.Waves(17)})
    with pytest.raises(FailsError):
        trainer.train()
    assert refs_in(tmp_path) == ["resume.E0_U1_S24"]


def test_exception_in_a_forward_pass_saves_nothing(tmp_path, caplog):
    def fail(*_arguments: Any) -> None:
        raise FailsError

    model = toys.auto_encoder(dropout=0.5)
    model.decoder.register_forward_pre_hook(fail)  # when the encoder has drawn random numbers
    with pytest.raises(FailsError):
        train(tmp_path, {**CHECKPOINTS, "save_on_exception": True}, model=model, updates=4)
    assert refs_in(tmp_path) == []
    assert "an update was under way" in caplog.text


class FailsOnceConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_save_on_exception.FailsOnce"


class FailsOnce(toys.Recorder):
    """Raises on rank 1 alone, when all ranks are about to save."""

    config_class = FailsOnceConfig

    def before_checkpoint(self, **_kwargs: Any) -> None:
        if self.updates and self.ranks.rank == 1:
            self.updates.clear()
            raise FailsError


def fail_before_a_checkpoint(directory: Path) -> str:
    saves = {**CHECKPOINTS, "every_n_updates": 2, "save_on_exception": True}
    with pytest.raises((FailsError, DesyncError)) as caught:
        train(directory, FailsOnceConfig(every_n_updates=2), saves, strategy="ddp", updates=4)
    return type(caught.value).__name__


def fail_in_an_update(directory: Path) -> None:
    trainer = toys.make_trainer(directory, callbacks=[{**CHECKPOINTS, "save_on_exception": True}], strategy="ddp")
    [callback] = trainer.callbacks
    callback.before_training(update_counter=trainer.update_counter)
    if not trainer.ranks.is_main:
        callback.after_exception(
            update_counter=trainer.update_counter, error=FailsError(), is_between_updates=False, batch_size=1
        )
    trainer.ranks.agree("meet again", lambda: None)


def test_rank_alone_does_not_slip_into_the_save_of_others(tmp_path):
    assert run_ranks(fail_before_a_checkpoint, 2, tmp_path) == ["DesyncError", "FailsError"]
    assert refs_in(tmp_path) == []


def test_rank_that_raises_in_an_update_waits_for_nobody(tmp_path):
    run_ranks(fail_in_an_update, 2, tmp_path)
