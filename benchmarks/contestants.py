"""keepbest and what is measured beside it: each keeps exactly one checkpoint of the weights of the same model.

Calling `act` is what a training loop calls at a new best. `settle` waits for what goes on in the background and removes
what is left of older checkpoints, where a contestant does not do so itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from keepbest import BestKeeper, TrainingIteration

warnings.filterwarnings("ignore", module=r"torch|pytorch_lightning|lightning_utilities|ignite")


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def plain(model: nn.Module) -> nn.Module:
    """The model below DDP."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


class Action:
    """A contestant that is one function; also the base of the others."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self._act = act

    def prepare(self) -> None:
        """Nothing."""

    def act(self) -> None:
        self._act()

    def settle(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@contextmanager
def ended(contestants: Mapping[str, Action]) -> Iterator[None]:
    """End each contestant when the block is left."""
    try:
        yield
    finally:
        for contestant in contestants.values():
            contestant.end()


class Copy(Action):
    """Copies the weights into buffers that were allocated and touched before, on rank 0."""

    def __init__(self, model: nn.Module) -> None:
        self._source = [value.detach() for value in plain(model).state_dict().values()]
        self._buffers = [value.clone() for value in self._source] if is_main() else []

    def act(self) -> None:
        for buffer, value in zip(self._buffers, self._source, strict=False):  # other ranks have no buffers
            buffer.copy_(value)


class RawWrite(Action):
    """Writes the bytes of some values to a new file and syncs it: what the disk takes."""

    def __init__(self, values: Iterable[torch.Tensor], path: Path) -> None:
        self._values = [value.detach().contiguous().numpy() for value in values]
        self._path = path

    def act(self) -> None:
        with self._path.open("xb", buffering=0) as file:
            for value in self._values:
                file.write(value.data)
            os.fsync(file.fileno())

    def settle(self) -> None:
        self._path.unlink(missing_ok=True)


class Keepbest(Action):
    """Observes a new best each time."""

    def __init__(self, model: nn.Module, folder: Path, **settings: Any) -> None:
        self._make = lambda number: BestKeeper(
            model, directory=folder / f"keepbest-{number}", metric_key="loss/val", **settings
        )
        self._updates = itertools.count(1)
        self.keeper = self._opened(0)

    def _opened(self, number: int) -> BestKeeper:
        keeper = self._make(number)
        keeper.start()
        return keeper

    def act(self) -> None:
        update = next(self._updates)
        self.keeper.observe(-float(update), TrainingIteration(update=update))

    def settle(self) -> None:
        self.keeper.flush()

    def end(self) -> None:
        self.keeper.close()
        if is_main():
            shutil.rmtree(self.keeper.directory)


class ColdKeepbest(Keepbest):
    """Observes the first best of a new run each time."""

    def __init__(self, model: nn.Module, folder: Path, *, seconds: float, **settings: Any) -> None:
        super().__init__(model, folder / "cold", **settings)
        self._runs = itertools.count(1)
        self._seconds = seconds

    def prepare(self) -> None:
        super().end()
        self.keeper = self._opened(next(self._runs))
        time.sleep(self._seconds)  # the training before it, in which a thread finds the memory


class TorchSave(Action):
    """What a training script does by hand: rank 0 saves, the others wait."""

    def __init__(self, model: nn.Module, folder: Path, *, sync: bool) -> None:
        self._model = plain(model)
        self._path = folder / f"best-{'synced' if sync else 'plain'}.pt"
        self._sync = sync

    def act(self) -> None:
        if is_main() and self._sync:
            with (temporary := self._path.with_suffix(".tmp")).open("wb") as file:
                torch.save(self._model.state_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        elif is_main():
            torch.save(self._model.state_dict(), self._path)
        if dist.is_initialized():
            dist.barrier()


class Lightning(Action):
    """What `ModelCheckpoint(save_top_k=1, save_weights_only=True)` calls at a new best: save, remove the one before."""

    def __init__(self, model: nn.Module, folder: Path, *, is_async: bool) -> None:
        import pytorch_lightning as pl
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._saved = saved = threading.Event()

        class NotingIO(TorchCheckpointIO):
            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                super().save_checkpoint(*args, **kwargs)
                saved.set()

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = plain(model)

        for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            rank = str(dist.get_rank())
            os.environ |= {"LOCAL_RANK": rank, "RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "benchmarks"}
            os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        self._trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy="ddp" if world_size > 1 else "auto",
            plugins=[AsyncCheckpointIO(NotingIO())] if is_async else None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        self._trainer.strategy.connect(Module())
        self._io = self._trainer.strategy.checkpoint_io
        self._paths = (folder / f"lightning-{is_async}-{number}.ckpt" for number in itertools.count())
        self._is_async = is_async
        self._last: Path | None = None

    def act(self) -> None:
        self._saved.clear()
        before, self._last = self._last, next(self._paths)
        self._trainer.save_checkpoint(self._last, weights_only=True)
        if before is not None:
            self._trainer.strategy.remove_checkpoint(before)

    def settle(self) -> None:
        if self._is_async:
            self._io.teardown()  # waits; the next save starts a new thread

    def is_done(self) -> bool:
        """Whether the thread has written what was saved last."""
        return self._saved.is_set()

    def end(self) -> None:
        if self._last is not None:
            self._trainer.strategy.remove_checkpoint(self._last)


class Ignite(Action):
    """`Checkpoint` with `DiskSaver`, called as the engine calls it."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        from ignite.engine import Engine
        from ignite.handlers import Checkpoint, DiskSaver

        saver = DiskSaver(str(folder / "ignite"), create_dir=True, require_empty=False)
        self._engine = Engine(lambda _engine, _batch: None)
        self._handler = Checkpoint(
            {"model": plain(model)}, saver, n_saved=1, score_function=lambda engine: engine.state.epoch
        )
        self._engine.state.epoch = 0

    def act(self) -> None:
        self._engine.state.epoch += 1
        self._handler(self._engine)


