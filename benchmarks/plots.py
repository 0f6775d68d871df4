"""Draws the results in benchmarks/results as the pictures of docs/performance.md and docs/scale.md."""

from __future__ import annotations

import json
import statistics
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.measure import RESULTS, Samples

OURS, OTHERS, BASE = "#1b6ca8", "#b8b8b8", "#5f8f5f"
BASELINES = ("copy into warm buffers", "raw write + fsync", "no writer")


def bars(axes: Axes, samples: Samples, title: str, unit: str, scale: float = 1.0) -> None:
    """Medians, with a line from the least to the most."""
    names = sorted(samples, key=lambda name: statistics.median(samples[name]), reverse=True)
    medians = [statistics.median(samples[name]) * scale for name in names]
    low = [median - min(samples[name]) * scale for name, median in zip(names, medians, strict=True)]
    high = [max(samples[name]) * scale - median for name, median in zip(names, medians, strict=True)]
    colors = [OURS if name.startswith("keepbest") else BASE if name in BASELINES else OTHERS for name in names]
    axes.barh(names, medians, xerr=[low, high], color=colors, error_kw={"lw": 0.8, "ecolor": "#444444"})
    for row, median in enumerate(medians):
        axes.annotate(f" {median:.3g}", (median, row), va="bottom", fontsize=7)
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(name: str, panels: list[tuple[Samples, str]], unit: str, scale: float = 1.0) -> None:
    _figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for panel, (samples, title) in zip(axes[0], panels, strict=True):
        bars(panel, samples, title, unit, scale)
    save(name)


def draw_scale(samples: dict[str, Samples]) -> None:
    ranks = sorted(int(where.split()[0]) for where in samples if where.endswith("ranks"))
    _figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, color in (("quiet interval", OURS), ("bare all_gather", OTHERS)):
        axes.plot(ranks, [max(samples[f"{count} ranks"][name]) * 1e3 for count in ranks], "o-", color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="ranks (on two cores)", ylabel="ms", title="one interval")
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save("scale")


def save(name: str) -> None:
    plt.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close()


def main() -> None:
    mpl.rcParams.update({"font.size": 8, "svg.hashsalt": "keepbest", "axes.titlesize": 9})
    results: dict[str, dict[str, Any]] = {
        path.stem: json.loads(path.read_text())["samples"] for path in sorted(RESULTS.glob("*.json"))
    }
    stall = results["stall"]
    draw_bars("stall", [(stall[where], f"a new best holds up training: {where}") for where in stall], "seconds")
    draw_bars("durable", [(results["durable"]["one process"], "a durable save that training waits for")], "seconds")
    gaps = results["heartbeat"]["longest gap"]
    draw_bars("heartbeat", [(gaps, "longest gap in training while a best is written")], "ms", 1e3)
    gather = results["gather"]
    draw_bars("gather", [(gather[where], f"FSDP2 weights to rank 0: {where}") for where in gather], "seconds")
    draw_scale(results["scale"])


if __name__ == "__main__":
    main()
