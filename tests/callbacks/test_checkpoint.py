from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keepbest import BestKeeper
from keepbest.callbacks.config import CallBackBaseConfig
from keepbest.capture.share import Items
from keepbest.errors import ConfigError, RankFailedError, SnapshotError
from keepbest.iteration import TrainingIteration
from keepbest.modules.parts import Part
from keepbest.ranks import Ranks
from keepbest.run.checkpoints import checkpoint_refs
from keepbest.run.names import LATEST
from keepbest.run.reader import find_ref, read_history
from keepbest.run.verify import verify
from keepbest.saving.resume_saver import ResumeSaver
from keepbest.training.trainer import Trainer
from tests.kit import toys
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS


class NotingConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_checkpoint.Noting"


class Noting(toys.Recorder):
    config_class = NotingConfig


class CrashError(Exception):
    pass


class CrashingConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_checkpoint.Crashing"


class Crashing(toys.Recorder):
    config_class = CrashingConfig

    def periodic_callback(self, **_kwargs: Any) -> None:
        raise CrashError


class FillingConfig(CallBackBaseConfig):
    name: str = "tests.callbacks.test_checkpoint.Filling"
    rank: int


class Filling(toys.Recorder):
    """From the second update on, the disk takes no more data of one rank."""

    config_class = FillingConfig

    def periodic_callback(self, *, update_counter: Any, **_kwargs: Any) -> None:
        if update_counter.update == 2 and self.ranks.rank == self.callback_config.rank:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))


EVERY_UPDATE = {"name": "CheckpointCallback", "every_n_updates": 1}
NOTING = NotingConfig(every_n_updates=1)


def names_in(directory: Path) -> list[str]:
    """The iterations of the resume checkpoints that the ledger names."""
    return [ref.removeprefix("resume.") for ref in checkpoint_refs(read_history(directory))]


def latest_of(directory: Path) -> str:
    """The iteration of the snapshot that training would continue from."""
    return str(find_ref(directory, read_history(directory), LATEST).manifest.iteration)


def trained(directory: Path, *callbacks: Any, **settings: Any) -> Trainer:
    trainer = toys.make_trainer(directory, callbacks=list(callbacks), **settings)
    trainer.train()
    return trainer


def run(directory: Path, strategy: str, resume: str | None, updates: int) -> tuple[dict[str, Tensor], list[int]]:
    trainer = trained(directory, EVERY_UPDATE, NOTING, strategy=strategy, resume=resume, updates=updates)
    [noting] = [callback for callback in trainer.callbacks if isinstance(callback, Noting)]
    return toys.whole_weights(trainer), noting.updates


@pytest.mark.parametrize(
    ("strategy", "world_size", "other_strategy", "other_world_size"),
    [
        ("ddp", 2, "ddp", 2),
        ("ddp", 3, "ddp", 1),
        ("fsdp1", 2, "fsdp1", 4),
        ("fsdp1", 4, "fsdp1", 2),
        ("fsdp2", 2, "fsdp2", 3),
        ("fsdp2", 4, "fsdp2", 1),
        ("ddp", 2, "fsdp2", 4),
        ("fsdp2", 3, "fsdp1", 2),
    ],
)
def test_resumed_run_goes_on_as_if_it_had_not_stopped(strategy, world_size, other_strategy, other_world_size, tmp_path):
    run_ranks(run, world_size, tmp_path, strategy, None, 3)
    for weights, updates in run_ranks(run, other_world_size, tmp_path, other_strategy, "auto", 6):
        assert updates == [1, 2, 3, 4, 5, 6]
        for name, value in toys.weights_by_hand(6).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12)


def draw(directory: Path, strategy: str, resume: str | None, updates: int) -> tuple[dict[str, Tensor], float]:
    trainer = trained(
        directory,
        EVERY_UPDATE,
        model=toys.auto_encoder(dropout=0.5),
        strategy=strategy,
        resume=resume,
        updates=updates,
    )
    return toys.whole_weights(trainer), torch.rand(()).item()


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2)])
def test_random_numbers_go_on_on_every_rank(strategy, world_size, tmp_path):
    through = run_ranks(draw, world_size, tmp_path / "through", strategy, None, 5)
    run_ranks(draw, world_size, tmp_path / "stopped", strategy, None, 2)
    resumed = run_ranks(draw, world_size, tmp_path / "stopped", strategy, "auto", 5)
    assert [number for _, number in resumed] == [number for _, number in through]
    assert through[0][1] != through[1][1]
    for name, value in through[0][0].items():
        assert torch.equal(resumed[0][0][name], value)


def test_single_process_resumes_bit_for_bit(tmp_path):
    through = draw(tmp_path / "through", "single", None, 5)
    draw(tmp_path / "stopped", "single", None, 3)
    resumed = draw(tmp_path / "stopped", "single", str(tmp_path / "stopped/checkpoints/resume.latest"), 5)
    assert resumed[1] == through[1]
    assert all(torch.equal(resumed[0][name], value) for name, value in through[0].items())


