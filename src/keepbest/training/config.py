"""The config of a run: plain data, for example from a YAML file, that describes a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self

from keepbest.callbacks.component import Component
from keepbest.callbacks.config import CallBackBaseConfig, Discriminated
from keepbest.data.container import DataContainer
from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.models import Model
from keepbest.random_state import seed_random_state
from keepbest.remote.storage import local_path
from keepbest.settings import Seconds
from keepbest.training.strategy import OptimizerFactory, Precision, ScheduleFactory, StrategyName
from keepbest.training.trackers import TrackerName

CONFIG_FILE = "config.yaml"
"""Name of the config in the directory of a run."""

PositiveInt = Annotated[int, Field(gt=0, strict=True)]


def _as_path(given: object) -> object:
    """`given` as an absolute path, if it can be one. As `Path`, an empty text would be the present directory."""
    return local_path(given) if isinstance(given, str | Path) else given


class TrainerConfig(BaseModel):
    """How to train.

    Attributes:
        epochs: Number of epochs after which training ends. Exactly one of `epochs`, `updates` and `samples` is set.
        updates: Number of optimizer updates after which training ends.
        samples: Number of samples after which training ends.
        effective_batch_size: Number of samples in one update, over all ranks and accumulation steps. It must be a
            multiple of the product of both.
        accumulation_steps: Number of micro-batches in one update on each rank.
        precision: Precision of parameters and computation. "bf16" keeps the parameters in float32 and computes with
            autocast.
        strategy: Way in which the ranks share the model.
        clip_grad_norm: Largest norm that the gradients of all parameters have together; longer ones are scaled down to
            it before the optimizers use them. `None` leaves them as they are.
        ema_decay: Share of the exponential moving average that stays at each update. The average is then evaluated and
            kept instead of the weights themselves. `None` keeps no average.
        train_dataset: Key of the dataset to train on.
        tracker: Place for logged scalars, in the directory of the run.
        callbacks: Configs of the callbacks, in the order in which they are called.
        resume: Resume checkpoint to resume from; "auto" is the newest complete one of this run, if there is any.
            "best" is the best of the callback with `save_training_state`.
        existing: What happens to a run in the directory where `resume` is not given: "refuse" leaves it as it is, which
            is an error, and "set_aside" moves it to a free directory beside this one, with its config and what was
            logged.
        rank_timeout: Seconds that ranks wait for each other where they agree on something.
        save_timeout: Seconds that ranks wait for a rank that writes, or is busy with an update.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: PositiveInt | None = None
    updates: PositiveInt | None = None
    samples: PositiveInt | None = None
    effective_batch_size: PositiveInt
    accumulation_steps: PositiveInt = 1
    precision: Precision = "float32"
    strategy: StrategyName = "single"
    clip_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    train_dataset: str = "train"
    tracker: TrackerName = "jsonl"
    callbacks: list[Annotated[Any, Discriminated(CallBackBaseConfig)]] = []
    resume: str | None = None
    existing: Literal["refuse", "set_aside"] = "refuse"
    rank_timeout: Seconds = 120.0
    save_timeout: Seconds = 1800.0

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        given = {name: getattr(self, name) for name in ("epochs", "updates", "samples") if getattr(self, name)}
        if len(given) != 1:
            raise ConfigError(f"expected exactly one of epochs, updates and samples, found {given or 'none'}")
        return self

    @property
    def end(self) -> TrainingIteration:
        """The end of training, as an iteration with one part."""
        return TrainingIteration(epoch=self.epochs, update=self.updates, sample=self.samples)

    def batch_size(self, world_size: int) -> int:
        """Number of samples of a micro-batch on one of `world_size` ranks.

        Raises:
            ConfigError: If the effective batch cannot be divided evenly.
        """
        parts = world_size * self.accumulation_steps
        if self.effective_batch_size % parts:
            raise ConfigError(
                f"effective_batch_size={self.effective_batch_size} must be divisible by {world_size} ranks x "
                f"{self.accumulation_steps} accumulation steps = {parts}"
            )
        return self.effective_batch_size // parts


class RunConfig(BaseModel):
    """A whole run. Unknown keys are refused.

    Attributes:
        directory: Directory of the run.
        seed: Seed of the model's weights, of the order of the samples, and of all random numbers in training.
        model: Model to train.
        data: Datasets by key.
        num_workers: Number of processes that load data, for each loader of each rank. 0 loads in the training process.
        optimizer: Optimizer of all submodels. Give either this or `optimizers`.
        optimizers: Optimizers of the submodels, by dotted name.
        schedule: Schedule of the learning rate, such as one of `torch.optim.lr_scheduler`, for each of the optimizers.
            It takes a step after each update. `None` leaves the learning rates as they are.
        trainer: Settings of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Annotated[Path, BeforeValidator(_as_path)]
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    model: Component
    data: dict[str, Component]
    num_workers: Annotated[int, Field(ge=0, strict=True)] = 0
    optimizer: Component | None = None
    optimizers: dict[str, Component] | None = None
    schedule: Component | None = None
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _check_optimizers(self) -> Self:
        if (self.optimizer is None) == (self.optimizers is None):
            raise ConfigError("expected either optimizer (of all submodels) or optimizers (by submodel)")
        return self

    def build_model(self) -> Model:
        """Build the model, with seeded random numbers, so that every rank builds the same weights. **Rank-local**.

        Raises:
            ConfigError: If it cannot be built, or is not a `Model`.
        """
        seed_random_state(self.seed)
        model = self.model.build()
        if not isinstance(model, Model):
            raise ConfigError(f"model: {self.model.kind} is a {type(model).__name__}, expected a keepbest Model")
        return model

    def build_data(self) -> DataContainer:
        """Build the datasets. **Rank-local**.

        Raises:
            ConfigError: If one cannot be built.
        """
        datasets = {key: component.build() for key, component in self.data.items()}
        return DataContainer(datasets, num_workers=self.num_workers)

    def optimizer_factories(self) -> OptimizerFactory | dict[str, OptimizerFactory]:
        """The functions that make optimizers of parameters: one for all submodels, or one for each. **Rank-local**."""
        if self.optimizer is not None:
            return _optimizer_factory(self.optimizer)
        return {name: _optimizer_factory(component) for name, component in (self.optimizers or {}).items()}

    def schedule_factory(self) -> ScheduleFactory | None:
        """The function that makes the schedule of an optimizer; `None` if there is none. **Rank-local**."""
        schedule = self.schedule
        return None if schedule is None else lambda optimizer: cast("LRScheduler", schedule.build(optimizer))


def _optimizer_factory(component: Component) -> OptimizerFactory:
    def build(parameters: Any) -> Optimizer:
        return cast("Optimizer", component.build(parameters))

    return build
