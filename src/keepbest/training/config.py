"""A run as plain data, for example from a YAML file, and the trainer that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.optim import Optimizer
from typing_extensions import Self

from keepbest.callbacks.config import CallBackBaseConfig, Discriminated, import_path
from keepbest.data.container import DataContainer
from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.models import Model
from keepbest.random_state import seed_random_state
from keepbest.training.strategy import OptimizerFactory, Precision, StrategyName
from keepbest.training.trackers import TrackerName

PositiveInt = Annotated[int, Field(gt=0, strict=True)]


class TrainerConfig(BaseModel):
    """How to train.

    Attributes:
        epochs, updates, samples: when training ends; exactly one of them.
        effective_batch_size: samples of one update, over all ranks and accumulation steps; divisible by their product.
        accumulation_steps: micro-batches of one update on each rank.
        precision: of parameters and computation; "bf16" keeps the parameters in float32 and computes with autocast.
        strategy: how the ranks share the model.
        ema_decay: evaluate and keep the exponential moving average of the weights, of which this much stays at each
            update, instead of the weights themselves; `None` keeps no average.
        train_dataset: key of the dataset to train on.
        tracker: where logged scalars go, in the folder of the run.
        callbacks: their configs, in the order in which they are called.
        resume: a resume checkpoint to go on from; "auto" is the newest complete one of this run, if there is any.
        rank_timeout: seconds that ranks wait for each other where they agree on something.
        save_timeout: seconds that they wait for a rank that writes, or is busy with an update.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: PositiveInt | None = None
    updates: PositiveInt | None = None
    samples: PositiveInt | None = None
    effective_batch_size: PositiveInt
    accumulation_steps: PositiveInt = 1
    precision: Precision = "float32"
    strategy: StrategyName = "single"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    train_dataset: str = "train"
    tracker: TrackerName = "jsonl"
    callbacks: list[Annotated[Any, Discriminated(CallBackBaseConfig)]] = []
    resume: str | None = None
    rank_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    save_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1800.0

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        given = {name: getattr(self, name) for name in ("epochs", "updates", "samples") if getattr(self, name)}
        if len(given) != 1:
            raise ConfigError(f"expected exactly one of epochs, updates and samples, found {given or 'none'}")
        return self

    @property
    def end(self) -> TrainingIteration:
        """When training ends, as an iteration with one part."""
        return TrainingIteration(epoch=self.epochs, update=self.updates, sample=self.samples)

    def batch_size(self, world_size: int) -> int:
        """Samples of a micro-batch on one of `world_size` ranks.

        Raises:
            ConfigError: if the effective batch cannot be divided evenly.
        """
        parts = world_size * self.accumulation_steps
        if self.effective_batch_size % parts:
            raise ConfigError(
                f"effective_batch_size={self.effective_batch_size} must be divisible by {world_size} ranks x "
                f"{self.accumulation_steps} accumulation steps = {parts}"
            )
        return self.effective_batch_size // parts


class Component(BaseModel):
    """Something that is built by calling what `kind` names with the other keys as keyword arguments.

    Mappings with a `kind` among the arguments, however deep, are built first.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    def build(self, *arguments: Any) -> Any:
        """Call it. **Rank-local**.

        Raises:
            ConfigError: if there is nothing at `kind`, or it does not take these arguments.
        """
        factory = import_path(self.kind, known=[])
        named = {name: _built(value) for name, value in (self.model_extra or {}).items()}
        try:
            return factory(*arguments, **named)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot build {self.kind} with {sorted(named)}: {error}") from error


class RunConfig(BaseModel):
    """A whole run; keys that are not known are refused.

    Attributes:
        directory: folder of the run.
        seed: of the model's weights, of the order of the samples, and of all random numbers in training.
        model: the model.
        data: the datasets, by key.
        num_workers: processes that load data, for each loader of each rank; 0 loads in the training process.
        optimizer: of all submodels; give either this or `optimizers`.
        optimizers: of each submodel, by its dotted name.
        trainer: how to train.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path
    seed: Annotated[int, Field(ge=0)] = 0
    model: Component
    data: dict[str, Component]
    num_workers: Annotated[int, Field(ge=0)] = 0
    optimizer: Component | None = None
    optimizers: dict[str, Component] | None = None
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _check_optimizers(self) -> Self:
        if (self.optimizer is None) == (self.optimizers is None):
            raise ConfigError("expected either optimizer (of all submodels) or optimizers (by submodel)")
        return self

    def build_model(self) -> Model:
        """The model; seeds the random numbers, so that every rank builds the same weights. **Rank-local**.

        Raises:
            ConfigError: if it cannot be built, or is no `Model`.
        """
        seed_random_state(self.seed)
        model = self.model.build()
        if not isinstance(model, Model):
            raise ConfigError(f"model: {self.model.kind} is a {type(model).__name__}, expected a keepbest Model")
        return model

    def build_data(self) -> DataContainer:
        """The datasets. **Rank-local**.

        Raises:
            ConfigError: if one cannot be built.
        """
        datasets = {key: component.build() for key, component in self.data.items()}
        return DataContainer(datasets, num_workers=self.num_workers)

    def optimizer_factories(self) -> OptimizerFactory | dict[str, OptimizerFactory]:
        """What makes the optimizers of parameters."""
        if self.optimizer is not None:
            return _optimizer_factory(self.optimizer)
        return {name: _optimizer_factory(component) for name, component in (self.optimizers or {}).items()}


def _optimizer_factory(component: Component) -> OptimizerFactory:
    def build(parameters: Any) -> Optimizer:
        return cast("Optimizer", component.build(parameters))

    return build


def _built(value: Any) -> Any:
    if isinstance(value, dict):
        if "kind" in value:
            return Component.model_validate(value).build()
        return {key: _built(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_built(part) for part in value]
    return value
