"""A run for the browser: a page of its own without other files or a network, and what a notebook shows of it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Protocol

from keepbest.errors import KeepBestError
from keepbest.printable import printable
from keepbest.reading.checkpoint import Checkpoint
from keepbest.reading.picture import FOREGROUND, draw
from keepbest.reading.run import Run, open_run

# The browser runs no script and loads nothing for this page, so hostile names in a run do no harm.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PAGE_STYLE = """
:root { color-scheme: light dark }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; background: Canvas; color: CanvasText }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
"""
# In a notebook it stands beside the styles of others.
_STYLE = """
.keepbest { font: 14px/1.5 system-ui, sans-serif; --line: #d0d0d0; --damage: #b00020 }
@media (prefers-color-scheme: dark) { .keepbest { --line: #444; --damage: #ff8a80 } }
.keepbest svg { width: 100%; min-width: 42rem; height: auto }
.keepbest div { overflow-x: auto }
.keepbest table { border-collapse: collapse; width: 100% }
.keepbest th, .keepbest td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid var(--line) }
.keepbest th, .keepbest td + td { white-space: nowrap }
.keepbest td:first-child { min-width: 12rem }
.keepbest .number { text-align: right; font-variant-numeric: tabular-nums }
.keepbest code { font-size: .9em; overflow-wrap: anywhere }
.keepbest .damaged { color: var(--damage); white-space: normal; overflow-wrap: anywhere }
"""


class InDirectory(Protocol):
    """What keeps a run."""

    name: str
    directory: Path


def page(run: Run) -> str:
    """Return the report on a run, an HTML file.

    Raises:
        ConfigError: If matplotlib is not installed.
        SnapshotError: If nothing was observed yet.
    """
    name = _text(str(run.place))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width">
<style>{_PAGE_STYLE}</style></head>
<body><h1>Best checkpoints of {name}</h1>
{_content(run, _picture(run))}</body></html>
"""


def fragment(run: Run) -> str:
    """Return what a notebook shows of a run. Where there can be no picture, it says why."""
    try:
        picture = _picture(run)
    except KeepBestError as error:
        picture = f"<p>{_text(str(error))}</p>"
    return _content(run, picture)


def fragment_of(keeper: InDirectory) -> str:
    """Return what a notebook shows of a keeper: its run, or why that cannot be shown here."""
    try:
        run = open_run(keeper.directory)
    except (KeepBestError, OSError) as error:
        return f"<p>{_text(keeper.name)} in {_text(str(keeper.directory))}</p><p>{_text(str(error))}</p>"
    return fragment(run)


def _content(run: Run, picture: str) -> str:
    restarts = {0: "never restarted", 1: "restarted once"}.get(run.restarts, f"restarted {run.restarts} times")
    keepers = "\n".join(f"<p>{_text(each.describe())}</p>" for each in run.keepers.values())
    rows = "\n".join(map(_row, run.refs.values()))
    return f"""<div class=keepbest><style>{_STYLE}</style>
<p>Run <code>{_text(run.id)}</code>, {restarts}.</p>
{keepers}
<div>{picture}</div>
<div><table><thead><tr><th>ref</th><th class=number>value</th><th>iteration</th><th>tolerance</th>
<th class=number>bytes</th></tr></thead>
<tbody>
{rows}
</tbody></table></div></div>
"""


def _picture(run: Run) -> str:
    picture = draw(run.curves(), "svg", transparent=True).decode().replace(FOREGROUND, "currentColor")
    return picture[picture.index("<svg") :]


def _text(text: str) -> str:
    return html.escape(printable(text))


def _row(checkpoint: Checkpoint) -> str:
    state = "" if checkpoint.tolerance is None else "exceeded" if checkpoint.exceeded else "not exceeded"
    if checkpoint.damage is not None:
        state = f'<span class="damaged">{_text(checkpoint.damage)}</span>'
    value = "?" if checkpoint.value is None else f"{checkpoint.value:.9g}"
    size = "?" if checkpoint.bytes is None else f"{checkpoint.bytes:,}"
    return (
        f"<tr><td><code>{_text(checkpoint.ref)}</code></td><td class=number>{value}</td>"
        f"<td>{_text(checkpoint.iteration or '?')}</td><td>{state}</td><td class=number>{size}</td></tr>"
    )
