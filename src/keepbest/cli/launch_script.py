"""The scripts of launch/, which the package brings along."""

from __future__ import annotations

from pathlib import Path

from keepbest.cli.console import say
from keepbest.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "launch_scripts"


def print_launch_script(name: str | None) -> None:
    """Print a script as it is, or the name of each with what it does.

    Raises:
        ConfigError: If there is no script of that name.
    """
    scripts = {path.stem.replace("_", "-"): path.read_text(encoding="utf-8") for path in sorted(_FOLDER.iterdir())}
    if name is None:
        for each, text in scripts.items():
            say(f"{each:24}{_first_sentence(text)}")
    elif name in scripts:
        for line in scripts[name].splitlines():
            say(line)
    else:
        raise ConfigError(f"there is no launch script {name!r}; there are: {', '.join(scripts)}")


def _first_sentence(script: str) -> str:
    comment = " ".join(line.removeprefix("# ") for line in script.partition("\n#\n")[0].splitlines()[1:])
    return comment.partition(". ")[0].removesuffix(".")
