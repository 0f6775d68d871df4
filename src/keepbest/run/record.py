"""The run folder, as rank 0 keeps it.

A commit is: files into a temporary folder, each synced -> rename -> the folder above synced -> one ledger line synced
(this is the commit) -> refs -> garbage. Opening a folder after a crash only ever rolls forward from the last line.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from keepbest.capture.gathered import Weights
from keepbest.decision import Best, BestState, Observation, Policy
from keepbest.errors import ConfigError
from keepbest.iteration import TrainingIteration
from keepbest.run.files import Files
from keepbest.run.folder import Commits
from keepbest.run.history import History, begin_line, observation_line
from keepbest.run.layout import CHECKPOINTS, SNAPSHOTS
from keepbest.run.ref_moves import Kept, Moves, moves_of, resumed, tolerance_moves
from keepbest.run.snapshot_folder import ShardFolder, SnapshotFolder
from keepbest.run.takeover import LoadedState, check_takeover

_logger = logging.getLogger(__name__)


class Store:
    """Everything on the disk of one run. **Rank-local**: rank 0 alone has one.

    Nothing is changed before the first keeper has begun, so that a folder of another run stays as it is.

    Args:
        directory: of the run.
        files: by which the folder is changed.
        remote: URL of a copy that follows each commit, on a thread.

    Raises:
        RunExistsError: if another process owns the folder.
        LedgerError: if the ledger is damaged or of another format.
        OSError: whatever the file system answers.
    """

    def __init__(self, directory: Path, files: Files | None = None, *, remote: str | None = None) -> None:
        self._files = files or Files()
        self._folder = directory / CHECKPOINTS
        self._snapshots = SnapshotFolder(self._files, self._folder / SNAPSHOTS)
        self._files.make_folder(self._folder / SNAPSHOTS)
        self._commits = Commits(self._folder, self._files, self._snapshots, remote)

    @property
    def history(self) -> History:
        """What the ledger tells of the run."""
        return self._commits.history

    def begin(
        self,
        keeper: str,
        metric_key: str,
        policy: Policy,
        *,
        loaded: LoadedState | None = None,
        from_ledger: bool = False,
        at: TrainingIteration | None = None,
    ) -> BestState:
        """Let `keeper` take up its work, and bring the folder into the state that the ledger tells.

        Args:
            keeper: name of its ref on the best.
            metric_key: what it monitors.
            policy: by which it decides.
            loaded: the state to resume from; the ledger up to its last iteration wins over it.
            from_ledger: resume from the ledger alone.
            at: with `from_ledger`, the iteration that training stands at; `None` is the end of the ledger.

        Raises:
            RunExistsError: if the folder holds a run that is not resumed, or another one than `loaded` is of.
            ConfigError: if another keeper has this name, or the run kept the metric in the other direction.
            LedgerError: if the ledger is not the one that the folder was written with, or that its remote copy has.
            SnapshotError: if the remote copy cannot be read.
            OSError: whatever the file system, or the remote storage, answers.
        """
        resumes = loaded is not None or from_ledger
        check = partial(check_takeover, keeper=keeper, policy=policy, loaded=loaded)
        check(str(self._folder), self.history, resumes=resumes or not self._commits.is_taken_up)
        is_first_to_follow = self._commits.take_up_remote(partial(check, resumes=resumes))
        self._commits.check_is_whole()
        past = self.history.keepers.get(keeper)
        branch = None if past is None else past.timeline(None if loaded is None else loaded.timeline)
        if loaded is not None:
            at = loaded.state.last_iteration
        elif at is None and branch is not None:
            at = branch.last_iteration
        base: BestState | None = None
        refs: Moves = {}
        if past is not None and branch is not None and branch.reaches(at):
            state, refs = resumed(keeper, self.history, policy, branch, at, self._snapshots.holds)
        else:
            state = base = BestState() if loaded is None else loaded.state
        if loaded is not None and state != loaded.state:
            _logger.warning(
                "%s: the ledger tells another state than the one that was loaded, and wins. Ledger: %s. Loaded: %s.",
                keeper,
                state.to_json(),
                loaded.state.to_json(),
            )
        self._commits.open(None if loaded is None else loaded.run_id)
        number = None if branch is None else branch.number
        self._commits.commit(begin_line(keeper, metric_key, policy, timeline=number, at=at, state=base, refs=refs))
        if is_first_to_follow:
            self._commits.arrive()  # a bucket that is not there shows before training
        return state

    def observe(self, keeper: str, observation: Observation, newly_exceeded: Mapping[int, Best | None]) -> None:
        """Record an observation without a snapshot, and set the refs of the tolerances that it closes.

        Raises:
            OSError: whatever the file system answers; the observation then goes to the disk with the next line.
        """
        refs = self._tolerance_moves(keeper, newly_exceeded)
        line = observation_line(keeper, observation, refs)
        if refs:
            self._commits.commit(line)
        else:
            self._commits.append(line)

    def save(
        self,
        keeper: str,
        kept: Kept,
        weights: Weights,
        selection: str,
        *,
        file_format: str = "torch",
    ) -> str:
        """Make the weights of a new timeline best, or of one of the `top_k`, durable, and move the refs.

        Args:
            keeper: whose best it is.
            kept: the observation, whose iteration names the snapshot, and what follows from it.
            weights: what is written.
            selection: what was selected to be saved; tells snapshots of one iteration apart.
            file_format: of the files, one of `FILE_FORMATS`.

        Returns:
            The name of the snapshot.

        Raises:
            ConfigError: if there is nothing to save.
            OSError: whatever the file system answers; nothing was saved or recorded then.
        """
        name = self._free_name(kept.observation, weights, selection)
        about = self._about(keeper, kept.observation)
        return self._save(keeper, kept, name, self._snapshots.write(name, weights, about, file_format=file_format))

    def begin_shards(self, observation: Observation, weights: Weights, selection: str) -> ShardFolder:
        """Make a folder for every rank to write its share of a new best into, before `save_shards`.

        Raises:
            ConfigError: if there is nothing to save.
            OSError: whatever the file system answers.
        """
        name = self._free_name(observation, weights, selection)
        folder = self._snapshots.begin(name)
        token = f"made-by-rank-0-{uuid.uuid4().hex}"
        self._files.create(folder / token).close()
        return ShardFolder(name, folder.name, token)

    def save_shards(
        self, keeper: str, kept: Kept, weights: Weights, folder: ShardFolder, written: Mapping[str, Any]
    ) -> str:
        """As `save`, for weights that all ranks have written.

        Args:
            keeper: as in `save`.
            kept: as in `save`.
            weights: that were written.
            folder: from `begin_shards`.
            written: what is recorded of each file.
        """
        self._files.remove(self._folder / SNAPSHOTS / folder.temporary / folder.token)
        about = self._about(keeper, kept.observation)
        return self._save(
            keeper, kept, folder.snapshot, self._snapshots.publish(folder.snapshot, weights, written, about)
        )

    def drop_shards(self, folder: ShardFolder) -> None:
        """Give up what `begin_shards` began. Raises `OSError`."""
        self._snapshots.remove(folder.temporary)

    def _free_name(self, observation: Observation, weights: Weights, selection: str) -> str:
        if not weights.files:
            raise ConfigError(
                "everything that is selected to be saved is frozen, and save_frozen_weights is false: nothing to save"
            )
        return self._snapshots.free_name(observation.iteration, self.history.restarts, selection)

    def _about(self, keeper: str, observation: Observation) -> dict[str, Any]:
        return {
            "run": self.history.run_id,
            "iteration": str(observation.iteration),
            "keeper": keeper,
            "metric_key": self.history.keepers[keeper].metric_key,
            "value": observation.value,
        }

    def _save(self, keeper: str, kept: Kept, name: str, manifest: str) -> str:
        try:
            self._commit_kept(keeper, kept, name, manifest)
        except OSError:
            # A line that could not be taken back may be read as committed, and then needs its snapshot.
            if not self._commits.is_torn:
                with contextlib.suppress(OSError):  # the first refusal is the cause; the next commit removes it
                    self._snapshots.remove(name)
            raise
        return name

    def supersede(self, keeper: str, observation: Observation) -> None:
        """Record a new timeline best whose weights nobody needs any more, since a better one follows.

        Raises:
            OSError: whatever the file system answers; it then goes to the disk with the next line.
        """
        self._commits.append({**observation_line(keeper, observation), "superseded": True})

    def close_tolerances(self, keeper: str, exceeded: Mapping[int, Best | None]) -> None:
        """Set the refs of tolerances that closed earlier than was known, since a save had failed.

        Raises:
            OSError: whatever the file system answers; it then goes to the disk with the next line.
        """
        refs = self._tolerance_moves(keeper, exceeded)
        self._commits.commit({"event": "refs", "keeper": keeper, "refs": refs})

    def share(self, keeper: str, kept: Kept, snapshot: str) -> str:
        """As `save`, where another keeper has just taken a `snapshot` of the same weights.

        Raises:
            OSError: whatever the file system answers.
        """
        self._commit_kept(keeper, kept, snapshot, self.history.manifests[snapshot])
        return snapshot

    def pin(self, keeper: str, tag: str, state: BestState) -> None:
        """Keep the snapshots that `state` names until `tag` is pinned anew or released."""
        present = self.history.keepers[keeper].present
        bests = [state.best, *state.exceeded.values(), *state.top]
        names = {present.saved.get(best.iteration) for best in bests if best is not None}
        held = sorted(name for name in names if name is not None and self._snapshots.holds(name))
        self._commits.commit({"event": "pin", "keeper": keeper, "tag": tag, "snapshots": held})

    def unpin(self, keeper: str, tag: str) -> None:
        """Release what `tag` pinned."""
        self._commits.commit({"event": "unpin", "keeper": keeper, "tag": tag})

    def end(self, keeper: str, state: BestState, policy: Policy) -> None:
        """Record that training is over: tolerances that were not exceeded get a provisional ref on the best."""
        open_tolerances = [tolerance for tolerance in policy.tolerances if tolerance not in state.exceeded]
        refs = self._tolerance_moves(keeper, dict.fromkeys(open_tolerances, state.best))
        self._commits.commit({"event": "end", "keeper": keeper, "refs": refs})

    def sync(self) -> None:
        """Make all observations durable, and wait until the space of what was removed is free."""
        self._snapshots.finish_removal()
        self._commits.sync()

    def upload(self) -> None:
        """Bring a run that nobody is at work on to its remote copy. Raises as `Commits.upload`."""
        self._commits.upload()

    def arrive(self) -> None:
        """Wait until the remote copy, if there is one, has all that was committed. Raises `OSError`."""
        self._commits.arrive()

    @property
    def upload_failure(self) -> OSError | None:
        """Why the remote copy lags behind, if it does."""
        return self._commits.upload_failure

    def close(self) -> None:
        """Give the folder free for other processes; a second call does nothing."""
        self._commits.close()

    def best_snapshot(self, keeper: str) -> str | None:
        """Name of the snapshot that the keeper's ref on the best points at."""
        return self.history.refs.get(keeper)

    def repair(self) -> None:
        """Finish or undo what a crash left, as a resume would. Raises as `Commits.repair`."""
        self._commits.repair()

    def _tolerance_moves(self, keeper: str, bests: Mapping[int, Best | None]) -> Moves:
        return tolerance_moves(keeper, self.history.keepers[keeper].present, bests, self._snapshots.holds)

    def _commit_kept(self, keeper: str, kept: Kept, snapshot: str, manifest: str) -> None:
        refs = moves_of(kept, keeper, self.history, snapshot, self._snapshots.holds)
        line = {**observation_line(keeper, kept.observation, refs), "snapshot": snapshot, "manifest": manifest}
        self._commits.commit(line if kept.is_new_best else {**line, "best": False}, withdraw=True)
