"""A picture of a run: each metric over its iterations, every new best, and what each tolerance kept."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from keepbest.cli.curve import Curve, Point, curves
from keepbest.errors import ConfigError
from keepbest.store.fetch import local_copy
from keepbest.store.read import read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg")
_LINE, _BEST, _ABANDONED, _RESTART = "#1b6ca8", "#d1495b", "#b8b8b8", "#8a6d3b"
_TOLERANCES = ("#5f8f5f", "#8e5ea2", "#e08e45", "#3c8dad", "#a0522d")


def plot(run: Path | str, to: Path) -> None:
    """Draw a run, as its ledger tells it, into the file `to`. **Rank-local**.

    Raises:
        ConfigError: if `to` is neither .png nor .svg, or matplotlib is not installed.
        SnapshotError: if there is no ledger, or nothing was observed yet.
        LedgerError: if the ledger is damaged or of another format.
    """
    if to.suffix not in _FORMATS:
        raise ConfigError(f"a picture ends in {' or '.join(_FORMATS)}, got {to}")
    with local_copy(run) as directory:
        history = read_history(directory)
    picture = draw(curves(history), to.suffix[1:])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(picture)


def draw(drawn: list[Curve], file_format: str) -> bytes:
    """The curves, one above the other, as a PNG or SVG. Raises `ConfigError` if matplotlib is not installed."""
    try:
        from matplotlib import rc_context  # an extra, and slow to import
        from matplotlib.figure import Figure  # as above
    except ImportError as error:
        raise ConfigError("pictures need: pip install 'keepbest[plot]'") from error
    figure: Figure = Figure(figsize=(9, 0.5 + 3.5 * len(drawn)), layout="constrained")
    for axes, curve in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        _draw(axes, curve)
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "keepbest"}):  # text that can be searched and copied
        figure.savefig(buffer, format=file_format, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _draw(axes: Axes, curve: Curve) -> None:
    for beyond in curve.abandoned:
        axes.plot(*_line(curve, beyond), "-", color=_ABANDONED, lw=1)
    axes.plot(*_line(curve, curve.points), "-", color=_LINE, lw=1.2, label=curve.metric_key)
    best = [point for point in curve.points if point.is_new_best]
    axes.plot(*_line(curve, best), "o", color=_BEST, ms=4, label="new best")
    for number, patience in enumerate(curve.patiences):
        if patience.kept is None:
            continue
        color = _TOLERANCES[number % len(_TOLERANCES)]
        until = patience.exceeded_at or curve.points[-1].iteration
        ends = [curve.position(patience.kept.iteration), curve.position(until)]
        state = f"closed at {until}" if patience.exceeded_at else "not exceeded"
        label = f"tolerance={patience.tolerance} keeps {patience.kept.value:.4g}, {state}"
        # Marked by form as well as by color: what is kept, and how long was waited in vain.
        axes.plot(ends, [patience.kept.value] * 2, ":", color=color, lw=1.2)
        axes.plot(ends[:1], [patience.kept.value], "s", color=color, ms=8, mfc="none", label=label)
        axes.plot(ends[1:], [patience.kept.value], "|" if patience.exceeded_at else ">", color=color, ms=9)
    for number, restart in enumerate(curve.restarts):
        told = "restart" if number == 0 else None
        axes.axvline(curve.position(restart), color=_RESTART, lw=0.8, ls="--", label=told)
    axes.set(title=curve.keeper, xlabel=curve.unit, ylabel=curve.metric_key)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _line(curve: Curve, points: list[Point]) -> tuple[list[int], list[float]]:
    # Infinities would leave nothing of the other values; NaN leaves a gap.
    values = [point.value if math.isfinite(point.value) else math.nan for point in points]
    return [curve.position(point.iteration) for point in points], values
