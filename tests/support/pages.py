"""The pages of the documentation, and their blocks of Python.

python -m tests.support.pages FOLDER        # writes the blocks as modules, one for each page, for mypy
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
INTERNALS = DOCS / "architecture.md"
"""For people who change this package: as long as it has to be."""

GUIDES = sorted(page for page in DOCS.glob("*.md") if page != INTERNALS)
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
PAGES = [README, *GUIDES, *REFERENCE, INTERNALS]


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def section_of(page: str, heading: str) -> str:
    """Return a section of a page below docs/, from behind its heading to the next one that is not below it."""
    level = heading.partition(" ")[0]
    _, found, rest = text_of(page).partition(f"\n{heading}\n")
    assert found, f"docs/{page} has no section {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Return the blocks of Python of a page, each with the line that it begins in."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def module_of(page: Path) -> str:
    """Return the blocks of a page as a module."""
    return "\n\n".join(f"# line {line}\n{block}" for line, block in blocks_of(page))


def write_modules(folder: Path) -> None:
    folder.mkdir(parents=True)
    for page in PAGES:
        if blocks_of(page):
            name = page.relative_to(ROOT).with_suffix("").as_posix().lower()
            (folder / f"{re.sub('[^a-z]', '_', name)}.py").write_text(module_of(page))


if __name__ == "__main__":
    write_modules(Path(sys.argv[1]))
