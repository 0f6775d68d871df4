"""Models with odd weights, and what a snapshot of them must hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keepbest.models import CompositeModel


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, batch):
        return self.second(self.first(batch))


class Odd(nn.Module):
    """Odd shapes, a parameter that is smaller than the number of ranks, tied ones, buffers, and a child `module`."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.module = nn.Linear(width, 7)
        self.norm = nn.BatchNorm1d(7)
        self.down = nn.Linear(7, width)
        self.tied = Tied()
        self.one = nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Scalar(Odd):
    """Odd, with a parameter of no dimensions and one of no elements, which FSDP does not take."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))


class Composite(CompositeModel):
    """With a parameter of its own, outside of its submodels."""

    def __init__(self, submodels):
        super().__init__(submodels)
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        raise NotImplementedError

    def losses(self, outputs, batch):
        raise NotImplementedError


class WithState(nn.Linear):
    """With an extra state of any kind."""

    def __init__(self, state: Any, width: int = 1, **options: Any):
        super().__init__(width, width, **options)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Bare(Composite):
    """Without one."""

    def __init__(self, submodels):
        super().__init__(submodels)
        del self.scale


def filled(model: nn.Module, seed: int) -> nn.Module:
    """`model` with weights of `seed`, among them values that only a comparison of bits tells apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.random_(0, 1000, generator=generator)
        largest = max(model.parameters(), key=lambda parameter: parameter.numel()).view(-1)
        largest[:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-41], dtype=largest.dtype)
    return model


def odd(seed: int = 0) -> nn.Module:
    return filled(Odd(), seed)


def odd_bf16(seed: int = 0) -> nn.Module:
    return filled(Odd().bfloat16(), seed)


def scalar(seed: int = 0) -> nn.Module:
    return filled(Scalar(), seed)


def nested(seed: int = 0) -> nn.Module:
    """A composite in a composite, with a part in bf16 and a frozen part."""
    inner = Bare({"encoder": Odd(), "decoder": nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1)).bfloat16()})
    model = Composite({"autoencoder": inner, "head": nn.Linear(5, 7)})
    model.head.requires_grad_(False)
    return filled(model, seed)


def flat(seed: int = 0, kind: type[CompositeModel] = Composite) -> nn.Module:
    """A composite of one dtype that trains as a whole, for strategies that want one flat parameter."""
    return filled(kind({"encoder": Odd(), "decoder": nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1))}), seed)


def bare(seed: int = 0) -> nn.Module:
    return flat(seed, Bare)


def expected_files(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What a snapshot of the unwrapped `model` must hold: part -> the state dict that torch makes of it."""
    if isinstance(model, Odd):
        return {"model": clone(model.state_dict())}
    names = ["encoder", "decoder"]
    if hasattr(model, "autoencoder"):
        names = ["autoencoder.encoder", "autoencoder.decoder", "head"]
    files = {name: clone(model.get_submodule(name).state_dict()) for name in names}
    return {**files, "model": clone({"scale": model.scale})} if hasattr(model, "scale") else files


def clone(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, shapes, dtypes and bits."""
    return found.keys() == expected.keys() and all(same_bits(found[key], value) for key, value in expected.items())


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return (
        type(found) in (Tensor, nn.Parameter)
        and found.device == expected.device
        and found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (found, expected)))
    )


class Around(nn.Module):
    """A wrapper as users write it, and Lightning's Fabric has it: its state dict is that of the module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Tensor) -> Tensor:
        return self.inner(batch)

    def state_dict(self, *arguments, **named):
        return self.inner.state_dict(*arguments, **named)

    def load_state_dict(self, *arguments, **named):
        return self.inner.load_state_dict(*arguments, **named)
