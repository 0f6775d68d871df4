"""A hook of mkdocs: every file of the site is at its path in the repository, so that a link leads to the same in both.

Links are written for the repository: relative to the page, with the name of the file. A page may link to any other
page, and to every file that `LINKED` names; mkdocs checks them all. Folders have no page: link to a file in them.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/*.md", "examples/**/*.md")
ASSETS = ("benchmarks/results/*.svg", "docs/*.css")
LINKED = ("LICENSE", "launch/*", "examples/*/*.py", "examples/*/*.yaml", "benchmarks/*.py", "benchmarks/*.txt")
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml"}


class SourceFile(File):
    """A text file, shown on a page of its own, which is not in the navigation."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        """The page, in Markdown."""
        language = LANGUAGES.get(Path(self.src_uri).suffix, "text")
        return f"# {self.src_uri}\n\n~~~{language}\n{(ROOT / self.src_uri).read_text(encoding='utf-8')}~~~\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of the site: those of the theme as they are, ours by their paths from the root of the repository."""
    place = (str(ROOT), config.site_dir, config.use_directory_urls)
    kept = [file for file in files if file.src_dir != config.docs_dir]
    kept += [File(path, *place) for path in _paths(PAGES + ASSETS)]
    kept += [
        SourceFile(path, *place, dest_uri=f"{path}.html", inclusion=InclusionLevel.NOT_IN_NAV)
        for path in _paths(LINKED)
    ]
    return Files(kept)


def _paths(patterns: tuple[str, ...]) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()
    )
