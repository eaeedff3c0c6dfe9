"""The modules that docs/architecture.md names exist, and its map leaves none out."""

from __future__ import annotations

import re

from tests.support.servers import ROOT

PACKAGE = ROOT / "src" / "mcp_session_store"
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()
MAP = DOCUMENT.split("```")[1]


def _exists(path: str) -> bool:
    return any(match.exists() for match in (PACKAGE / path, ROOT / path)) or any(PACKAGE.rglob(path))


def test_each_path_that_the_architecture_names_exists() -> None:
    named = set(re.findall(r"`((?:[\w.]+/)+|(?:[\w.]+/)*\w+\.py)`", DOCUMENT))
    assert len(named) > 40
    assert [path for path in sorted(named) if not _exists(path)] == []


def test_the_map_of_the_architecture_names_each_module_and_folder() -> None:
    entries = set(re.findall(r"^ +([\w/.]+)", MAP, flags=re.MULTILINE))
    found = {
        f"{path.name}/" if path.is_dir() else path.name
        for folder in (PACKAGE, PACKAGE / "sql", PACKAGE / "adapter")
        for path in folder.iterdir()
        if path.name not in ("__pycache__", "__init__.py", "py.typed")
    }
    assert found - entries == set()
    assert sorted(entry for entry in entries if not _exists(entry)) == []
