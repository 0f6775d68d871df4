"""The code blocks of the pages, as a reader of Markdown finds them: fenced and indented ones, in lists too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        page: path from the root of the repository.
        heading: that it stands under.
        line: of its first line of code in the page, from 1.
        language: as named at its beginning; empty where none is.
        text: the code.
    """

    page: str
    heading: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """`line.py`, if the first line is the comment `# line.py`: a file that commands of the page use."""
        first = self.text.partition("\n")[0].removeprefix("# ")
        return first if first.endswith((".py", ".yaml")) and " " not in first and "# " + first in self.text else None

    @property
    def has_gaps(self) -> bool:
        """Whether it is Python that leaves something out with `...`."""
        return any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(ast.parse(self.text)))


def blocks(page: str) -> Iterator[Block]:
    """Those of one page, from its beginning."""
    heading, tokens = "", MarkdownIt().parse((ROOT / page).read_text())
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            heading = following.content
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + (2 if token.type == "fence" else 1)
            yield Block(page, heading, line, token.info.strip(), token.content)


ALL = [block for page in PAGES for block in blocks(page)]
