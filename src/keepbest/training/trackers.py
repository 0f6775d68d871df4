"""Trackers store logged scalars: in a JSON-lines file, in TensorBoard, or nowhere. Only rank 0 has a real one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from keepbest.iteration import TrainingIteration
from keepbest.run.no_links import check_own

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TrackerName = Literal["none", "jsonl", "tensorboard"]
_JSON_LINES, _TENSORBOARD = "metrics.jsonl", "tensorboard"
TRACKER_FILES = (_JSON_LINES, _TENSORBOARD)
"""Names of what trackers write in the directory of a run."""


class Tracker(Protocol):
    """Receives the scalars of one rank."""

    def resume_from(self, iteration: TrainingIteration) -> None:
        """Discard what an abandoned timeline logged after `iteration`. **Rank-local**, before any `log`."""

    def log(self, iteration: TrainingIteration, scalars: dict[str, float]) -> None:
        """Record `scalars`, all of one iteration. **Rank-local**."""

    def close(self) -> None:
        """Write out what is buffered. `log` may be called again afterwards. **Rank-local**."""


class NoTracker:
    """Discards everything: the tracker of a run without one, and of every rank except 0."""

    def resume_from(self, iteration: TrainingIteration) -> None:
        """Do nothing."""

    def log(self, iteration: TrainingIteration, scalars: dict[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonLinesTracker:
    """Appends one JSON object for each iteration: `{"epoch": 1, "update": 20, "sample": 640, "loss/val/total": 0.5}`.

    NaN and infinities are the strings `"nan"`, `"inf"` and `"-inf"`, because JSON has no numbers for them. A run that
    resumes from an earlier iteration repeats the ones after it. The last record of an iteration is the valid one.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume_from(self, iteration: TrainingIteration) -> None:
        """Do nothing: the later record of an iteration replaces the earlier one."""

    def log(self, iteration: TrainingIteration, scalars: dict[str, float]) -> None:
        """Append one line.

        Raises:
            SnapshotError: If the file is a link.
            OSError: If the file cannot be written.
        """
        check_own(self._path)
        parts = {"epoch": iteration.epoch, "update": iteration.update, "sample": iteration.sample}
        values = {key: value if math.isfinite(value) else str(value) for key, value in scalars.items()}
        line = json.dumps(parts | values) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(self._line_break_after_a_torn_line() + line.encode())

    def close(self) -> None:
        """Do nothing: every line is written when it is logged."""

    def _line_break_after_a_torn_line(self) -> bytes:
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"


class TensorBoardTracker:
    """Writes event files for TensorBoard. The step is the update. The first `log` opens the file.

    Args:
        directory: Directory of the event files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def resume_from(self, iteration: TrainingIteration) -> None:
        """Make TensorBoard hide what the event files so far have after `iteration`."""
        self._purge_step = (iteration.update or 0) + 1

    def log(self, iteration: TrainingIteration, scalars: dict[str, float]) -> None:
        """Add each scalar at `iteration.update`.

        Raises:
            SnapshotError: If the directory is a link.
            ModuleNotFoundError: If the package `tensorboard` is not installed.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            check_own(self._directory)
            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
            self._purge_step = None  # what is logged from now on stays, even if the file is closed in between
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, global_step=iteration.update)

    def close(self) -> None:
        """Write out the buffered events and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def build_tracker(name: TrackerName, directory: Path, *, is_main: bool) -> Tracker:
    """Make the tracker of a run in `directory`: `metrics.jsonl`, or event files in `tensorboard/`. **Rank-local**."""
    if not is_main or name == "none":
        return NoTracker()
    if name == "jsonl":
        return JsonLinesTracker(directory / _JSON_LINES)
    return TensorBoardTracker(directory / _TENSORBOARD)
