"""`BestCheckpointCallback`: a callback of noether's own trainer that keeps the best of a run with a `BestKeeper`.

In the YAML of a run it takes the place of noether's callback of this name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from noether.core.callbacks import PeriodicCallback
from noether.core.models import Model
from noether.core.providers.metric_property import Ordinality
from noether.core.schemas.callbacks import CallBackBaseConfig
from pydantic import Field

from keepbest.callbacks.component import Component
from keepbest.errors import ConfigError
from keepbest.face import Face
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.metric import Reading, read_reported
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import Hook
from keepbest.ranks import Ranks
from keepbest.run.takeover import Existing
from keepbest.settings import KeeperSettings

if TYPE_CHECKING:
    from noether.core.providers import PathProvider
    from noether.core.utils.training import UpdateCounter

# What the newest checkpoint of noether names is kept under one tag: no hook says which of them are removed.
_PIN = "noether"


class _Keeper(BestKeeper):
    _face = Face(
        Existing(
            resume="resume_run_id, or resume: ledger of the BestCheckpointCallback",
            set_aside="existing='set_aside' of the BestCheckpointCallback",
        ),
        unobserved="the callback needs an interval that comes before the end of training",
    )


class BestCheckpointCallbackConfig(KeeperSettings, CallBackBaseConfig):  # type: ignore[misc]  # it is not installed
    """Config of `BestCheckpointCallback`: that of noether's callback, and the settings of `KeeperSettings`.

    Attributes:
        name: As in noether.
        metric_key: Key of the metric in the log.
        directory: Directory of the run. `None` is the output folder of noether's run, in which noether has a folder
            `checkpoints` too.
        on_new_best: Functions that rank 0 calls with the outcome and the path of each new best when it is on the disk,
            or that every rank calls; each is built from its `kind` and the other keys.
    """

    name: Literal["BestCheckpointCallback"] = "BestCheckpointCallback"
    metric_key: str
    directory: str | None = None
    on_new_best: Annotated[tuple[Component, ...], Field(strict=False)] = ()


class BestCheckpointCallback(PeriodicCallback):  # type: ignore[misc]  # it is not installed
    """Observes a metric of the log at its interval. Its state is in the checkpoints of noether's `CheckpointCallback`.

    It comes after the callback that logs the metric, with the same interval, and before the `CheckpointCallback`. A run
    that resumes another one (`resume_run_id`) continues in the folder of that run.

    Attributes:
        keeper: Keeper of the run. `None` before training.
    """

    def __init__(self, callback_config: BestCheckpointCallbackConfig, **kwargs: Any) -> None:
        super().__init__(callback_config, **kwargs)
        self.metric_key = callback_config.metric_key
        self.keeper: BestKeeper | None = None
        self._config = callback_config
        self._place = _place_of(self.checkpoint_writer.path_provider)
        self._loaded: Mapping[str, Any] | None = None
        self._is_open = False

    @property
    def checkpoint_key(self) -> str:
        """Another for each metric, so that several callbacks need no id."""
        return f"{type(self).__name__}/{self.metric_key}" if self.name is None else str(self.name)

    def state_dict(self) -> dict[str, Any]:
        """The state of the keeper; before there is one, what was loaded. **Collective** during training.

        noether asks for it on every rank when it is about to write. So what the state names is made durable here, and
        is kept until the next time. Raises as `BestKeeper.flush`.
        """
        if self.keeper is not None and self._is_open:
            self.keeper.flush(pin=_PIN)
        state = self._loaded if self.keeper is None else self.keeper.state_dict()
        return {"keeper": state, "place": self._place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this state when training starts. **Rank-local**."""
        self._loaded = state_dict["keeper"]
        self._place = dict(state_dict["place"])

    def before_training(self, *, update_counter: UpdateCounter) -> None:
        """Start the keeper: by now noether has made the weights, or resumed them. **Collective**.

        Raises:
            KeepBestError: On every rank, as `BestKeeper` and its `start`.
        """
        settings = self._config.keeper_arguments()
        settings["model_names"] = _paths_of(self.model, self._config.model_names)
        self.keeper = _Keeper(
            self.model,
            directory=self._directory(),
            metric_key=self.metric_key,
            metric_property_provider=_Directions(self.metric_property_provider),
            on_new_best=Ranks.connect().agree("build on_new_best", self._build_hooks),
            **settings,
        )
        if self._loaded is not None:
            self.keeper.load_state_dict(self._loaded)
        self.keeper.start(at=_iteration_of(update_counter) if self._config.resume == "ledger" else None)
        self._is_open = True

    def periodic_callback(self, *, interval_type: str, update_counter: UpdateCounter, **_kwargs: Any) -> None:
        """Observe the metric, if this is no mere evaluation. **Collective**. Raises as `BestKeeper.observe`."""
        if self.keeper is not None and interval_type != "eval":
            self.keeper.observe_reading(
                partial(_read, self.writer.log_cache, self.metric_key), _iteration_of(update_counter)
            )

    def after_training(self, *, update_counter: UpdateCounter) -> None:
        """Close the keeper. **Collective**. Raises as `BestKeeper.close`."""
        self._is_open = False
        if self.keeper is not None:
            self.keeper.close()

    def _build_hooks(self) -> list[Hook]:
        return [hook.build() for hook in self._config.on_new_best]

    def _directory(self) -> Path | str:
        if self._config.directory is not None:
            return self._config.directory
        provider = self.checkpoint_writer.path_provider
        if self._place != _place_of(provider):
            # The folder of the run that was resumed, whichever that had resumed itself.
            provider = provider.with_run(**self._place)
        return Path(provider.run_output_path)


class _Directions(MetricPropertyProvider):
    """What is registered in noether, and else what the words of a name say.

    noether itself takes a name that it does not know for one of which more is better.
    """

    def __init__(self, of_noether: Any) -> None:
        super().__init__()
        self._of_noether = of_noether

    def higher_is_better(self, metric_key: str) -> bool:
        found = None if self._of_noether is None else self._of_noether.get_ordinality(metric_key)
        if found in (Ordinality.HIGHER_IS_BETTER, Ordinality.LOWER_IS_BETTER):
            return bool(found == Ordinality.HIGHER_IS_BETTER)
        return super().higher_is_better(metric_key)


def _place_of(provider: PathProvider) -> dict[str, Any]:
    """Where a run is below the output folder of all, which may be moved."""
    return {"run_id": provider.run_id, "stage_name": provider.stage_name}


def _paths_of(model: Any, names: Any) -> list[str] | None:
    """The paths in the model of the submodels that noether calls by these names."""
    if not names or list(names) == [model.name]:
        return None
    paths = {module.name: path for path, module in model.named_modules() if path and isinstance(module, Model)}
    if unknown := [name for name in names if name not in paths]:
        known = ", ".join(sorted(paths)) or "none, since it is no CompositeModel"
        raise ConfigError(f"model_names: the model has no submodel {', '.join(unknown)}; there are: {known}")
    return [paths[name] for name in names]


def _iteration_of(update_counter: UpdateCounter) -> TrainingIteration:
    now = update_counter.cur_iteration
    return TrainingIteration(epoch=now.epoch, update=now.update, sample=now.sample)


def _read(logged: Mapping[str, Any] | None, metric_key: str) -> Reading:
    if logged is None or metric_key not in logged:
        known = ", ".join(sorted(logged or {})) or "nothing"
        return Reading(
            absent=f"{metric_key!r} was not logged; logged: {known}. The callback that logs it comes before this one, "
            "with the same interval"
        )
    return read_reported(logged[metric_key], metric_key)
