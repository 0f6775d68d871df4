"""Runs the Python blocks of a page in one namespace; in a process of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def run_steps(steps: list[dict[str, Any]], folder: Path) -> None:
    """Run the code of each step in `folder`, as a script would.

    A step has `text`, its `file` and `line` for tracebacks, and the name of the error that it `ends_with`, or `None`.
    """
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for step in steps:
        # At its lines in the page, so that a traceback shows the page.
        code = compile("\n" * (step["line"] - 1) + step["text"], step["file"], "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            if type(error).__name__ != step["ends_with"]:
                raise
        else:
            if step["ends_with"] is not None:
                raise AssertionError(f"{step['file']}:{step['line']} did not end with {step['ends_with']}")
