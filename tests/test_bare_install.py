"""What an installation without extras brings, and what an import of this package brings into a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.servers import ROOT


def _installed_with_this_package() -> set[str]:
    """The distributions that the declared dependencies bring, without extras of this package."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in declared]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            name = canonicalize_name(requirement.name)
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for text in requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in found}


def test_no_package_is_installed_that_changes_logs() -> None:
    """The SDK logs through `rich`, three wrapped lines for one, where it is installed."""
    installed = _installed_with_this_package()
    assert {"mcp", "sqlalchemy", "greenlet", "click"} <= installed
    assert not {"rich", "typer", "fastmcp"} & installed


_IMPORTS = """
import importlib, json, pkgutil, sys

sys.modules.update(dict.fromkeys(("rich", "fastmcp")))  # neither can be imported
found = {}

def note(what):
    found[what] = [name for name in HEAVY if name in sys.modules]

import mcp_session_store
note("package")
from mcp_session_store.cli import main
for arguments in (["--help"], ["sessions", "list", "--help"], ["serve", "--help"]):
    main(arguments, standalone_mode=False)
note("help")
import mcp_session_store.app
note("app")
for module in pkgutil.walk_packages(mcp_session_store.__path__, "mcp_session_store."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(found))
"""


def test_nothing_heavy_is_imported_before_it_is_used_and_neither_rich_nor_fastmcp_is_needed() -> None:
    heavy = ["alembic", "asyncpg", "aiosqlite", "sqlite3", "sqlalchemy", "mcp", "starlette", "uvicorn"]
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy}{_IMPORTS}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"package": [], "help": [], "app": ["sqlalchemy", "mcp", "starlette", "uvicorn"]}
