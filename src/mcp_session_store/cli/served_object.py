"""The server object that `serve` is told to serve: of a module or a file, itself or what a function returns."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["served_object"]

_MODULE: Final = re.compile(r"[^./\\:][^/\\:]*")
"""Name of a module: neither a path, nor relative to a package, nor itself with an attribute."""


def served_object(target: str, app_dir: str) -> Any:
    """Return the server object that a target names; a function that it names is called for one.

    Args:
        target: MODULE:ATTRIBUTE, FILE:ATTRIBUTE, or a file alone, which then has one server.
        app_dir: Folder in which the module or the file is looked for first.

    Raises:
        ConfigurationError: There is no such object, or it is no server; the message says what to do.
    """
    # The last colon, because a path may have one.
    named, _, attributes = target.rpartition(":") if not target.endswith(".py") else (target, "", "")
    if named.endswith(".py"):
        module = _import_file(target, Path(app_dir, named), app_dir)
    elif _MODULE.fullmatch(named) and attributes:
        module = _import_module(named, app_dir)
    else:
        raise ConfigurationError(
            f"{target!r} does not say what to serve: give MODULE:ATTRIBUTE, as in notes.server:mcp, or FILE:ATTRIBUTE, "
            "as in ./server.py:mcp"
        )
    if not attributes:
        return _only_server(module, target)
    found: Any = module
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise ConfigurationError(
                f"the module {named!r} has no {attributes!r}; name the variable that holds the server object"
            ) from error
    if callable(found) and not _is_server(found) and not _is_app(found):
        found = _made_by(found, target)
    _check(found, target)
    return found


def _is_server(value: object) -> bool:
    from mcp_session_store.adapter.sdk import underlying_server

    try:
        underlying_server(value)
    except ConfigurationError:
        return False
    return True


def _is_app(value: object) -> bool:
    # Imported where it is used, because the other commands need none of it.
    from starlette.applications import Starlette

    return isinstance(value, Starlette)


def _check(found: Any, target: str) -> None:
    from mcp_session_store.adapter.sdk import underlying_server

    try:
        underlying_server(found)
    except ConfigurationError as error:
        raise ConfigurationError(f"{target}: {error}{_BUILT if _is_app(found) else ''}") from error


_BUILT: Final = (
    " (an app that was built from a server already, stateless or not, cannot be made durable: name the server object "
    "itself)"
)


def _made_by(factory: Any, target: str) -> Any:
    """Return what a function, a class or another callable object returns."""
    if inspect.isclass(factory) and factory.__module__.partition(".")[0] in ("mcp", "fastmcp"):
        raise ConfigurationError(
            f"{target} is the class {factory.__qualname__} of the framework: name the variable that holds the server "
            "object"
        )
    what = "a class" if inspect.isclass(factory) else "a function" if inspect.isroutine(factory) else "an object"
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = inspect.Signature()  # of C code, which says nothing of it
    if list(signature.parameters)[:1] == ["scope"]:
        raise ConfigurationError(f"{target} is an ASGI app, and no server{_BUILT}")
    if inspect.iscoroutinefunction(factory) or inspect.iscoroutinefunction(type(factory).__call__):
        raise ConfigurationError(
            f"{target} is an async function, and the server is made before an event loop runs: name a plain function "
            "that returns the server object"
        )
    try:
        signature.bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{target} is {what} that is called without arguments, but it takes some: {error}; name one that takes "
            "none and returns the server object"
        ) from error
    with _naming_failures(f"{what.partition(' ')[2]} {target} fails"):
        return factory()


def _only_server(module: ModuleType, target: str) -> Any:
    servers: dict[int, tuple[str, Any]] = {}
    for name, value in vars(module).items():
        if _is_server(value):
            servers.setdefault(id(value), (name, value))
    if len(servers) == 1:
        return next(iter(servers.values()))[1]
    names = ", ".join(f"{target}:{name}" for name, _ in servers.values())
    raise ConfigurationError(
        f"{target} has several servers: name one of {names}"
        if servers
        else f"{target} has no server at its top level: name the variable or the function, as in {target}:make_server"
    )


def _import_module(name: str, app_dir: str) -> ModuleType:
    if app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    with _naming_failures(f"the module {name!r} cannot be imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not _is_part_of(error.name, name):
                raise
            missing = error
    raise ConfigurationError(
        f"there is no module {missing.name!r} in {app_dir} or among the installed packages; "
        "run the command where the module is, or give its folder with --app-dir"
    ) from missing


def _import_file(target: str, file: Path, app_dir: str) -> ModuleType:
    file = file.resolve()
    # Not by `Path`, which raises for a folder that may not be entered.
    if not os.path.isfile(file):
        raise ConfigurationError(
            f"{target}: there is no file {file} that this process may read; a path is taken from {app_dir} on"
        )
    # A file within a package is imported as its module, so that its relative imports work.
    folder, parts = file.parent, [] if file.stem == "__init__" else [file.stem]
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    name = ".".join(parts)
    # The file's own folder first, as where Python runs a file.
    for path in dict.fromkeys((str(folder), str(file.parent))):
        if path not in sys.path:
            sys.path.insert(0, path)
    loaded = sys.modules.get(name)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != file:
        # As a file with the name of a module that is loaded, such as mcp.py.
        name = f"_served_{file.stem}"
        loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded
    with _naming_failures(f"the file {file} cannot be imported"):
        if len(parts) > 1:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


@contextlib.contextmanager
def _naming_failures(what: str) -> Iterator[None]:
    """Name what the user's own code raises, and where, in place of a traceback; also where it ends the program."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # The last line of the user's own code, because the machinery of imports explains nothing.
        place = traceback.extract_tb(error.__traceback__)[-1]
        text, file, line = str(error), place.filename, place.lineno
        if isinstance(error, SyntaxError) and error.filename is not None:
            # No line of it has run.
            text, file, line = error.msg, error.filename, error.lineno
        hint = "correct it, and try again"
        if isinstance(error, SystemExit):
            hint = 'what ends the program belongs under if __name__ == "__main__"'
        raise ConfigurationError(f"{what}: {type(error).__name__}: {text} ({file}, line {line}); {hint}") from error


def _is_part_of(missing: str | None, module_name: str) -> bool:
    """Return whether the module itself is missing, or a package around it, and not a module that it imports."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")
