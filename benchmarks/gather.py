"""How long do the shards of an FSDP2 model take to rank 0?"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from benchmarks import measure
from benchmarks.contestants import Action
from benchmarks.measure import Line, Report, Samples, Size, shard
from keepbest.capture.gathered import gathered
from keepbest.capture.inventory import Inventory
from keepbest.capture.share import Items, Share
from keepbest.formats.registry import find_format
from keepbest.modules.parts import select_parts
from keepbest.ranks import Ranks
from keepbest.staging.host import HostStaging
from keepbest.staging.live import Unstaged
from keepbest.staging.slot import Staging

FRESH, STAGED, REFERENCE = "keepbest", "keepbest into a staging buffer", "get_model_state_dict"


class Gather(Action):
    """Brings the weights to rank 0, and lets go of them after."""

    def __init__(self, model: nn.Module, *, staged: bool) -> None:
        items = Items(model, select_parts(model), save_frozen_weights=True)
        self._inventory = Inventory(items, find_format("torch"), Ranks.connect())
        self._staging: Staging = HostStaging(lambda: None) if staged else Unstaged()
        self.weights: Share | None = None

    def act(self) -> None:
        self.weights = gathered(self._inventory, self._staging, "save")

    def settle(self) -> None:
        if self.weights is not None:
            self.weights.slot.release()
        self.weights = None


class Reference(Action):
    """What `torch.distributed.checkpoint` offers for it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.state: dict[str, torch.Tensor] = {}

    def act(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        self.state = get_model_state_dict(self._model, options=options)

    def settle(self) -> None:
        self.state = {}


def measure_on_rank(world_size: int, size: Size) -> Samples:
    model = shard(measure.make_model(size.megabytes), world_size)
    reference = Reference(model)
    ours = {FRESH: Gather(model, staged=False), STAGED: Gather(model, staged=True)}
    reference.act()
    for gather in ours.values():
        gather.act()
        if gather.weights is not None and gather.weights.files:
            same = [torch.equal(gather.weights.files["model"][key], value) for key, value in reference.state.items()]
            if not (same and all(same)):
                raise RuntimeError("the gathered weights differ from those of get_model_state_dict")
        gather.settle()
    reference.settle()
    return measure.alternate({REFERENCE: reference, **ours}, size.repetitions)


def run(quick: bool) -> Report:
    size = Size(8, 3) if quick else Size(1000, 9)
    report = Report()
    for world_size in (2,) if quick else (2, 4):
        samples = measure.on_ranks(world_size, measure_on_rank, world_size, size)[0]
        report.samples[f"{world_size} ranks"] = samples
        for name in (FRESH, STAGED):
            figures = measure.figures(samples, name, REFERENCE)
            half = measure.ratio(samples, name, REFERENCE)
            what = f"FSDP2 gather, {name}, {world_size} ranks"
            report.add(Line(what, half, "at most 0.5 x get_model_state_dict", 0.5, detail=figures))
    return report


if __name__ == "__main__":
    measure.main("gather", run)