def test_auto_without_a_checkpoint_starts_afresh(tmp_path):
    assert trained(tmp_path, NOTING, resume="auto").callbacks[0].updates == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("keep_last", "kept"),
    [(1, ["E2_U5_S120"]), (2, ["E2_U4_S96", "E2_U5_S120"]), (None, None)],
)
def test_older_checkpoints_are_removed(keep_last, kept, tmp_path):
    trained(tmp_path, {**EVERY_UPDATE, "keep_last": keep_last}, updates=5)
    everything = ["E0_U1_S24", "E1_U2_S48", "E1_U3_S72", "E2_U4_S96", "E2_U5_S120"]
    assert names_in(tmp_path) == (everything if kept is None else kept)
    assert latest_of(tmp_path) == "E2_U5_S120"
    assert verify(tmp_path) == []


def test_checkpoint_holds_what_callbacks_did_in_its_epoch(tmp_path):
    trained(tmp_path, EVERY_UPDATE, NotingConfig(every_n_epochs=1), epochs=1)
    resumed = trained(tmp_path, EVERY_UPDATE, NotingConfig(every_n_epochs=1), epochs=2, resume="auto")
    assert resumed.callbacks[0].updates == [2, 4]


def test_resume_from_an_earlier_checkpoint_abandons_later_ones(tmp_path):
    keep_all = {**EVERY_UPDATE, "keep_last": None}
    trained(tmp_path, keep_all, NOTING, updates=5)
    resumed = trained(
        tmp_path,
        {**EVERY_UPDATE, "keep_last": 2},
        NOTING,
        updates=3,
        resume=tmp_path / "checkpoints/resume.E1_U2_S48",
    )
    assert resumed.callbacks[0].updates == [1, 2, 3]
    assert names_in(tmp_path) == ["E1_U2_S48", "E1_U3_S72"]
    again = trained(tmp_path, EVERY_UPDATE, NOTING, updates=4, resume="auto")
    assert again.callbacks[0].updates == [1, 2, 3, 4]


def test_error_costs_what_came_after_the_last_checkpoint(tmp_path):
    with pytest.raises(CrashError):
        trained(tmp_path, {**EVERY_UPDATE, "every_n_updates": 2}, NOTING, CrashingConfig(every_n_updates=5))
    resumed = trained(tmp_path, EVERY_UPDATE, NOTING, resume="auto")
    assert resumed.callbacks[0].updates == [1, 2, 3, 4, 5, 6]
    for name, value in toys.weights_by_hand(6).items():
        torch.testing.assert_close(toys.whole_weights(resumed)[name], value, rtol=1e-10, atol=1e-12)


def test_path_without_a_complete_checkpoint_is_refused(tmp_path):
    trained(tmp_path, EVERY_UPDATE, epochs=1)
    with pytest.raises(ConfigError, match=r"at .*E9.* there are: resume.E1_U2_S48; .*resume=auto"):
        trained(tmp_path, resume=tmp_path / "checkpoints/resume.E9")


def test_run_with_other_batches_is_refused(tmp_path):
    trained(tmp_path, EVERY_UPDATE, epochs=1)
    with pytest.raises(ConfigError, match="had effective_batch_size=24, this one has 26"):
        trained(tmp_path, resume="auto", effective_batch_size=26)


def resume_with_a_larger_model(directory: Path, strategy: str) -> str:
    model = toys.AutoEncoder(hidden=8)
    with pytest.raises(SnapshotError) as caught:
        trained(directory, model=model, resume="auto", strategy=strategy)
    return str(caught.value)


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp2", 2)])
def test_other_model_is_refused_on_every_rank(strategy, world_size, tmp_path):
    trained(tmp_path, EVERY_UPDATE, epochs=1)
    for message in run_ranks(resume_with_a_larger_model, world_size, tmp_path, strategy):
        assert "the snapshot does not fit the model" in message
        assert "encoder" in message


def test_two_checkpoint_callbacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be distinguished"):
        trained(tmp_path, EVERY_UPDATE, {**EVERY_UPDATE, "every_n_updates": 2})


def test_eval_saves_nothing(tmp_path):
    toys.make_trainer(tmp_path, callbacks=[EVERY_UPDATE]).eval()
    assert not (tmp_path / "checkpoints").exists()


def save_into_a_file(directory: Path) -> str:
    with pytest.raises(RankFailedError) as caught:
        trained(directory, EVERY_UPDATE, strategy="ddp")
    return str(caught.value)


