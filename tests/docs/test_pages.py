"""The shape of the documentation: few pages, none too long, all in the navigation, and no link that leads nowhere."""

from __future__ import annotations

import re
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import pytest

import mcp_session_store
from benchmarks import bars
from tests.support.pages import DOCS, GUIDES, PAGES, README, REFERENCE, ROOT, text_of

if TYPE_CHECKING:
    from pathlib import Path

WORDS_OF_README = 900
WORDS_OF_PAGE = 1200
MOST_GUIDES = 12

EACH_PAGE = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def words_of(page: Path) -> int:
    """Return the number of words outside of blocks; rules and bars of tables are none."""
    return len(re.findall(r"\S*\w\S*", without_code(page)))


def anchors_of(page: Path) -> set[str]:
    """Return the ids of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_guides_are_few() -> None:
    assert len(GUIDES) <= MOST_GUIDES


@pytest.mark.parametrize("page", [README, *GUIDES, *REFERENCE], ids=lambda page: page.name)
def test_no_page_is_too_long(page: Path) -> None:
    assert words_of(page) <= (WORDS_OF_README if page == README else WORDS_OF_PAGE)


@EACH_PAGE
def test_each_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    for link in links:
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        # The site has what is below docs/ and nothing else.
        assert page == README or target.is_relative_to(DOCS), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_navigation_has_all_pages() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page != README)


def test_the_reference_has_all_names() -> None:
    named = re.findall(r"^::: ([\w.]+)$", text_of("reference/api.md"), re.MULTILINE)
    for name in named:
        resolve_name(name)
    public = {f"mcp_session_store.{name}" for name in mcp_session_store.__all__}
    errors = {name for name in public if resolve_name(name).__module__ == "mcp_session_store.errors"}
    assert public - errors - set(named) == set()


def test_the_bars_are_those_of_the_table() -> None:
    assert len(bars.rows()) > 5
    assert bars.PICTURE.read_text() == bars.picture(), "run: python -m benchmarks.bars"
