"""A small composite model, its data, and what torch alone makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Dataset

from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.data.container import DataContainer
from keepbest.models import CompositeModel
from keepbest.ranks import Ranks
from keepbest.training.config import TrainerConfig
from keepbest.training.trainer import Trainer

FEATURES = 5
EFFECTIVE_BATCH_SIZE = 24
SAMPLES = 53  # two updates in an epoch, and five samples left over
ADAM = partial(torch.optim.AdamW, lr=0.05)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
OPTIMIZERS = {"encoder": ADAM, "decoder": MOMENTUM}


class Waves(Dataset[Tensor]):
    def __init__(self, length: int = SAMPLES, phase: float = 0.0) -> None:
        self.values = torch.sin(torch.arange(length * FEATURES, dtype=torch.float32) * 1.7 + phase)
        self.values = self.values.reshape(length, FEATURES)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


class AutoEncoder(CompositeModel):
    def __init__(self, hidden: int = 7, dropout: float = 0.0) -> None:
        encoder = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 3))
        super().__init__({"encoder": encoder, "decoder": nn.Linear(3, FEATURES)})

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        code = self.encoder(batch)
        return {"code": code, "output": self.decoder(code)}

    def losses(self, outputs: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        error = (outputs["output"] - batch).square().mean(1)
        size = outputs["code"].abs().mean(1)
        return {"error": error, "size": size, "total": error + 0.1 * size}


class Recorder(PeriodicCallback):
    """Writes down what it sees; its state is the list of the updates at which it was called."""

    def __init__(self, callback_config: Any, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.updates: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"updates": list(self.updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = list(state["updates"])

    def periodic_callback(self, *, update_counter: Any, **_kwargs: Any) -> None:
        self.updates.append(update_counter.update)


def auto_encoder(dropout: float = 0.0, seed: int = 3) -> AutoEncoder:
    torch.manual_seed(seed)
    return AutoEncoder(dropout=dropout)


def make_trainer(
    directory: Path,
    *,
    model: CompositeModel | None = None,
    optimizers: Mapping[str, Callable[..., torch.optim.Optimizer]] = OPTIMIZERS,
    schedule: Any = None,
    resume: Path | str | None = None,
    **settings: Any,
) -> Trainer:
    epochs = None if "updates" in settings else 3
    defaults = {
        "epochs": epochs,
        "effective_batch_size": EFFECTIVE_BATCH_SIZE,
        "precision": "float64",
        "tracker": "none",
    }
    return Trainer(
        TrainerConfig(**{**defaults, **settings}),
        auto_encoder() if model is None else model,
        DataContainer({"train": Waves(), "val": Waves(17, phase=0.5)}),
        directory,
        Ranks.connect(),
        optimizers=optimizers,
        schedule=schedule,
        seed=11,
        resume=resume,
    )


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every rank's copy of all weights."""
    options = StateDictOptions(full_state_dict=True)
    return {name: value.clone() for name, value in get_model_state_dict(trainer.model, options=options).items()}


def weights_by_hand(
    updates: int,
    optimizers: Mapping[str, Any] = OPTIMIZERS,
    *,
    schedule: Any = None,
    most: float | None = None,
    online: list[float] | None = None,
) -> dict[str, Tensor]:
    """The weights after `updates` updates of plain torch, with whole batches in one process.

    Gradients are clipped to the norm `most`; `online` gets the loss of each update.
    """
    model, data = auto_encoder().double(), Waves().values.double()
    steps = [factory(getattr(model, name).parameters()) for name, factory in optimizers.items()]
    schedules = [] if schedule is None else [schedule(step) for step in steps]
    per_epoch = SAMPLES // EFFECTIVE_BATCH_SIZE
    for update in range(updates):
        epoch, place = divmod(update, per_epoch)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(11 + epoch))
        batch = data[order[place * EFFECTIVE_BATCH_SIZE : (place + 1) * EFFECTIVE_BATCH_SIZE]]
        output = model.decoder(code := model.encoder(batch))
        loss = (output - batch).square().mean(1).mean() + 0.1 * code.abs().mean(1).mean()
        loss.backward()
        if online is not None:
            online.append(loss.item())
        if most is not None:
            nn.utils.clip_grad_norm_(model.parameters(), most)
        for step in steps:
            step.step()
            step.zero_grad()
        for each in schedules:
            each.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
