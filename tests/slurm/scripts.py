"""Launch scripts as a user edits them: at their top lines only."""

from __future__ import annotations

import re
from pathlib import Path

from tests.slurm.cluster import ROOT

BELOW = "# ---- nothing to edit below"


def edited(name: str, folder: Path, **lines: object) -> Path:
    """A copy of a script of launch/ in `folder`, whose lines COMMAND=..., #SBATCH --nodes=... have other values.

    A value of `None` takes the line away.
    """
    top, mark, rest = (ROOT / "launch" / name).read_text().partition(BELOW)
    for line, value in lines.items():
        start = line if line.isupper() else f"#SBATCH --{line.replace('_', '-')}"
        replacement = "" if value is None else f"{start}={value}\n"
        top, count = re.subn(rf"^{re.escape(start)}=.*\n", lambda _, text=replacement: text, top, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"launch/{name} has {count} lines above its mark that start with {start}=, expected one")
    copy = folder / name
    copy.write_text(top + mark + rest)
    copy.chmod(0o755)
    return copy
