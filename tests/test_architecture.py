"""Imports point one way: errors, records, retention, store, event log; memory, sql and adapter; app; cli."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http import StreamableHTTPServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "mcp_session_store"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
SDK_SEAMS = f"{PACKAGE}.adapter.sdk"
"""The one module that may use private names of the SDK and of FastMCP."""

_FOUNDATION = {"errors", "records", "environment", "retention", "settings"}
MAY_IMPORT = {
    # Foundation: retention speaks of records, and all raise our errors.
    "errors": set[str](),
    "records": {"errors"},
    "environment": {"errors"},
    "retention": {"errors", "records", "environment"},
    "settings": {"errors", "environment"},
    "store": _FOUNDATION,
    "event_log": {*_FOUNDATION, "store"},
    # Three that do not know of each other.
    "memory": {*_FOUNDATION, "store", "event_log"},
    "sql": {*_FOUNDATION, "store", "event_log"},
    "adapter": {*_FOUNDATION, "store", "event_log"},
    # Somebody who writes a store runs it without a database and without a server.
    "testing": {*_FOUNDATION, "store", "event_log"},
    "app": {*_FOUNDATION, "store", "event_log", "sql", "adapter"},
    "cli": {*_FOUNDATION, "store", "event_log", "sql", "adapter", "app", ""},
    # The public names, re-exported.
    "": {*_FOUNDATION, "store", "event_log", "memory", "sql", "adapter", "app"},
}
"""What each module or package at the top may import of the others; "" is the package itself."""

_SDK = {"mcp", "mcp_types", "fastmcp", "starlette", "uvicorn"}
_SQL = {"sqlalchemy", "alembic", "asyncpg", "aiosqlite", "sqlite3"}
MUST_NOT_KNOW = {
    **dict.fromkeys(
        ["errors", "records", "environment", "retention", "settings", "store", "event_log", "memory", "testing"],
        _SDK | _SQL,
    ),
    "sql": _SDK,
    "adapter": _SQL,
    "app": _SQL,
}
"""Libraries of which each must not know, not even for types."""


@dataclass(frozen=True)
class Import:
    module: str
    """The module that imports."""
    target: str
    """What is imported, down to the name: `package.module.name`."""
    line: int
    at_import_time: bool
    """Not within a function, and not for type checkers only."""

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: {self.target}"


def _modules() -> dict[str, ast.Module]:
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        modules[".".join([PACKAGE, *parts])] = ast.parse(path.read_text(), str(path))
    return modules


MODULES = _modules()


def _imports_of(module: str, tree: ast.AST) -> Iterator[Import]:
    def walk(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute in this package"
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}", node.lineno, at_import_time)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from walk(statement, False)
            for statement in node.orelse:
                yield from walk(statement, at_import_time)
        else:
            within = at_import_time and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, within)

    return walk(tree, True)


IMPORTS = [found for module, tree in MODULES.items() for found in _imports_of(module, tree)]


def _top(dotted: str) -> str:
    """The module or package at the top of ours to which a module or a name belongs; "" for the package's own."""
    part = dotted.removeprefix(PACKAGE).removeprefix(".").split(".")[0]
    return part if part in MAY_IMPORT or f"{PACKAGE}.{part}" in MODULES else ""


def _is_ours(target: str) -> bool:
    return target == PACKAGE or target.startswith(f"{PACKAGE}.")


def test_each_module_at_the_top_has_its_place() -> None:
    tops = {name.removeprefix(PACKAGE).removeprefix(".").split(".")[0] for name in MODULES}
    assert tops <= set(MAY_IMPORT), "say in MAY_IMPORT where a new module stands"


def test_imports_within_the_package_point_one_way() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if _is_ours(found.target)
        and _top(found.target) != _top(found.module)
        and _top(found.target) not in MAY_IMPORT[_top(found.module)]
    ]
    assert wrong == []


def test_the_table_of_who_may_import_whom_has_no_circle() -> None:
    placed: set[str] = set()
    left = {name: set(targets) for name, targets in MAY_IMPORT.items()}
    while ready := [name for name, targets in left.items() if targets <= placed]:
        placed.update(ready)
        for name in ready:
            del left[name]
    assert left == {}


def test_sql_knows_no_mcp_and_the_adapter_knows_no_sql() -> None:
    wrong = [
        str(found) for found in IMPORTS if found.target.split(".")[0] in MUST_NOT_KNOW.get(_top(found.module), set())
    ]
    assert wrong == []


def test_fastmcp_is_never_imported_at_import_time() -> None:
    wrong = [str(found) for found in IMPORTS if found.target.split(".")[0] == "fastmcp" and found.at_import_time]
    assert wrong == []


def test_importing_the_package_imports_no_fastmcp() -> None:
    code = f"import sys, {PACKAGE}, {PACKAGE}.cli; sys.exit('fastmcp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["list"], ["stats"], ["show", "x"], ["end", "x"]])
def test_a_command_that_looks_at_sessions_imports_no_sdk(arguments: list[str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    code = (
        f"import sys; from {PACKAGE}.cli import main\n"
        f"main(['upgrade', '--url', {url!r}], standalone_mode=False)\n"
        f"try: main(['sessions', *{arguments!r}, '--url', {url!r}], standalone_mode=False)\n"
        "except Exception as error: print(error)\n"
        "sys.exit(bool({'mcp', 'mcp_types', 'starlette', 'uvicorn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_public_name_is_there_when_it_is_asked_for() -> None:
    package = importlib.import_module(PACKAGE)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_private_modules_and_names_of_the_sdk_are_imported_in_one_module_only() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module != SDK_SEAMS
        and found.target.split(".")[0] in _SDK
        and any(part.startswith("_") for part in found.target.split("."))
    ]
    assert wrong == []


def _private_names(*classes: type) -> set[str]:
    """The private attributes of classes and of their instances, as far as their sources assign them."""
    names = set()
    for cls in classes:
        tree = ast.parse(Path(sys.modules[cls.__module__].__file__ or "").read_text())
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
        names |= {n for n in vars(cls) if n.startswith("_")}
    return {name for name in names if not name.startswith("__")}


def test_private_attributes_of_sdk_objects_are_used_in_one_module_only() -> None:
    of_any = _private_names(Server, StreamableHTTPServerTransport, StreamableHTTPSessionManager)
    # Of these classes we extend this one only, so on `self` only its names can be the SDK's.
    of_self = _private_names(StreamableHTTPSessionManager)
    assert {"_server_instances", "_session_owners", "_lifespan_state"} <= of_self
    wrong = []
    for module, tree in MODULES.items():
        # Elsewhere nothing of the SDK is in reach.
        if _top(module) not in ("adapter", "app", "cli") or module == SDK_SEAMS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                private = of_self if ast.unparse(node.value) == "self" else of_any
                if node.attr in private:
                    wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
            # An override, by accident or on purpose.
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in of_self:
                wrong.append(f"{module}, line {node.lineno}: def {node.name}")
    assert wrong == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_module_says_its_job_in_its_first_line(module: str) -> None:
    docstring = ast.get_docstring(MODULES[module])
    assert docstring, f"{module} has no docstring"
    assert docstring.splitlines()[0].strip()
