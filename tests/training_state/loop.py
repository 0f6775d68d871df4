"""A training whose every step is known, and all that it holds, whole, by the plain names of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from keepbest import BestKeeper, load
from keepbest.modules.wrappers import PlainNames
from tests.kit.runs import update

FEATURES = 5
BEST = "best_model.loss"
VALUES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}  # at each update; the best is that of the second

Wrap = Callable[[nn.Module], nn.Module]
Make = Callable[[nn.Module], Optimizer]


class Net(nn.Module):
    """With a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, FEATURES, bias=False)
        self.tied = nn.Linear(FEATURES, FEATURES, bias=False)
        self.third = nn.Linear(FEATURES, FEATURES, bias=False)
        self.third.weight = self.tied.weight
        self.fixed = nn.Linear(FEATURES, FEATURES)
        self.fixed.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.third(torch.tanh(self.tied(self.fixed(self.second(torch.relu(self.module(batch)))))))


class Training:
    """One model with its optimizer and what follows it.

    Args:
        wrap: Strategy.
        make: Function that makes the optimizer.
        seed: Seed of the weights.
        others: Functions that make further training states from the optimizer.
    """

    def __init__(
        self, wrap: Wrap, make: Make, seed: int = 1, others: dict[str, Callable[[Optimizer], Any]] | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.model = wrap(Net())
        self.optimizer = make(self.model)
        self.others = {name: make_other(self.optimizer) for name, make_other in (others or {}).items()}

    @property
    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, **self.others}

    def step(self, number: int) -> None:
        batch = torch.sin(torch.arange(8 * FEATURES, dtype=torch.float32).reshape(8, FEATURES) + number)

        def closure() -> Tensor:
            self.model.zero_grad()
            loss = self.model(batch).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)
        for other in self.others.values():
            if isinstance(other, LRScheduler | Optimizer):
                other.step()

    def run(self, numbers: Iterable[int], keeper: BestKeeper | None = None) -> dict[int, dict[str, Any]]:
        """Trains, and returns all that there is after each update."""
        found = {}
        for number in numbers:
            self.step(number)
            if keeper is not None:
                keeper.observe(VALUES[number], update(number))
            found[number] = self.everything()
        return found

    def keep(self, directory: Path, **settings: Any) -> dict[int, dict[str, Any]]:
        """Trains to the end without a break, and keeps the best of it."""
        with BestKeeper(
            self.model, directory=directory, metric_key="loss", training_state=self.state, **settings
        ) as keeper:
            return self.run(VALUES, keeper)

    def resume(self, directory: Path) -> dict[int, dict[str, Any]]:
        """Continues after the best."""
        load(directory, BEST, self.model, training_state=self.state)
        at_the_best = {2: self.everything()}
        return at_the_best | self.run([3, 4, 5])

    def everything(self) -> dict[str, Any]:
        """All that there is, whole. Collective where it is sharded."""
        names = PlainNames(self.model)
        parameters = {names.plain(key): value for key, value in self.model.named_parameters()}
        found: dict[str, Any] = {name: whole(value) for name, value in parameters.items()}
        by_id = {id(value): name for name, value in parameters.items()}
        groups = []
        for group in self.optimizer.param_groups:
            inside = [by_id[id(parameter)] for parameter in group["params"]]
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append((sorted(inside), {key: whole(value) for key, value in options.items()}))
            for parameter in group["params"]:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    found[f"{by_id[id(parameter)]}/{key}"] = whole(value)
        found["groups"] = sorted(groups, key=lambda group: group[0])
        return found | {name: whole(other.state_dict()) for name, other in self.others.items()}


def whole(value: Any) -> Any:
    """A value as plain Python, so that equal bits are equal values. Collective for what is sharded."""
    if isinstance(value, Tensor):
        value = value.detach()
        return (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list | tuple) else value


def differing(continued: dict[int, dict[str, Any]], uninterrupted: dict[int, dict[str, Any]]) -> list[str]:
    """What is not the same, bit for bit, at an update from the best on."""
    return [
        f"U{number} {name}"
        for number, found in continued.items()
        for name in {**found, **uninterrupted[number]}
        if found.get(name) != uninterrupted[number].get(name)
    ]
