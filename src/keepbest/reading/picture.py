"""A picture of a run: each metric over its iterations, every new best, and what each tolerance kept."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keepbest.errors import ConfigError
from keepbest.reading.curve import Curve, KeptByTolerance, Point, close_up, has_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Readable on white and on black. The foreground is that of text and axes.
FOREGROUND = "#222222"
_LINE, _BEST, _ABANDONED, _RESTART = "#2f81c7", "#d1495b", "#9a9a9a", "#a07a36"
_TOLERANCES = ("#4f9d4f", "#9a6fb0", "#d9822b", "#3c9dbd", "#b5653a")
_LONGEST_TITLE, _LONGEST_LABEL = 76, 36  # characters that fit
_HEIGHT, _STRIP = 4.0, 1.3  # inches: of a curve, and of the strip with all of it above its close-up
_ROW, _FEW_ROWS = 0.19, 4  # inches of a row of the legend, and the rows for which a curve has room
_EACH = 10  # tolerances with a square and a line of the legend of their own; of more, those that keep the same have one
_SMALLEST, _LARGEST = 8.0, 32.0  # points: the squares around one kept value, each inside the next
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


def draw(drawn: list[Curve], file_format: str, *, title: str | None = None, transparent: bool = False) -> bytes:
    """Draw curves one above the other. Where a few bad values would flatten one, a close-up shows its bests.

    Args:
        drawn: Curves to draw.
        file_format: Format of the picture, "png" or "svg".
        title: Title of the picture.
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
    ranges = [close_up(curve) for curve in drawn]
    heights = [_height(curve) + (0.0 if each is None else _STRIP) for curve, each in zip(drawn, ranges, strict=True)]
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure: Figure = Figure(figsize=(9, sum(heights)), layout="constrained")
        if title is not None:
            figure.suptitle(_shortened(title, _LONGEST_TITLE), fontweight="bold")
        places = figure.subfigures(len(drawn), squeeze=False, height_ratios=heights)[:, 0]
        for place, curve, limits in zip(places, drawn, ranges, strict=True):
            _draw(place, curve, limits)
        figure.savefig(buffer, format=file_format, dpi=120, metadata=metadata, transparent=transparent)
    return buffer.getvalue()


def _height(curve: Curve) -> float:
    rows = math.ceil(len(_groups(curve)) / 2)
    return _HEIGHT + _ROW * max(0, rows - _FEW_ROWS)


