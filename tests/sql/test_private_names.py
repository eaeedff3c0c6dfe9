"""Private names of the database libraries: checked before they are used, and used in one module only."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.sql.compiler import SQLCompiler

from mcp_session_store import SqlSessionStore
from mcp_session_store.sql.dialects.private_names import CREATOR, SUPPORTED
from tests.support.databases import engine_of

ROOT = Path(__file__).resolve().parents[2]
SQL = ROOT / "src" / "mcp_session_store" / "sql"
SEAMS = SQL / "dialects" / "private_names.py"
"""The one module that may use private names of SQLAlchemy and of the drivers."""
URLS = {"sqlite": "sqlite:///sessions.db", "postgresql": "postgresql://user@host/database"}


def _refuses(database: str, library: str, reason: str) -> None:
    with pytest.raises(ImportError) as raised:
        SqlSessionStore(URLS[database])
    text = str(raised.value)
    assert reason in text
    assert re.search(rf"; {library} [\d.]+ is installed", text)
    assert text.endswith(f"pip install '{library}{SUPPORTED[library]}'")


@pytest.mark.parametrize("name", ["_conn", "_execute"])
def test_an_aiosqlite_without_a_private_name_is_refused_with_the_versions_that_have_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(aiosqlite.Connection, name)
    _refuses("sqlite", "aiosqlite", f"no {name}")


@pytest.mark.parametrize("database", URLS)
def test_a_sqlalchemy_that_does_not_tell_the_order_of_parameters_is_refused(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler sets it on itself, and here that has no effect.
    monkeypatch.setattr(SQLCompiler, "positiontup", property(lambda _: None, lambda _, __: None))
    _refuses(database, "sqlalchemy", "no positiontup")


def test_a_sqlalchemy_that_does_not_take_a_function_to_connect_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: object, *arguments: Any, **options: Any) -> object:
        raise NotImplementedError

    monkeypatch.setattr(AsyncAdapt_asyncpg_dbapi, "connect", connect)
    _refuses("postgresql", "sqlalchemy", CREATOR)


def test_a_database_is_not_concerned_by_the_other_ones_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(aiosqlite.Connection, "_execute")
    assert engine_of(SqlSessionStore(URLS["postgresql"])).dialect.name == "postgresql"


def test_the_versions_that_a_refusal_names_are_those_that_the_package_requires() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    parts = [re.match(r"([\w-]+)(?:\[\w+\])?(.*)", line) for line in dependencies]
    required = {part[1]: part[2] for part in parts if part is not None}
    assert {library: required[library] for library in SUPPORTED} == SUPPORTED


def test_private_names_of_the_database_libraries_are_used_in_one_module_only() -> None:
    wrong = []
    for path in SQL.rglob("*.py"):
        if path == SEAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if (private and ast.unparse(node.value) not in ("self", "cls")) or node.attr == "positiontup":
                    wrong.append(f"{path.name}, line {node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
                wrong.append(f"{path.name}, line {node.lineno}: {node.arg}=")
            if isinstance(node, ast.Constant) and node.value == CREATOR:
                wrong.append(f"{path.name}, line {node.lineno}: {CREATOR}")
    assert wrong == []
