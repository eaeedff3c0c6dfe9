"""The shape of the code, as far as the contracts of import-linter in pyproject.toml cannot hold it."""

from __future__ import annotations

import ast
import functools
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
ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / PACKAGE
SDK_SEAMS = f"{PACKAGE}.adapter.sdk"
"""The one module that may use private names of the SDK and of FastMCP."""

_SDK = {"mcp", "mcp_types", "fastmcp", "starlette", "uvicorn"}

LONGEST = 420
"""Lines that a module may have: about 400."""


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


def _paths() -> dict[str, Path]:
    paths = {}
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        paths[".".join([PACKAGE, *parts])] = path
    return paths


PATHS = _paths()


# Parsed by the tests that look into them, because each process of a test run imports this module.
@functools.cache
def _modules() -> dict[str, ast.Module]:
    return {module: ast.parse(path.read_text(), str(path)) for module, path in PATHS.items()}


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


@functools.cache
def _imports() -> list[Import]:
    return [found for module, tree in _modules().items() for found in _imports_of(module, tree)]


def test_the_contracts_of_imports_hold() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_fastmcp_is_never_imported_at_import_time() -> None:
    wrong = [str(found) for found in _imports() if found.target.split(".")[0] == "fastmcp" and found.at_import_time]
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
        for found in _imports()
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
    for module, tree in _modules().items():
        # Elsewhere nothing of the SDK is in reach.
        if not module.startswith(tuple(f"{PACKAGE}.{top}" for top in ("adapter", "app", "cli"))) or module == SDK_SEAMS:
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


@pytest.mark.parametrize("module", sorted(PATHS))
def test_each_module_says_its_job_in_its_first_line(module: str) -> None:
    docstring = ast.get_docstring(_modules()[module])
    assert docstring, f"{module} has no docstring"
    assert docstring.splitlines()[0].strip()


def test_no_module_is_long() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


INTERNALS = "tests/support/internals.py"
"""The one module of the tests that may name private members of the package."""


@functools.cache
def _test_modules() -> dict[str, ast.Module]:
    paths = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob(".ci/**/*.py")])
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(), str(path)) for path in paths}


def test_no_test_module_imports_from_another() -> None:
    """Helpers of several test modules have modules of their own in tests/support."""
    wrong = [
        str(found)
        for module, tree in _test_modules().items()
        for found in _imports_of(module, tree)
        if found.target.startswith(("tests.", "interop_tests."))
        and any(part == "conftest" or part.startswith("test_") for part in found.target.split("."))
    ]
    assert wrong == []


def _defined_in(tree: ast.AST) -> set[str]:
    """The private names that a module defines: its own, those of its classes, and those of their instances."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            names.add(node.attr)
    return {name for name in names if name.strip("_") and name.startswith("_") and not name.startswith("__")}


def test_tests_name_private_members_of_the_package_in_one_module_only() -> None:
    private = set().union(*(_defined_in(tree) for tree in _modules().values()))
    assert {"_database", "_recorder"} <= private
    wrong = []
    for module, tree in _test_modules().items():
        if module == INTERNALS:
            continue
        of_others = private - _defined_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in of_others:
                wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
            # As in `monkeypatch.setattr(thing, "_name", …)`.
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
                wrong += [
                    f"{module}, line {node.lineno}: {ast.unparse(node)}"
                    for argument in node.args
                    if isinstance(argument, ast.Constant) and argument.value in of_others
                ]
        wrong += [
            str(found)
            for found in _imports_of(module, tree)
            if found.target.startswith(f"{PACKAGE}.") and found.target.split(".")[-1] in private
        ]
    assert wrong == []