def test_folder_that_cannot_be_written_is_told_to_every_rank(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    messages = run_ranks(save_into_a_file, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 0" in messages[0]
    assert "for resume checkpoints" in messages[0]


def test_optimizer_without_state_is_resumed_too(tmp_path):
    plain = {"encoder": torch.optim.SGD, "decoder": torch.optim.SGD}
    trained(tmp_path, EVERY_UPDATE, optimizers=plain, epochs=1)
    resumed = trained(tmp_path, optimizers=plain, resume="auto")
    for name, value in toys.weights_by_hand(6, plain).items():
        torch.testing.assert_close(toys.whole_weights(resumed)[name], value, rtol=1e-10, atol=1e-12)


class LateLayer(nn.Module):
    """Has a layer that takes part from the fourth update on."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        return self.early(batch) + self.late(batch) if self.calls > 3 else self.early(batch)


def train_a_late_layer(directory: Path, strategy: str, resume: str | None, updates: int) -> dict[str, Tensor]:
    model = toys.auto_encoder()
    model.encoder.append(LateLayer())
    optimizers = {"encoder": toys.ADAM, "decoder": toys.ADAM}
    trainer = trained(
        directory,
        EVERY_UPDATE,
        model=model,
        optimizers=optimizers,
        strategy=strategy,
        resume=resume,
        updates=updates,
    )
    return toys.whole_weights(trainer)


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp1", 2), ("fsdp2", 2)])
def test_parameters_without_a_gradient_do_not_prevent_a_resume(strategy, world_size, tmp_path):
    through = run_ranks(train_a_late_layer, world_size, tmp_path / "through", strategy, None, 6)
    run_ranks(train_a_late_layer, world_size, tmp_path / "stopped", strategy, None, 2)
    resumed = run_ranks(train_a_late_layer, world_size, tmp_path / "stopped", strategy, "auto", 6)
    assert all(torch.equal(resumed[0][name], value) for name, value in through[0].items())


def test_other_optimizer_is_refused(tmp_path):
    trained(tmp_path, EVERY_UPDATE, epochs=1)
    with pytest.raises(SnapshotError, match=r"'optimizer.decoder': it was saved from 'SGD'"):
        trained(tmp_path, optimizers={"encoder": toys.ADAM, "decoder": toys.ADAM}, resume="auto")


def save_until_the_disk_is_full(directory: Path, rank: int) -> str:
    with pytest.raises(RankFailedError) as caught:
        trained(directory, FillingConfig(every_n_updates=1, rank=rank), EVERY_UPDATE, strategy="fsdp2")
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_cannot_write_its_share_fails_all_ranks(rank, tmp_path):
    for message in run_ranks(save_until_the_disk_is_full, 2, tmp_path, rank):
        assert "write the resume checkpoint E1_U2_S48" in message
        assert f"rank {rank}" in message
        assert "File too large" in message
    assert latest_of(tmp_path) == "E0_U1_S24"
    resumed = trained(tmp_path, EVERY_UPDATE, NOTING, resume="auto")
    assert resumed.callbacks[0].updates == [2, 3, 4, 5, 6]
    assert names_in(tmp_path) == ["E3_U6_S144"]


def train_the_decoder(directory: Path, strategy: str, resume: str | None, updates: int) -> dict[str, Tensor]:
    model = toys.auto_encoder()
    model.encoder.requires_grad_(requires_grad=False)
    trainer = trained(directory, EVERY_UPDATE, model=model, strategy=strategy, resume=resume, updates=updates)
    return toys.whole_weights(trainer)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_frozen_submodel_is_resumed_too(strategy, tmp_path):
    through = run_ranks(train_the_decoder, 2, tmp_path / "through", strategy, None, 4)
    run_ranks(train_the_decoder, 2, tmp_path / "stopped", strategy, None, 2)
    resumed = run_ranks(train_the_decoder, 2, tmp_path / "stopped", strategy, "auto", 4)
    assert all(torch.equal(resumed[0][name], value) for name, value in through[0].items())


def sizes_when_synced(directory: Path) -> dict[int, int]:
    """{inode: bytes of the file} at the last sync of each, of a resume checkpoint and a snapshot of `dcp`."""
    sizes: dict[int, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        found = os.fstat(descriptor)
        sizes[found.st_ino] = found.st_size

    os.fsync = fsync
    # So little that torch does not flush it before it syncs it.
    model = WRAPS["fsdp2"](nn.Linear(2, 2, bias=False))
    items = Items(model, (Part("model", ""),), True, {"optimizer": torch.optim.SGD(model.parameters())})
    saver = ResumeSaver(directory, items, Ranks.connect(), keep_last=1)
    saver.start(TrainingIteration(update=0), None)
    saver.save(TrainingIteration(update=1))
    saver.leave()
    with BestKeeper(model, directory=directory, metric_key="loss", format="dcp") as keeper:
        keeper.observe(1.0, epoch=1)
    return sizes


def test_every_file_of_every_rank_is_synced_when_it_is_whole(tmp_path):
    of_rank_0, of_rank_1 = run_ranks(sizes_when_synced, 2, tmp_path)
    files = (tmp_path / "checkpoints/snapshots").rglob("*.*")
    found = {path: path.stat() for path in files if path.is_file()}
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "optimizer.pt"} <= {path.name for path in found}
    for path, about in found.items():
        assert about.st_size in (of_rank_0.get(about.st_ino), of_rank_1.get(about.st_ino)), path
