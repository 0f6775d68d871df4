"""The writing half of a keeper: what rank 0 records and saves, at once or in the background."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch

from keepbest.capture.inventory import Inventory
from keepbest.capture.share import Items
from keepbest.capture.ways import find_way
from keepbest.decision import Best, BestState, Observation, Policy
from keepbest.errors import ConfigError, StorageError
from keepbest.formats.format import Format
from keepbest.iteration import TrainingIteration
from keepbest.modules.zero import whole_parameters
from keepbest.ranks import NO_REMEDY, Number, Ranks
from keepbest.run.record import KeeperRecord, Revision
from keepbest.run.ref_moves import Kept
from keepbest.run.takeover import Existing, LoadedState
from keepbest.saving.job import PendingSnapshot, SaveJob
from keepbest.saving.losses import Losses
from keepbest.saving.open_run import OpenRun
from keepbest.saving.shared_folder import check_is_shared
from keepbest.staging.device import is_capturing
from keepbest.staging.host import HostStaging
from keepbest.staging.live import Unstaged
from keepbest.staging.slot import Slot, Staging
from keepbest.user_code import Log

_logger = Log(__name__)

DISK_REMEDY = "Free or repair the storage of the run directory and resume: everything committed before is intact"
_IN_GRAPH = (
    "a CUDA graph is being captured on the current stream. What is recorded then has no values yet, so nothing can be "
    "observed or saved: capture the training step alone, and observe between its replays"
)


class Saver:
    """Brings the observations and bests of one keeper into the run folder.

    There is one path: the weights are captured, the ranks that write come together, and rank 0 runs a job that writes
    and commits. Where saves are waited for, rank 0 runs it now and every rank gets the outcome. In the background the
    worker of the run does it, and a failure shows at the next exchange of the ranks.

    Args:
        name: Name of the keeper.
        policy: Policy of the keeper.
        run: Where to write.
        items: What is saved.
        format: Format of the snapshots.
        ranks: Ranks of the model.
        in_background: Whether training continues while rank 0 writes.
        device_share: Share of the free memory of a CUDA device that copies of the weights may take for a moment.
        tolerates: Whether training continues after a failure of the storage.

    Attributes:
        best_snapshot: Name of the best snapshot that the run ever saved, as far as this rank knows.
        is_in_doubt: Whether the newest observation may be recorded or not, since what records it has not returned.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        run: OpenRun,
        items: Items,
        format: Format,  # noqa: A002  # the word of the setting
        *,
        ranks: Ranks,
        in_background: bool,
        device_share: float,
        tolerates: bool,
    ) -> None:
        self._name, self._policy, self._run = name, policy, run
        self._inventory = Inventory(items, format, ranks)
        self._format = format
        self._way = find_way(format.capture)
        self._ranks = ranks
        self._in_background, self._tolerates = in_background, tolerates
        self._device_share = device_share
        self._staging = self._new_staging()
        self._selection = f"{name} {items.parts} {items.save_frozen_weights} {list(items.training_state)}"
        self._queued: PendingSnapshot | None = None
        self._has_given_up = False
        self._record: KeeperRecord | None = None
        self.losses = Losses(name, tolerates=tolerates)
        self.best_snapshot: str | None = None
        self.is_in_doubt = False

    def look_at_weights(self, step: str) -> None:
        """Check that what the ranks hold can be kept and loaded again. **Collective**.

        Raises:
            ConfigError: On every rank, if it cannot. It names the weight, the ranks and the way out.
        """
        with whole_parameters(self._inventory.items.model):
            self._inventory.take(step)

    def check_folder(self, step: str) -> None:
        """Check that the ranks that write see one folder. **Collective** where several write.

        Raises:
            StorageError: On every rank, if they do not.
        """
        if self._way.is_local:
            check_is_shared(self._run.directory, self._run.files, self._ranks, step)

    def get_ready(self) -> None:
        """Start the threads of a rank that writes. **Rank-local**. Raises `ConfigError` if they cannot be started."""
        if self._in_background and (self._ranks.is_main or self._way.is_local):
            self._run.write_in_the_background(self._ranks.leave)
        self._staging.prepare(self._way.needs(self._inventory))

    def begin(
        self,
        metric_key: str,
        loaded: LoadedState | None,
        existing: Existing,
        *,
        from_ledger: bool,
        at: TrainingIteration | None,
    ) -> dict[str, Any]:
        """Start or resume the keeper in the run folder, and write there from now on. **Rank-local**, on rank 0.

        Args and errors as `KeeperRecord.begin`.

        Returns:
            What every rank has to know, as JSON values.
        """
        self._record = record = KeeperRecord(self._run.open_folder(), self._name, metric_key, self._policy)
        state = record.begin(loaded=loaded, from_ledger=from_ledger, at=at, existing=existing)
        run, timeline = record.folder.run_id, record.history.present.number
        return {"run": run, "timeline": timeline, "state": state.to_json(), "best": record.best_snapshot}

    def stop(self) -> None:
        """Free what is staged, as soon as it is written. **Rank-local**."""
        self._ranks.leave()
        self._staging.close()
        self._inventory.forget()
        self._staging, self._queued = self._new_staging(), None  # a start that failed may be tried again

    def record(self, observation: Observation, exceeded: Mapping[int, Best | None]) -> None:
        """Record an observation without a snapshot, and the tolerances that it closes. **Rank-local**."""
        step = f"record {observation.iteration} of {self._name}"
        self._submit(step, lambda record: record.observe(observation, exceeded), names_bests=bool(exceeded))

    def save(self, kept: Kept, step: str, on_commit: Callable[[str], None]) -> None:
        """Save the weights of a new best, or of one of the top k. **Collective**.

        Args:
            kept: Observation whose weights are saved, and what follows from it.
            step: What is being done, in words.
            on_commit: Function that rank 0 calls with the name of the snapshot once it is committed as a new best, on
                any thread.

        Raises:
            StorageError: On every rank, if they cannot be written. In the background the next exchange raises it.
            KeepBestError: As the capture of the format.
        """
        try:
            with whole_parameters(self._inventory.items.model):
                self._save(kept, step, on_commit)
        finally:
            if self._record is not None and not self._in_background:
                self._record.folder.end_snapshot()

    def _save(self, kept: Kept, step: str, on_commit: Callable[[str], None]) -> None:
        iteration, items = kept.observation.iteration, self._inventory.items
        states = tuple((each, id(thing)) for each, thing in items.training_state.items())
        content = (id(items.model), items.parts, items.save_frozen_weights, self._format.name, states)
        shared = self._unchanged_snapshot(iteration, content, step)
        snapshot = self._capture(kept, step) if shared is None else shared
        job = None
        if self._record is not None:
            job = SaveJob(kept, snapshot, self._record, is_first=shared is None, on_commit=on_commit)
        if not self._in_background:
            self.best_snapshot = self._on_main(step, lambda record: self._run_now(job, record))
        elif job is not None:
            self._submit(step, partial(self._run_in_background, job, kept), names_bests=bool(kept.exceeded))
            self._queued = snapshot
        else:
            self._run.worker.submit(snapshot.contribute, partial(self._note_failure, step))
        if shared is None:
            # All ranks come here, or none: a snapshot that is known to have failed is not shared.
            self._run.remember(iteration, content, snapshot, self._inventory.mark)

    def revised_state(self) -> Revision | None:
        """What is recorded, if not all ranks know it. **Rank-local**.

        Raises:
            OSError: If it cannot be known, since the file system refuses to finish what was interrupted.
        """
        if self._record is None or not (self.losses.announce() or self.is_in_doubt):
            return None
        self._submit(f"record what {self._name} keeps", KeeperRecord.drop_skipped, names_bests=False)
        self._run.worker.drain()
        return self._record.revision(self._policy)

    def all_know(self, revision: Revision) -> None:
        """Every rank has adopted the revision. Tolerances that it closes are recorded. **Rank-local**."""
        exceeded = revision.state.exceeded
        if exceeded:
            step = f"record the tolerances of {self._name}"
            self._submit(step, lambda record: record.close_tolerances(exceeded), names_bests=True)
        # Last, so that a revision comes again if this is interrupted.
        self.losses.all_know()
        self.is_in_doubt = False

    def take_failure(self) -> BaseException | None:
        """What every rank has to raise, since this one cannot save now, or could not write or upload. **Rank-local**.

        What could not be written or uploaded comes once.
        """
        if is_capturing():
            return ConfigError(_IN_GRAPH)
        folder = self._run.folder
        return self.losses.take() or self.losses.take_upload(None if folder is None else folder.copy)

    def settle(self, step: str) -> Revision | None:
        """Wait for what is being written, and return what is recorded, if not all ranks know it. **Collective**.

        What could not be written is raised by `write`, so that all ranks know before what there is.

        Raises:
            StorageError: On every rank, if it cannot be known what is recorded.
        """

        def wait(record: KeeperRecord) -> tuple[str | None, str | None]:
            revised = self.revised_state()
            return None if revised is None else revised.to_text(), record.best_snapshot

        news, self.best_snapshot = self._on_main(step, wait)
        return None if news is None else Revision.from_text(news)

    def write(self, step: str, write: Callable[[KeeperRecord], None]) -> None:
        """Let rank 0 write something that all must know to be there. **Collective**.

        Raises:
            StorageError: On every rank, if this, or something before it, could not be written.
        """

        def write_now(record: KeeperRecord) -> str | None:
            if (failure := self.losses.take()) is not None:
                raise failure
            write(record)
            return record.best_snapshot

        self.best_snapshot = self._on_main(step, write_now)

    def arrive(self, step: str) -> None:
        """Wait until the remote copy, if there is one, has all that was committed. **Collective**. Raises as `write`.

        Where training continues after a failure, it also ends after one.
        """

        def wait(record: KeeperRecord) -> None:
            try:
                if record.folder.copy is not None:
                    record.folder.copy.arrive()
            except OSError as error:
                if not self._tolerates:
                    raise
                _logger.warning("%s: %s", self._name, error)

        if self._run.remote is not None:
            self._on_main(step, wait, remedy=NO_REMEDY)

    def log_lost(self, iteration: TrainingIteration, error: StorageError) -> None:
        """Log on every rank that a new best was not saved. **Collective**: what a handler raises, every rank raises."""
        log = partial(_logger.warning, "%s: the new best at %s was not saved: %s", self._name, iteration, error)
        self._ranks.agree(f"log that the new best at {iteration} was not saved", log)

    def end(self, record: KeeperRecord, state: BestState, remedy: str) -> None:
        """Record the end, and warn where nothing is kept, neither now nor before. **Rank-local**, on rank 0.

        Args:
            record: Record of the keeper.
            state: Bookkeeping at the end.
            remedy: What to do where nothing was observed.
        """
        record.end(state)
        if state.best is not None or self.best_snapshot is not None:
            return
        if state.last_iteration is None:
            reason = f"nothing was observed: {remedy}"
        else:
            reason = f"no finite value was observed and saved up to {state.last_iteration}"
        _logger.warning("%s: the run ends and no best is kept, since %s", self._name, reason)

    def _new_staging(self) -> Staging:
        if not self._in_background:
            return Unstaged()
        # One rank alone cannot know which save all others have only queued.
        make_room = (lambda: None) if self._way.is_local else self._give_up_the_queued
        return HostStaging(make_room, device_share=self._device_share)

    def _capture(self, kept: Kept, step: str) -> PendingSnapshot:
        """A snapshot of the weights as they are now. **Collective**."""
        self._has_given_up = False
        self._inventory.is_watched = self._run.has_several_keepers
        try:
            # What a user evaluates in inference mode must not decide what tensors, which are used again, are made of.
            with torch.inference_mode(mode=False), torch.no_grad():
                share = self._way.capture(self._inventory, self._staging, step)
        except BaseException:
            if self._has_given_up:  # for nothing: it has no weights, and no better one follows
                self.losses.lose_best()
            raise
        snapshot = PendingSnapshot(
            share,
            self._format,
            kept.observation.iteration,
            kept.observation.value,
            directory=self._run.directory,
            files=self._run.files,
            selection=self._selection,
            record=self._record,
        )
        snapshot.meet(self._run.worker.drain)
        return snapshot

    def _unchanged_snapshot(self, iteration: TrainingIteration, content: Hashable, step: str) -> PendingSnapshot | None:
        """The snapshot that another keeper has just taken of these weights, if no rank has changed them since."""
        taken = self._run.snapshot_with(iteration, content)
        if taken is None:
            return None
        snapshot, mark = taken

        def compare() -> tuple[None, Number]:
            return None, Number(float(self._inventory.mark_now() != mark), None)

        # The ranks agree, since one that shares would leave those waiting that gather.
        _, changed = self._ranks.compare(f"look for changes to {step}", compare)
        return None if any(number.value for number in changed) else snapshot

    def _run_now(self, job: SaveJob | None, record: KeeperRecord) -> str | None:
        if job is not None:
            job.run()
        return record.best_snapshot

    def _run_in_background(self, job: SaveJob, kept: Kept, record: KeeperRecord) -> None:
        try:
            try:
                job.run()
            finally:  # before what follows, which removes what the disk did not let go
                record.folder.end_snapshot()
        except Exception as error:  # whichever it was, the ledger must know that it is lost, unless it has it already
            is_withdrawn = isinstance(error, OSError) and not job.is_skipped
            if is_withdrawn or not record.has(kept.observation):
                self.losses.lose_best()
                record.lose(kept.observation)
            raise

    def _on_main(self, step: str, work: Callable[[KeeperRecord], Any], *, remedy: str = DISK_REMEDY) -> Any:
        """Do `work` on rank 0 after everything that is queued, and hand its JSON value to every rank."""
        record = self._record

        def work_now() -> Any:
            self._run.worker.drain()
            return None if record is None else work(record)

        return self._ranks.broadcast(step, work_now, remedy=remedy, saving=True)

    def _submit(self, step: str, write: Callable[[KeeperRecord], None], *, names_bests: bool) -> None:
        if self._record is None:
            return
        if names_bests and self._queued is not None:
            self._queued.need()
        self._run.worker.submit(partial(write, self._record), partial(self._note_failure, step))

    def _note_failure(self, step: str, failure: BaseException) -> None:
        """Note that something could not be written, from any thread, with what it was: a later call raises it."""
        noted = failure
        if isinstance(failure, OSError):
            place = f"rank {self._ranks.rank} of {self._ranks.world_size}"
            reason = f"{type(failure).__name__}: {failure}"
            noted = StorageError(f"failed to {step} on {place}: {reason}. {DISK_REMEDY}")
            noted.__cause__ = failure
        self.losses.add(noted)

    def _give_up_the_queued(self) -> Slot | None:
        queued, self._queued = self._queued, None
        # Where several bests are kept, a better one does not make the queued one unnecessary.
        slot = None if queued is None or self._policy.top_k > 1 else queued.give_up()
        self._has_given_up = slot is not None
        return slot