class Dcp(Action):
    """`torch.distributed.checkpoint`: `save`, or `async_save` as it comes, with kept buffers, or from a process."""

    def __init__(self, model: nn.Module, folder: Path, kind: str) -> None:
        self._model = plain(model)
        self._folders = (folder / f"dcp-{kind}-{number}" for number in itertools.count())
        self._kind = kind
        if kind == "process" and not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if kind == "cached" else None
        self._saving: Any = None
        self._last: Path | None = None
        self._before: Path | None = None

    def act(self) -> None:
        self._before, self._last = self._last, next(self._folders)
        state = {"model": self._model.state_dict()}
        if self._kind == "sync":
            dcp.save(state, checkpoint_id=self._last)
            self._remove(self._before)
        else:
            where = AsyncCheckpointerType.PROCESS if self._kind == "process" else AsyncCheckpointerType.THREAD
            self._saving = dcp.async_save(
                state, checkpoint_id=self._last, async_stager=self._stager, async_checkpointer_type=where
            )

    def settle(self) -> None:
        if isinstance(self._saving, Future):
            self._saving.result()
            self._saving = None
            self._remove(self._before)

    def end(self) -> None:
        self._remove(self._last)
        if self._stager is not None:
            self._stager.close()

    def is_done(self) -> bool:
        return bool(self._saving.done())

    def _remove(self, folder: Path | None) -> None:
        if folder is not None and is_main():
            shutil.rmtree(folder)


SYNC_PEERS: dict[str, Callable[[nn.Module, Path], Action]] = {
    "torch.save": lambda model, folder: TorchSave(model, folder, sync=False),
    "torch.save + fsync": lambda model, folder: TorchSave(model, folder, sync=True),
    "Lightning": lambda model, folder: Lightning(model, folder, is_async=False),
    "Ignite": Ignite,
    "dcp.save": lambda model, folder: Dcp(model, folder, "sync"),
}
ASYNC_PEERS: dict[str, Callable[[nn.Module, Path], Action]] = {
    "Lightning AsyncCheckpointIO": lambda model, folder: Lightning(model, folder, is_async=True),
    "dcp.async_save": lambda model, folder: Dcp(model, folder, "fresh"),
}
TUNED = "dcp.async_save, cached staging"
TUNED_PEER: dict[str, Callable[[nn.Module, Path], Action]] = {TUNED: lambda model, folder: Dcp(model, folder, "cached")}
FROM_A_PROCESS = {"dcp.async_save, from a process": lambda model, folder: Dcp(model, folder, "process")}
SYNCING = ("torch.save + fsync", "dcp.save")  # those whose checkpoint is on the disk when they return
