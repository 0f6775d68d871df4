"""What each epoch of training logs by itself: the losses in training, and the learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from keepbest.iteration import TrainingIteration
from keepbest.ranks import Ranks
from keepbest.training.log_writer import ScalarWriter

_ONLINE, _LEARNING_RATE = "loss/online/", "learning_rate/"
_MOST_SHOWN = 5  # values in the line of an epoch


class OnlineLosses:
    """The losses of the samples that were trained on since the epoch began: a training state, which ranks do not share.

    They stay on the device until they are asked for, since training would wait for it at each update.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of an update: name -> tensor of shape `[samples]`. **Rank-local**."""
        for name, values in losses.items():
            total = values.double().sum()
            self._sums[name] = total + self._sums[name] if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def take_means(self, ranks: Ranks) -> dict[str, float]:
        """The mean over the samples of all ranks that have the loss, by name, and begin anew. **Collective**.

        Raises:
            KeepBestError: As `Ranks.gather_json`.
        """
        # What a device fails at is known on every rank.
        found = ranks.gather_json("add up the losses in training", self._take)
        means = {}
        for name in dict.fromkeys(name for each in found for name in each["sums"]):
            # `math.fsum` would raise where ranks hold infinities of both signs.
            total, count = (sum(each[kind].get(name, 0) for each in found) for kind in ("sums", "counts"))
            means[name] = total / count
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far. **Rank-local**."""
        return {"sums": {name: total.item() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned. **Rank-local**."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device="cpu") for name, total in state_dict["sums"].items()
        }
        self._counts = dict(state_dict["counts"])

    def _take(self) -> dict[str, Any]:
        taken = self.state_dict()
        self._sums, self._counts = {}, {}
        return taken


def log_epoch(losses: OnlineLosses, optimizers: Mapping[str, Optimizer], writer: ScalarWriter, ranks: Ranks) -> None:
    """Log `loss/online/<name>`, and `learning_rate/<submodel>` where the optimizer has one. **Collective**.

    The loss of a sample is the one that it had when it was trained on, so each is of other weights.

    Raises:
        KeepBestError: As `OnlineLosses.take_means`.
    """
    for name, mean in losses.take_means(ranks).items():
        writer.add_scalar(f"{_ONLINE}{name}", mean)
    for name, optimizer in optimizers.items():
        for suffix, rate in _learning_rates(optimizer):
            writer.add_scalar(f"{_LEARNING_RATE}{name}{suffix}", rate)


def line_of_epoch(iteration: TrainingIteration, writer: ScalarWriter) -> str:
    """What was logged at the end of an epoch, in a line: first what callbacks logged. **Rank-local**."""
    logged = {key: scalar.value for key, scalar in writer.log_cache.items() if scalar.iteration == iteration}
    found = [f"{key} {logged[key]:.4g}" for key in sorted(logged, key=_place_in_line)]
    more = [f"and {len(found) - _MOST_SHOWN} more"] if len(found) > _MOST_SHOWN else []
    return f"epoch {iteration.epoch}: {', '.join([*found[:_MOST_SHOWN], *more])}"


def _place_in_line(key: str) -> int:
    if key.startswith(_ONLINE):
        return 1 if key == f"{_ONLINE}total" else 3
    return 2 if key.startswith(_LEARNING_RATE) else 0


def _learning_rates(optimizer: Optimizer) -> Iterator[tuple[str, float | Tensor]]:
    groups = optimizer.param_groups
    for number, group in enumerate(groups):
        if "lr" in group:
            yield f"/{number}" if len(groups) > 1 else "", group["lr"]
