"""What do shards cost that every rank writes in the background?"""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks import measure
from benchmarks.contestants import Action, Keepbest, RawWrite, ended, is_main
from benchmarks.heartbeat import Written, longest_gap
from benchmarks.measure import Line, Report, Samples, Size, shard
from benchmarks.sharded import measure_memory

OURS, COPY, TUNED = "keepbest", "copy of the own shard into warm buffers", "dcp.async_save, cached staging and plans"
DURABLE, RAW, BUSY = "from observe to durable", "raw write + fsync of the own shard", "under Python-heavy training"
_ALLOWED = 64e6  # bytes that a rank may take beyond two slots of its shard


def shards_of(model: nn.Module) -> list[Any]:
    return [parameter.to_local().detach() for parameter in model.parameters()]  # type: ignore[attr-defined]


class CopyShard(Action):
    """Copies what this rank holds into buffers that were allocated and touched before."""

    def __init__(self, model: nn.Module) -> None:
        self._source = shards_of(model)
        self._buffers = [value.clone() for value in self._source]

    def act(self) -> None:
        for buffer, value in zip(self._buffers, self._source, strict=True):
            buffer.copy_(value)


class Durable(Keepbest):
    """Waits on rank 0 until the new best is committed, which its ref shows."""

    def act(self) -> None:
        before = self._target()
        super().act()
        while is_main() and self._target() == before:
            time.sleep(0.001)  # a thread writes, and needs the interpreter

    def _target(self) -> str:
        link = self.keeper.directory / "checkpoints" / "best_model.loss.val"
        return str(link.readlink()) if link.is_symlink() else ""


class Busy(Keepbest):
    """Runs Python on the training thread until the new best is on the disk."""

    def __init__(self, model: nn.Module, folder: Path, **settings: Any) -> None:
        super().__init__(model, folder, **settings)
        self._folder = folder

    def act(self) -> None:
        written = Written(self, self._folder)
        written.begin()
        super().act()
        longest_gap(written)


class TunedDcp(Action):
    """`torch.distributed.checkpoint.async_save` with a stager that keeps its buffers, and plans that are kept."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._model = model
        self._folders = (folder / f"tuned-{number}" for number in itertools.count())
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._saving: Any = None
        self._last: Path | None = None

    def act(self) -> None:
        self._before, self._last = self._last, next(self._folders)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        state = {"model": self._model.state_dict()}
        self._saving = dcp.async_save(state, checkpoint_id=self._last, planner=planner, async_stager=self._stager)

    def settle(self) -> None:
        self._saving.result()
        if self._before is not None and is_main():
            shutil.rmtree(self._before)

    def end(self) -> None:
        self._stager.close()


def measure_stalls(world_size: int, folder: Path, size: Size) -> Samples:
    model = shard(measure.make_model(size.megabytes), world_size)
    settings = {"format": "dcp", "async_save": True}
    contestants: dict[str, Action] = {
        COPY: CopyShard(model),
        OURS: Keepbest(model, folder, **settings),
        TUNED: TunedDcp(model, folder),
        RAW: RawWrite(shards_of(model), folder / f"raw-{dist.get_rank()}"),
        DURABLE: Durable(model, folder / "durable", **settings),
        BUSY: Busy(model, folder / "busy", **settings),
    }
    with ended(contestants):
        return measure.alternate(contestants, size.repetitions, warm_up=2)


def run(quick: bool) -> Report:
    size = Size(8, 3) if quick else Size(1000, 7)
    report = Report()
    for world_size in (2,) if quick else (2, 4):
        with measure.scratch() as folder:
            samples = measure.on_ranks(world_size, measure_stalls, world_size, folder, size)[0]
        where = f"{world_size} ranks, FSDP2"
        report.samples[where] = samples
        for what, name, beside, bar, limit in (
            ("stall of a new best in shards", OURS, COPY, "at most 1.3 x a copy of the own shard", 1.3),
            ("the same", OURS, TUNED, "at most 1.0 x the tuned peer", 1.0),
            (DURABLE, DURABLE, RAW, "at most 1.25 x raw write + fsync", 1.25),
            (f"the writer {BUSY}", BUSY, DURABLE, "at most 2 x alone", 2.0),
        ):
            figures = measure.figures(samples, name, beside)
            report.add(Line(f"{what}, {where}", measure.ratio(samples, name, beside), bar, limit, detail=figures))
        with measure.scratch() as folder:
            ranks = measure.on_ranks(world_size, measure_memory, world_size, folder, size, True)
        above, own = max(ranks, key=lambda rank: rank[0])
        detail = f"{above / 1e6:.0f} MB above the model's own; a rank's shard has {own / 1e6:.0f} MB"
        bar = "at most two shards and 64 MB"
        report.add(Line(f"memory of the worst of {where}", above / (2 * own + _ALLOWED), bar, 1.0, detail=detail))
    return report


if __name__ == "__main__":
    measure.main("shards", run)
