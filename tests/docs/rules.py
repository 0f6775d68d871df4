"""Which block is proved by which rule. Every block must be claimed by exactly one of them."""

from __future__ import annotations

from collections.abc import Callable

from tests.docs.blocks import Block
from tests.docs.commands import command_lines, is_known


def _is_commands(block: Block) -> bool:
    return block.language == "bash" and "\nif " not in block.text and all(map(is_known, command_lines(block.text)))


# {rule: which blocks it claims}; what it does with them is the test of the same name.
RULES: dict[str, Callable[[Block], bool]] = {
    # Written to the folder that the commands of the page run in.
    "file": lambda block: block.file_name is not None,
    # Run, all of a page in one namespace and one process.
    "python": lambda block: block.language == "python" and block.file_name is None,
    # Run, or beside what they name.
    "commands": _is_commands,
    # Callbacks, with which the trainer trains.
    "callbacks": lambda block: block.language == "yaml" and block.text.startswith("callbacks:\n"),
    # Callbacks of another trainer, which reads them.
    "noether": lambda block: block.language == "yaml" and block.text.startswith("trainer:\n"),
    # The end of a script of SLURM, with an srun that stands in.
    "requeue": lambda block: block.language == "bash" and "\nsrun " in block.text,
    # Commands and outputs, each line beside a run or the program that prints it.
    "session": lambda block: block.language == "console",
    "tree": lambda block: block.language == "text" and block.text.startswith("runs/a/checkpoints/\n"),
    # Beside the sources.
    "picture": lambda block: block.language == "text" and "BestKeeper.observe" in block.text,
    "path": lambda block: block.language == "text" and block.text.startswith("keeper\n"),
    # Read, and written again.
    "ledger": lambda block: block.language == "json" and block.text.startswith('{"event":'),
    "manifest": lambda block: block.language == "json" and block.text.startswith('{\n "version":'),
    "timeout": lambda block: block.language == "text" and block.text.startswith("error: rank "),
    "torchrun_log": lambda block: block.language == "text" and "/elastic/" in block.text,
}


def rules_of(block: Block) -> list[str]:
    return [name for name, claims in RULES.items() if claims(block)]
