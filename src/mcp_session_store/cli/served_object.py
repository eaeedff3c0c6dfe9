"""The server object that `serve` is told to serve: of a module or a file, itself or what a function returns."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["served_object"]


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
    elif named and attributes:
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
    if inspect.isroutine(found) or isinstance(found, functools.partial):
        found = _made_by(found, target)
    _check(found, target)
    return found


def _check(found: Any, target: str) -> None:
    from mcp_session_store.adapter.sdk import underlying_server

    try:
        underlying_server(found)
    except ConfigurationError as error:
        hint = ""
        if callable(found):
            hint = " (an app that was built from a server already, stateless or not, cannot be made durable: name the"
            hint += " server object itself)"
        raise ConfigurationError(f"{target}: {error}{hint}") from error


def _made_by(factory: Any, target: str) -> Any:
    """Return what a function returns."""
    if inspect.iscoroutinefunction(factory):
        raise ConfigurationError(
            f"{target} is an async function, and the server is made before an event loop runs: name a plain function "
            "that returns the server object"
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{target} is a function that is called without arguments, but it takes some: {error}; name one that takes "
            "none and returns the server object"
        ) from error
    try:
        return factory()
    except Exception as error:
        _raise_failed(f"the function {target} fails", error)


def _only_server(module: ModuleType, target: str) -> Any:
    from mcp_session_store.adapter.sdk import underlying_server

    servers: dict[int, tuple[str, Any]] = {}
    for name, value in vars(module).items():
        try:
            underlying_server(value)
        except ConfigurationError:
            continue
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
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and _is_part_of(error.name, name):
            raise ConfigurationError(
                f"there is no module {error.name!r} in {app_dir} or among the installed packages; "
                "run the command where the module is, or give its folder with --app-dir"
            ) from error
        _raise_failed(f"the module {name!r} cannot be imported", error)


def _import_file(target: str, file: Path, app_dir: str) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise ConfigurationError(f"{target}: there is no file {file}; a path is taken from {app_dir} on")
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
    try:
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
    except Exception as error:
        _raise_failed(f"the file {file} cannot be imported", error)


def _raise_failed(what: str, error: Exception) -> NoReturn:
    # The last line of the user's own code, because the machinery of imports explains nothing.
    place = traceback.extract_tb(error.__traceback__)[-1]
    text, file, line = str(error), place.filename, place.lineno
    if isinstance(error, SyntaxError) and error.filename is not None:
        # No line of it has run.
        text, file, line = error.msg, error.filename, error.lineno
    raise ConfigurationError(
        f"{what}: {type(error).__name__}: {text} ({file}, line {line}); correct it, and try again"
    ) from error


def _is_part_of(missing: str | None, module_name: str) -> bool:
    """Return whether the module itself is missing, or a package around it, and not a module that it imports."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")
