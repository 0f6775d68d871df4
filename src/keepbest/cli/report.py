"""A report on a run: one HTML file with its picture and its table, without other files or a network."""

from __future__ import annotations

import html
from pathlib import Path

from keepbest.cli.curve import curves
from keepbest.cli.plot import FOREGROUND, draw
from keepbest.cli.table import Checkpoint, read_checkpoints
from keepbest.printable import printable
from keepbest.remote.download import local_copy
from keepbest.run.reader import read_history

# The browser runs no script and loads nothing for this page, so hostile names in a run do no harm.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --damage: #b00020 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --damage: #ff8a80 } }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       background: Canvas; color: CanvasText }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
svg { width: 100%; height: auto }
div { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th, td + td { white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: .9em; overflow-wrap: anywhere }
.damaged { color: var(--damage); white-space: normal; overflow-wrap: anywhere }
"""


def report(run: Path | str, to: Path) -> None:
    """Write the report on a run. **Rank-local**.

    Args:
        run: Directory of the run, or URL of its remote copy.
        to: Path of the HTML file.

    Raises:
        ConfigError: If matplotlib is not installed.
        SnapshotError: If there is no ledger, or nothing was observed yet.
        LedgerError: If the ledger is damaged or of another format.
    """
    with local_copy(run) as directory:
        history = read_history(directory)
    picture = draw(curves(history), "svg", transparent=True).decode().replace(FOREGROUND, "currentColor")
    rows = "\n".join(map(_row, read_checkpoints(run)))
    name = _text(str(run))
    restarts = {0: "never restarted", 1: "restarted once"}.get(history.restarts, f"restarted {history.restarts} times")
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width">
<style>{_STYLE}</style></head>
<body><h1>Best checkpoints of {name}</h1>
<p>Run <code>{_text(str(history.run_id))}</code>, {restarts}.</p>
{picture[picture.index("<svg") :]}
<div><table><thead><tr><th>ref</th><th class=number>value</th><th>iteration</th><th>tolerance</th>
<th class=number>bytes</th></tr></thead>
<tbody>
{rows}
</tbody></table></div></body></html>
"""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")


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
