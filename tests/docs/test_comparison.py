"""The comparison with the peers speaks of the versions that are installed, and the README repeats its table."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

TEXT = (ROOT / "docs" / "comparison.md").read_text()
# {path in the repository of a peer: (its package here, its distribution, the tag of a version)}
PEERS = {
    "Lightning-AI/pytorch-lightning/blob/{}/src/lightning/pytorch/": ("pytorch_lightning", "pytorch-lightning", "{}"),
    "Lightning-AI/pytorch-lightning/blob/{}/src/lightning/fabric/": ("lightning_fabric", "pytorch-lightning", "{}"),
    "pytorch/ignite/blob/{}/ignite/": ("ignite", "pytorch-ignite", "v{}"),
    "huggingface/transformers/blob/{}/src/transformers/": ("transformers", "transformers", "v{}"),
    "pytorch/pytorch/blob/{}/torch/": ("torch", "torch", "v{}"),
}


def table(path: str) -> list[list[str]]:
    """Its cells, without the addresses of links."""
    text = (ROOT / path).read_text().partition("| | keepbest |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
    return [[re.sub(r"\(\S+\.md\)", "", cell).strip() for cell in row.split("|")] for row in rows]


def test_readme_has_the_same_table():
    assert table("README.md") == table("docs/comparison.md") != []


@pytest.mark.parametrize("place", PEERS)
def test_links_lead_to_lines_of_the_version_that_is_installed(place):
    package, distribution, tag = PEERS[place]
    start = f"https://github.com/{place.format(tag.format(version(distribution).partition('+')[0]))}"
    links = [
        link
        for link in re.findall(r"https://\S+", TEXT)
        if re.match(re.escape(place).replace(r"\{\}", ".*?"), link[19:])
    ]
    assert links != []
    folder = Path(find_spec(package).origin).parent
    for link in links:
        assert link.startswith(start), f"{link} is of another version than {version(distribution)}: read it again"
        path, _, lines = link.removeprefix(start).partition("#")
        last = int(re.findall(r"\d+", lines)[-1])
        assert len((folder / path).read_text().splitlines()) >= last
