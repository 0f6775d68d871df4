"""`BestKeeper`: the public face of the one path from a rank's value to a durable best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from typing_extensions import Unpack

from keepbest.bookkeeping import Bookkeeping
from keepbest.decision import BestState, Outcome
from keepbest.errors import ConfigError
from keepbest.face import Face
from keepbest.formats.registry import find_format
from keepbest.iteration import TrainingIteration
from keepbest.load import LoadedSnapshot, load_into
from keepbest.metric import Reading, read_value
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import Hook, NewBests
from keepbest.ranks import Ranks
from keepbest.reading.page import fragment_of
from keepbest.run.layout import snapshots_folder
from keepbest.run.takeover import LoadedState, Owner
from keepbest.saving.open_run import OpenRun, WorksInRun
from keepbest.saving.saver import DISK_REMEDY, Saver
from keepbest.saving.turns import in_turn
from keepbest.settings_dict import KeeperSettingsDict

_logger = logging.getLogger(__name__)


@in_turn("start", "observe", "observe_reading", "flush", "release", "close", "abandon", "restore_best")
class BestKeeper(WorksInRun):
    """Keeps the best checkpoints of one metric of a run.

    Creating one is **collective** over the ranks of `process_group`, as are `start`, `observe`, `flush`, `release`,
    `close` and `restore_best`. In a `with` block it starts at the beginning and closes at the end. A block that is left
    by an exception records nothing more. Threads of one process take turns.

    Args:
        model: Model to save: plain, or wrapped by DDP, FSDP1, FSDP2, tensor parallelism, `torch.compile`.
        directory: Directory of the run. Rank 0 alone reads and writes it.
        metric_key: Name of the monitored metric.
        metric_property_provider: What knows the direction of metrics by their names.
        process_group: Group of the ranks that keep the run together. `None` is the default group, or one process.
        training_state: Optimizers and what else is kept with each best to continue from it, by name (docs/own-loop.md).
        on_new_best: Function, or several, that rank 0, or `EveryRank`, calls with each new best (docs/own-loop.md).
        **settings: The settings of `KeeperSettings`, the same on every rank; docs/settings.md has a table of them.

    Raises:
        ConfigError: On every rank, if a setting is unknown or wrong on one of them.
        DesyncError: On every rank, if their settings differ.
    """

    _face = Face()  # an adapter has one of its own
    _repr_html_ = fragment_of  # what a notebook shows of it

    def __init__(
        self,
        model: nn.Module,
        *,
        directory: str | Path,
        metric_key: str,
        metric_property_provider: MetricPropertyProvider | None = None,
        process_group: dist.ProcessGroup | None = None,
        training_state: Mapping[str, Any] | None = None,
        on_new_best: Hook | Sequence[Hook] | None = None,
        **settings: Unpack[KeeperSettingsDict],
    ) -> None:
        # pydantic takes longer to import than all of keepbest, and a process that only loads does not need it.
        from keepbest.settings import CheckedSettings, check_settings, timeouts_to_connect

        self._ranks = Ranks.connect(process_group, **timeouts_to_connect(settings))
        self.metric_key, self._model = metric_key, model
        checked: CheckedSettings = self._ranks.agree(
            f"check the settings of the keeper of {metric_key}",
            lambda: check_settings(
                settings,
                model,
                directory=directory,
                metric_key=metric_key,
                metric_property_provider=metric_property_provider,
                training_state=training_state,
                on_new_best=on_new_best,
            ),
            state=lambda checked: checked.to_compare(),
        )
        self.name, self.policy, self.directory = checked.name, checked.policy, checked.directory
        given = self._settings = checked.given
        self._opening = f"open {directory} for {self.name}"  # it must be the same on every rank
        self._owner = Owner(self.name, metric_key, self.policy.higher_is_better)
        self._direction_from = "the name" if given.higher_is_better is None else "higher_is_better"
        self._run = OpenRun(self.directory).share()
        self._new_bests = NewBests(self.name, checked.hooks, self._run, self._ranks)
        self._saver = Saver(
            self.name,
            self.policy,
            self._run,
            checked.items,
            find_format(given.format),
            ranks=self._ranks,
            in_background=given.async_save,
            device_share=given.staging_device_share,
            tolerates=given.on_save_error == "warn",
        )
        self._origin: tuple[str | None, int | None] = (None, None)  # the run, and the timeline of this keeper in it
        self._loaded: LoadedState | None = None
        self._bookkeeping = Bookkeeping(
            self._owner,
            self.policy,
            given,
            ranks=self._ranks,
            saver=self._saver,
            new_bests=self._new_bests,
            remedy=self._face.missing,
        )
        self._phase: Literal["new", "started", "closed"] = "new"

    def start(self, at: TrainingIteration | None = None) -> None:
        """Open the run folder before `observe` would, so that problems show before training. **Collective**; once.

        Args:
            at: Iteration to resume at, from the ledger. What the ledger has beyond it is abandoned. `None` is the end
                of the ledger, with `resume="ledger"`. A state that was loaded wins over both.

        Raises:
            RunExistsError: On every rank, if the folder holds another run, one that is not resumed, or one in use.
            LedgerError: On every rank, if the ledger is damaged or of another version.
            ConfigError: On every rank, if another keeper has the same name, weights cannot be kept and loaded again,
                a thread cannot be started, or this process was forked from the one that works in the folder.
            SnapshotError: On every rank, if the remote copy cannot be read, or is damaged.
            StorageError: On every rank, if the folder, or the remote storage, cannot be written.
        """
        self._run.refuse_elsewhere()
        if self._phase != "new":
            return
        self._ranks.check_alone()
        step, from_ledger = self._opening, self._settings.resume == "ledger" or at is not None
        try:
            self._saver.look_at_weights(step)
            self._ranks.agree(step, lambda: self._join(at), state=lambda _: f"loaded={self._loaded} at={at}".encode())
            self._saver.check_folder(step)
            existing = self._face.existing._replace(sets_aside=self._settings.existing == "set_aside")
            begin = partial(self._saver.begin, self.metric_key, self._loaded, existing, from_ledger=from_ledger, at=at)
            facts = self._ranks.broadcast(step, begin, remedy=DISK_REMEDY, saving=True)
        except BaseException:
            self._leave()
            raise
        self._origin = facts["run"], facts["timeline"]
        self._bookkeeping.state = BestState.from_json(facts["state"])
        self._saver.best_snapshot = facts["best"]
        self._phase = "started"

    def observe(
        self,
        value: Any,
        iteration: TrainingIteration | None = None,
        *,
        weight: Any = None,
        epoch: int | None = None,
        update: int | None = None,
        sample: int | None = None,
        batch: int | None = None,
    ) -> Outcome:
        """Observe the metric of one interval, and save the model if it is the new best. **Collective**.

        Costs one exchange of 48 bytes where there is no new best.

        Args:
            value: Value of this rank: a number, a tensor or array with one element, a mapping that has it under the
                metric key, a metric of torchmetrics (its own sync of the ranks is the only one) or a function that
                returns one of these. Ranks that are not asked may pass `None`.
            iteration: Training iteration that was completed. It increases from call to call and always names the same
                parts.
            weight: Weight of this rank in the reduction, for example its number of samples; on all ranks or on none.
            epoch: Number of completed epochs, in place of `iteration`, alone or with the next three.
            update: Number of completed optimizer updates.
            sample: Number of completed samples.
            batch: Number of completed batches.

        Raises:
            MetricError: On every rank, if a value is missing or no number, weights are invalid, values differ that must
                be equal, or a value is NaN with `on_nonfinite="raise"`.
            IterationError: On every rank, if there is no iteration, or it does not follow the last one.
            StorageError: On every rank, if the new best, or an earlier record, could not be written.
            RanksError: If the ranks could not agree (see `Ranks.exchange`).
        """
        parts = {"epoch": epoch, "update": update, "sample": sample, "batch": batch}
        read = partial(read_value, value, weight, metric_key=self.metric_key)
        return self._observe(read, partial(TrainingIteration.of, iteration, parts))

    def observe_reading(self, read: Callable[[], Reading], iteration: TrainingIteration) -> Outcome:
        """As `observe`, with a function that reads the value of this rank. What it raises is raised on every rank."""
        return self._observe(read, partial(TrainingIteration.of, iteration, {}))

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` resumes from; the same on every rank. **Rank-local**."""
        return LoadedState(self._owner, *self._origin, self.state).to_json()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state that `state_dict` returned. **Rank-local**: call it on every rank, before `start`.

        Raises:
            ConfigError: If the keeper has started, or this is no state of a keeper of its name, metric and direction.
        """
        if self._phase != "new":
            raise ConfigError("load_state_dict comes too late: load the state before start(), `with` or observe()")
        loaded = LoadedState.from_json(state_dict)
        loaded.check_belongs_to(self._owner)
        self._loaded, self._bookkeeping.state = loaded, loaded.state
        self._origin = loaded.run_id, loaded.timeline

    def flush(self, *, pin: str | None = None) -> None:
        """Make everything observed so far durable. **Collective**.

        Args:
            pin: Tag under which what the present state names is kept, until it is pinned again or released.

        Raises:
            StorageError: On every rank, if something could not be written.
        """
        self.start()
        self._refuse_if_closed()
        self._bookkeeping.settle(f"flush {self.name}", lambda record: record.flush(self.state, pin=pin))
        self._new_bests.call_hooks()

    def release(self, pin: str) -> None:
        """Release what `flush(pin=...)` pinned under this tag, in this run or before a resume. **Collective**.

        A warning says so where nothing was ever pinned under it. Raises as `flush`.
        """
        self.start()
        self._refuse_if_closed()
        self._bookkeeping.settle(f"release {pin} of {self.name}", lambda record: record.unpin(pin))

    def close(self) -> None:
        """End the run: tolerances that were never exceeded get a provisional ref on the best. **Collective**.

        A warning says so where nothing is kept. A second call does nothing.

        Raises:
            StorageError: On every rank, if something could not be written, here or in the remote storage.
        """
        phase, self._phase = self._phase, "closed"
        if phase != "started" or self._run.is_elsewhere:
            return
        self._run.refuse_elsewhere()
        try:
            unobserved = self._face.unobserved
            self._bookkeeping.settle(f"close {self.name}", lambda mine: self._saver.end(mine, self.state, unobserved))
            self._saver.arrive(f"bring {self.name} to {self._settings.remote}")
            self._new_bests.call_hooks()
        finally:
            self._leave()

    def abandon(self) -> None:
        """Leave the run as it is, for another process to resume, when training failed. **Rank-local**."""
        self._phase = "closed"
        self._leave()

    def __enter__(self) -> BestKeeper:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        (self.close if kind is None else self.abandon)()

    def __repr__(self) -> str:
        best = "nothing kept yet" if self.state.best is None else f"best {self.state.best.value}"
        return f"<BestKeeper {self.name} in {self.directory}: {best}>"

    @property
    def state(self) -> BestState:
        """The bookkeeping of the timeline; the same on every rank. **Rank-local**."""
        return self._bookkeeping.state

    @property
    def best_metric_value(self) -> float:
        """The best value of the timeline; the worst infinity before there is one. **Rank-local**."""
        return self.policy.worst if self.state.best is None else self.state.best.value

    @property
    def best_path(self) -> Path | None:
        """Folder of the best snapshot that the run ever saved; `None` before there is one. **Rank-local**.

        With `async_save`, as it was at the last `flush` or `close`.
        """
        name = self._saver.best_snapshot
        return None if name is None else snapshots_folder(self.directory) / name

    def restore_best(self) -> LoadedSnapshot:
        """Load the weights alone of the best that the run ever saved into the live model, as `load`. **Collective**.

        Raises:
            SnapshotError: On every rank, if there is none yet, or it does not fit the model, which is then as it was.
        """
        if self._phase == "started":
            self.flush()
        return load_into(self._model, self.directory, self.name, ranks=self._ranks, step=f"restore {self.name}")

    def _join(self, at: TrainingIteration | None) -> None:
        if at is not None:
            TrainingIteration.of(at, {})
        self._run.join(self.name, self._settings.remote, self)
        self._saver.get_ready()
        if self._ranks.is_main:  # before anything is written, since a handler of the log may raise
            _logger.info("%s starts, direction taken from %s", self._owner, self._direction_from)

    def _leave(self) -> None:
        self._saver.stop()
        self._new_bests.drop()
        self._run.leave(self.name, self)

    def _observe(self, read: Callable[[], Reading], find_iteration: Callable[[], TrainingIteration]) -> Outcome:
        if self._phase == "new":
            self.start()
        self._refuse_if_closed()
        return self._bookkeeping.observe(read, find_iteration)

    def _refuse_if_closed(self) -> None:
        self._run.refuse_elsewhere()
        if self._phase == "closed":
            raise ConfigError(f"the keeper of {self.metric_key} is closed")
