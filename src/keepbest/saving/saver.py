"""The writing half of a keeper: what rank 0 records and saves, at once or in the background, and what it could not."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from keepbest.capture.gathered import Weights, take_snapshot
from keepbest.capture.local import take_shards
from keepbest.decision import Best, BestState, Observation, Policy
from keepbest.errors import KeepBestError
from keepbest.formats.format import Format
from keepbest.modules.parts import Part
from keepbest.ranks import Ranks
from keepbest.run.layout import CHECKPOINTS, SNAPSHOTS
from keepbest.run.record import Store
from keepbest.run.ref_moves import Kept
from keepbest.run.snapshot_folder import ShardFolder
from keepbest.saving.open_run import SharedRun, Ticket
from keepbest.saving.writer import Job
from keepbest.staging.host import Staging, StagingBuffer

_logger = logging.getLogger(__name__)

DISK_REMEDY = "Free or mend the storage of the run directory and resume: everything committed before is intact"


class Saver:
    """Brings the observations and bests of one keeper into the run folder.

    One path for both ways: what is written is submitted to the run, which writes it at once, or on a thread. In the
    background a failure shows at the next exchange of the ranks; nobody waits for it.

    Args:
        name: of the keeper.
        metric_key: that it monitors.
        policy: of the keeper.
        run: where to write.
        model: whose weights are saved.
        parts: of the model.
        save_frozen_weights: whether parameters that do not require grad are saved.
        ranks: of the model.
        file_format: of the snapshots.
        background: whether to write on a thread.
        goes_on: whether training goes on after a failure.
    """

    def __init__(
        self,
        name: str,
        metric_key: str,
        policy: Policy,
        run: SharedRun,
        model: nn.Module,
        parts: Sequence[Part],
        *,
        save_frozen_weights: bool,
        ranks: Ranks,
        file_format: Format,
        background: bool,
        goes_on: bool,
    ) -> None:
        self._name = name
        self._metric_key = metric_key
        self._policy = policy
        self._run = run
        self._model = model
        self._parts = tuple(parts)
        self._save_frozen_weights = save_frozen_weights
        self._ranks = ranks
        self._format = file_format
        self._goes_on = goes_on
        self._staging = Staging(self._give_up_the_queued) if background else None
        self._failures: deque[Exception] = deque()
        self._told_upload_failure: OSError | None = None
        self._lost_bests = 0
        self._known_lost_bests = 0
        self._queued: _Queued | None = None
        self.best_snapshot: str | None = None

    def start(self) -> None:
        """Get ready to write. **Rank-local**, on rank 0, when the run folder is open."""
        if self._staging is not None:
            self._run.write_in_the_background()

    def record(self, observation: Observation, exceeded: Mapping[int, Best | None]) -> None:
        """Record an observation without a snapshot, and the tolerances that it closes. **Rank-local**."""
        if self._ranks.is_main:
            self._submit(lambda store: store.observe(self._name, observation, exceeded), names_bests=bool(exceeded))

    def correct(self, exceeded: Mapping[int, Best | None]) -> None:
        """Record tolerances that turned out to be closed with another best. **Rank-local**."""
        if self._ranks.is_main and exceeded:
            self._submit(lambda store: store.close_tolerances(self._name, exceeded), names_bests=True)

    def save(self, kept: Kept) -> None:
        """Save the weights of a new best, or of one of the `top_k`. **Collective**.

        Raises:
            StorageError: on every rank, if they cannot be written; in the background, only `take_failure` tells.
            KeepBestError: as `take_snapshot`.
        """
        observation = kept.observation
        content = (id(self._model), self._parts, self._save_frozen_weights, self._format)
        ticket = self._run.snapshot_with(observation.iteration, content)
        weights: Weights | None = None
        if ticket is None and self._format == "dcp":
            ticket = self._save_shards(kept)
            self._run.remember(observation.iteration, content, ticket)
            return
        if ticket is None:
            ticket = Ticket()
            weights = take_snapshot(
                self._model,
                self._parts,
                save_frozen_weights=self._save_frozen_weights,
                ranks=self._ranks,
                staging=self._staging,
            )
        else:
            ticket.is_named = True
        if self._staging is None:
            commit = partial(self._commit, kept, ticket, weights)
            self.best_snapshot = self._on_main(self._step(kept), commit)
        elif self._ranks.is_main:
            names_bests = bool(kept.exceeded)
            job = self._submit(partial(self._commit_in_background, kept, ticket, weights), names_bests=names_bests)
            self._queued = None if weights is None else _Queued(job, ticket, observation, weights)
        self._run.remember(observation.iteration, content, ticket)

    def _save_shards(self, kept: Kept) -> Ticket:
        from keepbest.formats.dcp import write_shards  # torch's distributed checkpoints take half a second to import

        step = self._step(kept)
        weights = take_shards(
            self._model, self._parts, save_frozen_weights=self._save_frozen_weights, ranks=self._ranks
        )

        def begin() -> tuple[str, str, str]:
            return self._run.store().begin_shards(kept.observation, weights, self._selection)

        folder = ShardFolder(*self._on_main(step, begin))
        ticket = Ticket()

        def commit() -> str | None:
            store = self._run.store()
            ticket.snapshot = store.save_shards(self._name, kept, weights, folder, written)
            return store.best_snapshot(self._name)

        try:
            path = self._run.directory / CHECKPOINTS / SNAPSHOTS / folder.temporary
            written = write_shards(path, folder.token, weights, self._ranks, step)
        except KeepBestError:
            if self._ranks.is_main:
                with contextlib.suppress(OSError):  # the first refusal is the cause; the next commit removes it
                    self._run.store().drop_shards(folder)
            raise
        self.best_snapshot = self._on_main(step, commit)
        return ticket

    def _step(self, kept: Kept) -> str:
        what = "the new best" if kept.is_new_best else "one of the best"
        return f"save {what} of {self._metric_key} at {kept.observation.iteration}"

    def _on_main(self, step: str, work: Callable[[], Any]) -> Any:
        return self._ranks.broadcast(step, work, remedy=DISK_REMEDY, saving=True)

    @property
    def _selection(self) -> str:
        return f"{self._name} {self._parts} {self._save_frozen_weights}"

    def take_failure(self) -> Exception | None:
        """What could not be written, for every rank to raise; told once. **Rank-local**."""
        while self._failures:
            failure = self._failures.popleft()
            if not (self._goes_on and isinstance(failure, OSError)):
                return failure
            _logger.warning("%s: not written, training goes on: %s", self._name, failure)
        return None

    def take_upload_failure(self) -> Exception | None:
        """Why the remote copy lags behind, for every rank to raise; each keeper tells it once. **Rank-local**."""
        failure = self._run.upload_failure
        if failure is None or failure is self._told_upload_failure:
            return None
        self._told_upload_failure = failure
        if not self._goes_on:
            return failure
        _logger.warning("%s: training goes on: %s", self._name, failure)
        return None

    def revised_state(self) -> BestState | None:
        """The state without bests that were lost in the background and not all ranks know of. **Rank-local**."""
        if not self._lost_bests:
            return None
        timeline = self._run.store().history.keepers[self._name].present
        self._known_lost_bests = self._lost_bests
        return timeline.state(self._policy, until=timeline.last_iteration)

    def all_know_the_revised_state(self) -> None:
        """Every rank has taken over what `revised_state` gave. **Rank-local**."""
        self._lost_bests -= self._known_lost_bests
        self._known_lost_bests = 0

    def settle(self, step: str) -> BestState | None:
        """Wait for what is being written; the state without bests that were lost, if there are any. **Collective**.

        Raises:
            StorageError: on every rank, if something could not be written.
        """

        def wait() -> dict[str, Any]:
            self._run.store()
            if (failure := self.take_failure()) is not None:
                raise failure
            revised = self.revised_state()
            return {"state": None if revised is None else revised.to_json()}

        news = self._on_main(step, wait)["state"]
        return None if news is None else BestState.from_json(news)

    def write(self, step: str, write: Callable[[Store], None]) -> None:
        """Let rank 0 write something that all must know to be there. **Collective**. Raises as `settle`."""

        def write_now() -> str | None:
            store = self._run.store()
            write(store)
            return store.best_snapshot(self._name)

        self.best_snapshot = self._on_main(step, write_now)

    def arrive(self, step: str) -> None:
        """Wait until the remote copy, if there is one, has all that was committed. **Collective**. Raises as `settle`.

        Where training goes on after a failure, it ends after one, too.
        """

        def wait() -> None:
            try:
                self._run.store().arrive()
            except OSError as error:
                if not self._goes_on:
                    raise
                _logger.warning("%s: %s", self._name, error)

        if self._run.remote is not None:
            self._ranks.broadcast(step, wait, saving=True)

    def _submit(self, write: Callable[[Store], None], *, names_bests: bool) -> Job:
        if names_bests and self._queued is not None:
            self._queued.ticket.is_named = True
        return self._run.submit(write, self._failed)

    def _failed(self, error: Exception) -> None:
        # The other ranks are not waiting: it travels with the next exchange, at no cost to quiet intervals.
        self._failures.append(error)

    def _commit(self, kept: Kept, ticket: Ticket, weights: Weights | None) -> str | None:
        """Write what is kept; returns the name of the best that the run ever saved."""
        store = self._run.store()
        self._write(store, kept, ticket, weights)
        return store.best_snapshot(self._name)

    def _commit_in_background(self, kept: Kept, ticket: Ticket, weights: Weights | None, store: Store) -> None:
        try:
            if weights is not None and weights.buffer is not None:
                weights.buffer.wait()
            self._write(store, kept, ticket, weights)
        except Exception:  # whatever it was, the ledger must know that this best is lost
            self._lost_bests += 1
            store.observe(self._name, replace(kept.observation, durable=False), kept.exceeded)
            raise
        finally:
            self._release(weights)

    def _write(self, store: Store, kept: Kept, ticket: Ticket, weights: Weights | None) -> None:
        if weights is not None:
            ticket.snapshot = store.save(self._name, kept, weights, self._selection, file_format=self._format)
        elif ticket.snapshot is not None:
            store.share(self._name, kept, ticket.snapshot)
        else:
            iteration = kept.observation.iteration
            raise OSError(f"the snapshot of {iteration}, which another keeper took, could not be written")

    def _give_up_the_queued(self) -> StagingBuffer | None:
        queued, self._queued = self._queued, None
        # Where several bests are kept, a better one does not make the queued one needless.
        if queued is None or queued.ticket.is_named or self._policy.top_k > 1:
            return None
        supersede = partial(Store.supersede, keeper=self._name, observation=queued.observation)
        return queued.weights.buffer if self._run.replace(queued.job, supersede) else None

    def _release(self, weights: Weights | None) -> None:
        if self._staging is not None and weights is not None and weights.buffer is not None:
            self._staging.release(weights.buffer)


class _Queued(NamedTuple):
    """The newest save in the background, as long as a newer one may take its place."""

    job: Job
    ticket: Ticket
    observation: Observation
    weights: Weights
