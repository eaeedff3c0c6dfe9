"""The blocks of Python in README.md and docs/: they compile, import what there is, and those of the README run."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import inspect
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import mcp_session_store
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The blocks of a page, each with the line that it begins in."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


BLOCKS = [pytest.param(block, id=f"{page.name}:{line}") for page in PAGES for line, block in blocks_of(page)]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_compiles_and_imports_what_there_is(block: str) -> None:
    compile(block, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            # A module of a package is its attribute once it is imported.
            assert [name for name in missing if importlib.util.find_spec(f"{node.module}.{name}") is None] == []


def test_the_blocks_of_the_readme_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    # What a reader imports without being told.
    known: dict[str, Any] = {name: getattr(mcp_session_store, name) for name in mcp_session_store.__all__}
    known |= {
        "contextlib": contextlib,
        "AsyncIterator": AsyncIterator,
        "Starlette": Starlette,
        "Route": Route,
        "gc": gc,
    }
    for line, block in blocks_of(ROOT / "README.md"):
        code = compile(block, f"README.md:{line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        # A client's block needs the server that the others make.
        if not code.co_flags & inspect.CO_COROUTINE:
            exec(code, known)
    assert isinstance(known["app"], Starlette)