def _draw(place: SubFigure, curve: Curve, limits: tuple[float, float] | None) -> None:
    from matplotlib.lines import Line2D  # as in `draw`

    if limits is None:
        top = axes = place.subplots()
    else:
        top, axes = place.subplots(2, sharex=True, height_ratios=(_STRIP, _HEIGHT))
        _draw_marks(top, curve)
        margin = 0.08 * (limits[1] - limits[0])
        shown = limits[0] - margin, limits[1] + margin
        top.axhspan(*shown, color=_LINE, alpha=0.15, lw=0)
        top.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(*shown)
    _draw_marks(axes, curve)
    top.set_title(_shortened(curve.keeper, _LONGEST_TITLE))
    axes.set(xlabel=curve.unit, ylabel=_shortened(curve.metric_key, _LONGEST_LABEL))
    axes.locator_params(axis="x", integer=True)
    # Below the axes, where it hides nothing. Its marks have the size of the text.
    legend = place.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8
    )
    for mark in legend.legend_handles:
        if isinstance(mark, Line2D):
            mark.set_markersize(6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_marks(axes: Axes, curve: Curve) -> None:
    axes.plot(*_line(curve, curve.points), "-", color=_LINE, lw=1.2, label="observed")
    for number, beyond in enumerate(curve.abandoned):
        axes.plot(*_line(curve, beyond), "-", color=_ABANDONED, lw=1, zorder=1, label=_once("abandoned", number))
    best = [point for point in curve.points if point.is_new_best]
    newest = "" if curve.best is None else f"; the best is {curve.best.value:.6g} at {curve.best.iteration}"
    axes.plot(*_line(curve, best), "o", color=_BEST, ms=4, label=f"new best{newest}")
    if curve.top:
        places = [curve.position(each.iteration) for each in curve.top]
        heights = [each.value if has_height(each.value) else math.nan for each in curve.top]
        label = f"top {len(places)}: {curve.top[0].value:.4g} to {curve.top[-1].value:.4g}"
        axes.plot(places, heights, "D", color=_BEST, ms=8, mfc="none", label=label)
    if low := [point for point in curve.points if not has_height(point.value)]:
        # They have no height, so they are drawn at the bottom.
        bottom = axes.get_xaxis_transform()
        places = [curve.position(point.iteration) for point in low]
        label = f"NaN or infinite{', or too large' if any(math.isfinite(point.value) for point in low) else ''}"
        axes.plot(places, [0.02] * len(low), "x", color=_BEST, ms=5, transform=bottom, label=label)
    for number, restart in enumerate(curve.restarts):
        axes.axvline(curve.position(restart), color=_RESTART, lw=0.8, ls="--", label=_once("restart", number))
    groups = _groups(curve)
    kept = Counter(each.kept for each, *_ in groups)
    inside: Counter[Any] = Counter()
    for number, group in enumerate(groups):
        value = group[0].kept
        size = _SMALLEST + min(5.0, (_LARGEST - _SMALLEST) / kept[value]) * inside[value]
        inside[value] += 1
        _draw_tolerances(axes, curve, group, _TOLERANCES[number % len(_TOLERANCES)], size)


def _groups(curve: Curve) -> list[list[KeptByTolerance]]:
    """Tolerances that are drawn as one, ascending."""
    if len(curve.tolerances) <= _EACH:
        return [[each] for each in curve.tolerances]
    alike = itertools.groupby(curve.tolerances, lambda each: (each.kept, each.exceeded_at is None))
    return [list(group) for _, group in alike]


def _draw_tolerances(axes: Axes, curve: Curve, group: Sequence[KeptByTolerance], color: str, size: float) -> None:
    """Draw what tolerances keep, and the wait for an improvement after it. The marks differ in shape and color.

    The wait is drawn along the edge of the square of `size`, on the side where no value is until the tolerance is
    exceeded. So tolerances that keep the same value do not cover each other.
    """
    from matplotlib.transforms import ScaledTranslation  # as in `draw`

    last = group[-1]
    if last.kept is None or not has_height(last.kept.value):
        return
    until = last.exceeded_at or curve.points[-1].iteration
    ends = [curve.position(last.kept.iteration), curve.position(until)]
    inches = (size if curve.higher_is_better else -size) / 2 / 72
    edge = axes.transData + ScaledTranslation(0, inches, axes.figure.dpi_scale_trans)
    axes.plot(ends, [last.kept.value] * 2, ":", color=color, lw=1.2, transform=edge)
    axes.plot(ends[:1], [last.kept.value], "s", color=color, ms=size, mfc="none", label=_label(group, last.kept.value))
    end = "|" if last.exceeded_at else ">"
    axes.plot(ends[1:], [last.kept.value], end, color=color, ms=6, transform=edge)


def _label(group: Sequence[KeptByTolerance], value: float) -> str:
    first, last = group[0], group[-1]
    if first is last:
        state = f"closed at {last.exceeded_at}" if last.exceeded_at else "not exceeded"
        return f"tolerance={last.tolerance} keeps {value:.4g}, {state}"
    state = f"closed at {first.exceeded_at} to {last.exceeded_at}" if last.exceeded_at else "not exceeded"
    return f"tolerance={first.tolerance} to {last.tolerance} keep {value:.4g}, {state}"


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
    values = [point.value if has_height(point.value) else math.nan for point in points]
    return [curve.position(point.iteration) for point in points], values
