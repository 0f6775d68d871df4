"""The site shows what the repository shows, though two dialects of Markdown read the same pages."""

from __future__ import annotations

import re

import markdown
import pytest
import yaml
from markdown_it import MarkdownIt

from tests.docs.blocks import PAGES, ROOT

ELEMENTS = ("h1", "h2", "h3", "li", "pre", "table", "tr", "strong", "img", "a href")


@pytest.fixture(scope="module")
def site():
    """mkdocs.yml, but for what only Python could load."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def elements(html: str) -> dict[str, int]:
    html = re.sub(r'<a [^>]*class="headerlink"', "", html)
    return {name: len(re.findall(rf"<{name}[ >=]", html)) for name in ELEMENTS}


@pytest.mark.parametrize("page", PAGES)
def test_page_has_the_same_elements_in_both(page, site):
    text = (ROOT / page).read_text()
    extensions = {
        name: settings or {}
        for each in site["markdown_extensions"]
        for name, settings in (each.items() if isinstance(each, dict) else [(each, {})])
    }
    shown = markdown.markdown(text, extensions=["tables", *extensions], extension_configs=extensions)
    assert elements(shown) == elements(MarkdownIt().enable("table").render(text))


def test_every_page_is_in_the_navigation(site):
    def pages(nav) -> set[str]:
        if isinstance(nav, str):
            return {nav}
        return set().union(*map(pages, nav.values() if isinstance(nav, dict) else nav))

    assert pages(site["nav"]) == set(PAGES)
