"""A picture of a run: each metric over its iterations, every new best, and what each tolerance kept."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepbest.cli.curve import Curve, Patience, Point, curves
from keepbest.errors import ConfigError
from keepbest.remote.download import local_copy
from keepbest.run.reader import read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg")
# Readable on white and on black. The foreground is that of text and axes.
FOREGROUND = "#222222"
_LINE, _BEST, _ABANDONED, _RESTART = "#2f81c7", "#d1495b", "#9a9a9a", "#a07a36"
_TOLERANCES = ("#4f9d4f", "#9a6fb0", "#d9822b", "#3c9dbd", "#b5653a")
_HIGHEST = 1e300  # what is beyond is drawn as infinite
_LONGEST_TITLE, _LONGEST_LABEL = 76, 36  # characters that fit
_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.titlecolor": FOREGROUND,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "svg.fonttype": "none",  # text that can be searched and copied
    "svg.hashsalt": "keepbest",
    "text.color": FOREGROUND,
    "text.parse_math": False,  # a name may have dollars in it
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
}


def plot(run: Path | str, to: Path) -> None:
    """Draw a run from its ledger into a file. **Rank-local**.

    Args:
        run: Directory of the run, or URL of its remote copy.
        to: Path of the picture.

    Raises:
        ConfigError: If `to` is neither .png nor .svg, or matplotlib is not installed.
        SnapshotError: If there is no ledger, or nothing was observed yet.
        LedgerError: If the ledger is damaged or of another format.
    """
    if to.suffix not in _FORMATS:
        raise ConfigError(f"a picture ends in {' or '.join(_FORMATS)}, got {to}")
    with local_copy(run) as directory:
        history = read_history(directory)
    picture = draw(curves(history), to.suffix[1:])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(picture)


def draw(drawn: list[Curve], file_format: str, *, transparent: bool = False) -> bytes:
    """Draw curves one above the other.

    Args:
        drawn: Curves to draw.
        file_format: Format of the picture, "png" or "svg".
        transparent: Whether to leave out the background.

    Returns:
        The content of the file.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context  # an extra, and slow to import
        from matplotlib.figure import Figure  # as above
    except ImportError as error:
        raise ConfigError("pictures need: pip install 'keepbest[plot]'") from error
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if file_format == "svg" else None
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure: Figure = Figure(figsize=(9, 4 * len(drawn)), layout="constrained")
        for axes, curve in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
            _draw(axes, curve)
        figure.savefig(buffer, format=file_format, dpi=120, metadata=metadata, transparent=transparent)
    return buffer.getvalue()


def _draw(axes: Axes, curve: Curve) -> None:
    axes.plot(*_line(curve, curve.points), "-", color=_LINE, lw=1.2, label="observed")
    for number, beyond in enumerate(curve.abandoned):
        axes.plot(*_line(curve, beyond), "-", color=_ABANDONED, lw=1, zorder=1, label=_once("abandoned", number))
    best = [point for point in curve.points if point.is_new_best]
    axes.plot(*_line(curve, best), "o", color=_BEST, ms=4, label="new best")
    if lost := [curve.position(point.iteration) for point in curve.points if not _has_height(point.value)]:
        # They have no height, so they are drawn at the bottom.
        bottom = axes.get_xaxis_transform()
        axes.plot(lost, [0.02] * len(lost), "x", color=_BEST, ms=5, transform=bottom, label="NaN or infinite")
    for number, restart in enumerate(curve.restarts):
        axes.axvline(curve.position(restart), color=_RESTART, lw=0.8, ls="--", label=_once("restart", number))
    for number, patience in enumerate(curve.patiences):
        _draw_patience(axes, curve, patience, _TOLERANCES[number % len(_TOLERANCES)])
    axes.set(
        title=_shortened(curve.keeper, _LONGEST_TITLE),
        xlabel=curve.unit,
        ylabel=_shortened(curve.metric_key, _LONGEST_LABEL),
    )
    axes.locator_params(axis="x", integer=True)
    # Below the axes, where it hides nothing.
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize=8, borderaxespad=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_patience(axes: Axes, curve: Curve, patience: Patience, color: str) -> None:
    """Draw what a tolerance keeps, and the wait for an improvement after it. The marks differ in shape and color."""
    if patience.kept is None or not _has_height(patience.kept.value):
        return
    until = patience.exceeded_at or curve.points[-1].iteration
    ends = [curve.position(patience.kept.iteration), curve.position(until)]
    state = f"closed at {until}" if patience.exceeded_at else "not exceeded"
    label = f"tolerance={patience.tolerance} keeps {patience.kept.value:.4g}, {state}"
    axes.plot(ends, [patience.kept.value] * 2, ":", color=color, lw=1.2)
    axes.plot(ends[:1], [patience.kept.value], "s", color=color, ms=8, mfc="none", label=label)
    axes.plot(ends[1:], [patience.kept.value], "|" if patience.exceeded_at else ">", color=color, ms=9)


def _has_height(value: float) -> bool:
    # The distance of two values, and the margins, must be numbers too.
    return abs(value) <= _HIGHEST


def _once(label: str, number: int) -> str | None:
    """Return the label for the first of several marks with the same meaning."""
    return label if number == 0 else None


def _shortened(name: str, longest: int) -> str:
    """Return the beginning and the end of a name that does not fit, with unprintable characters replaced."""
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _line(curve: Curve, points: list[Point]) -> tuple[list[int], list[float]]:
    # Infinities would flatten the other values. NaN leaves a gap.
    values = [point.value if _has_height(point.value) else math.nan for point in points]
    return [curve.position(point.iteration) for point in points], values
