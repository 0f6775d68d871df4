"""The files that the commands draw of a run. **Rank-local**."""

from __future__ import annotations

from pathlib import Path

from keepbest.errors import ConfigError
from keepbest.reading.page import page
from keepbest.reading.picture import draw
from keepbest.reading.run import open_run
from keepbest.run.place import check_can_be_made, check_is_outside

_FORMATS = (".png", ".svg")
_PAGES = (".html", ".htm")  # what else somebody names may be weights


def plot(run: Path | str, to: Path) -> Path:
    """Draw a run from its ledger into a file, and return the path of it.

    Args:
        run: Directory of the run, or URL of its remote copy.
        to: Path of the picture.

    Raises:
        ConfigError: If `to` is neither .png nor .svg, below a file or among checkpoints, or matplotlib is missing.
        SnapshotError: If there is no ledger, or nothing was observed yet.
        LedgerError: If the ledger is damaged or of another format.
    """
    if to.suffix not in _FORMATS:
        raise ConfigError(f"a picture ends in {' or '.join(_FORMATS)}, got {to}")
    return _write(to, draw(open_run(run).curves(), to.suffix[1:], title=str(run)))


def report(run: Path | str, to: Path) -> Path:
    """Write the report on a run, an HTML file, and return its path. Raises as `plot`."""
    if to.suffix not in _PAGES:
        raise ConfigError(f"a report ends in {' or '.join(_PAGES)}, got {to}")
    return _write(to, page(open_run(run)).encode())


def _write(to: Path, content: bytes) -> Path:
    check_can_be_made(to.parent)
    check_is_outside(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(content)
    return to
