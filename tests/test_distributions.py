"""The sdist, and the wheel of it, which works in an environment that has nothing else of this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.sql.schema.version import HEAD

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]


# Two builds of environments, with downloads.
pytestmark = pytest.mark.timeout(600)


def _environment() -> dict[str, str]:
    # A PYTHONPATH would let the checkout stand in for what the wheel lacks.
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MCP_SESSION_STORE"))}


def _run(command: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _packaged() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [name.strip("/") for name in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel of it, as `python -m build` makes them of what is packaged."""
    source = tmp_path_factory.mktemp("source")
    for name in (*_packaged(), "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("distributions")
    _run([sys.executable, "-m", "build", "--outdir", folder, source], source)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (built,) = distributions.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment that has the wheel, and what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    # This environment's pip does without one there. What is imported is compiled then, and most is not.
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder]
    _run([*pip, "install", "--quiet", "--no-compile", wheel], folder)
    return folder / "bin"


def test_what_is_shown_of_both_on_an_index_is_right(distributions: Path) -> None:
    found = sorted(distributions.iterdir())
    assert {path.suffix for path in found} == {".whl", ".gz"}
    _run([sys.executable, "-m", "twine", "check", "--strict", *found], distributions)


def test_the_sdist_holds_what_is_packaged(distributions: Path) -> None:
    (built,) = distributions.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    assert {name.split("/")[0] for name in _packaged()} - names == set()


def test_the_wheel_holds_the_migrations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packaged = {name.removeprefix("mcp_session_store/sql/schema/") for name in names if "/migrations/" in name}
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "migrations").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == there
    # The module that programs import is no folder.
    assert "mcp_session_store/migrations.py" in names
    assert "mcp_session_store/py.typed" in names


def test_the_installed_wheel_migrates_a_database(installed: Path, tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
import mcp_session_store
from mcp_session_store import migrations
from mcp_session_store.sql.schema.migrate import migrations_folder

package = Path(mcp_session_store.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert migrations_folder() == package / "sql" / "schema" / "migrations"
url = "sqlite:///sessions.db"
asyncio.run(migrations.upgrade(url))
asyncio.run(migrations.check(url))
print(asyncio.run(migrations.current(url)))
"""
    assert _run([installed / "python", "-c", code], tmp_path).strip() == HEAD


def test_the_installed_command_migrates_a_database(installed: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [installed / "mcp-session-store"]
    _run([*command, "upgrade", "--url", "sqlite:///sessions.db"], tmp_path)
    assert _run([*command, "current", "--url", "sqlite:///sessions.db"], tmp_path).strip() == HEAD
    _run([*command, "check", "--url", "sqlite:///sessions.db"], tmp_path)
    assert "CREATE TABLE mcp_session (" in _run(
        [*command, "upgrade", "--sql", "--url", "postgresql://nowhere.invalid/db"], tmp_path
    )
    _run([*command, "downgrade", "base", "--yes", "--url", "sqlite:///sessions.db"], tmp_path)
    assert _run([*command, "current", "--url", "sqlite:///sessions.db"], tmp_path).strip() == "none"


def test_the_installed_package_serves(installed: Path, tmp_path: Path) -> None:
    code = """
import asyncio
from mcp.server.mcpserver import MCPServer
from mcp_session_store import durable_app

async def main():
    app = durable_app(MCPServer("bare"), "sqlite:///sessions.db", events=True)
    async with app.router.lifespan_context(app):
        print("serves")

asyncio.run(main())
"""
    assert _run([installed / "python", "-c", code], tmp_path).strip() == "serves"
