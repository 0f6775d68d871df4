"""What is done with each line of a block of shell commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from tests.docs.blocks import ROOT
from tests.kit import cli_runs

KEEPBEST = (["python", "-m", "keepbest"], ["keepbest"])
BENCHMARKS = [".venv-bench/bin/python", "-m"]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each line, without comments."""
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def is_known(words: list[str]) -> bool:
    return words[0] in ("make", "pip", "torchrun") or is_keepbest(words) or words[:2] == BENCHMARKS


def is_keepbest(words: list[str]) -> bool:
    return any(words[: len(start)] == start for start in KEEPBEST)


def check(words: list[str], folder: Path) -> None:
    """Run it in `folder`, the present one, if it is a command of keepbest; else see that what it names is there."""
    if is_keepbest(words):
        arguments, *target = " ".join(words[words.index("keepbest") + 1 :]).split(" > ")
        printed = run_here(shlex.split(arguments))
        for name in target:
            (folder / name).write_text(printed)
    elif words[0] == "torchrun":
        run_on_ranks(words[1:], folder)
    elif words[0] == "make":
        assert set(words[1:]) <= targets(), f"the Makefile has no such target: {words}"
    elif words[0] == "pip":
        assert named_extras(words) <= extras(), f"the package has no such extra: {words}"
    else:
        module, *options = words[2:]
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        known = (ROOT / "benchmarks" / "measure.py").read_text()
        assert [option for option in options if f'"{option}"' not in known] == []


def run_here(arguments: list[str]) -> str:
    """What the command prints."""
    ended = cli_runs.keepbest(*arguments)
    assert ended.exit_code == 0, f"{arguments} ended with {ended.exit_code}:\n{ended.output}\n{ended.exception!r}"
    return ended.output


def run_on_ranks(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def targets() -> set[str]:
    return set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split())


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    return {line.partition(" = ")[0] for line in text.splitlines()}


def named_extras(words: list[str]) -> set[str]:
    """Of `pip install 'keepbest[a,b]'` or `pip install -e '.[a,b]'`."""
    assert words[1] == "install", words
    return set(Requirement(re.sub(r"^\.", "keepbest", words[-1])).extras)
