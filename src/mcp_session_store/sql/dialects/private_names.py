"""Every private name of SQLAlchemy and aiosqlite that this package uses, and why. No other module uses any.

The checks run when a kind of database is first used. They name the versions that work, instead of failing later with
a statement of a session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi

from mcp_session_store.installed import installed_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["CREATOR", "call_in_thread", "check_aiosqlite", "check_compiler", "check_creator", "parameter_names"]

_T = TypeVar("_T")
_Argument = TypeVar("_Argument")

SUPPORTED: Final = {"sqlalchemy": ">=2.0.43,<2.2", "aiosqlite": ">=0.20,<0.23"}
"""Versions that have these names, as `pyproject.toml` requires them."""

CREATOR: Final = "async_creator_fn"
"""Argument of SQLAlchemy's `connect` for asyncpg: the function that connects. The public `async_creator` of an engine
gets no arguments, and would have to read the URL itself."""


def parameter_names(compiled: Any) -> Sequence[str]:
    """Return the names of a compiled statement's parameters, in the order in which the driver takes their values.

    SQLAlchemy documents the parameters of a compiled statement as a mapping only, and the driver takes positions.
    """
    names: Sequence[str] = compiled.positiontup
    return names


def call_in_thread(driver: Any, function: Callable[[Any, _Argument], _T], argument: _Argument) -> Awaitable[_T]:
    """Call a function with aiosqlite's connection of `sqlite3`, in the thread in which that connection is used.

    The public methods ask the thread for one thing each, and each time the way there and back takes longer than all of
    a transaction's statements. A caller that is cancelled in between leaves a transaction open until the connection is
    closed.
    """
    result: Awaitable[_T] = driver._execute(function, driver._conn, argument)
    return result


def check_compiler(dialect: sa.Dialect) -> None:
    """Check that SQLAlchemy gives the order of parameters.

    Raises:
        ImportError: It does not; the message names the versions that do.
    """
    statement = sa.select(sa.bindparam("first", type_=sa.Text), sa.bindparam("second", type_=sa.Text))
    if getattr(statement.compile(dialect=dialect), "positiontup", None) != ["first", "second"]:
        raise _does_not_fit("sqlalchemy", "a compiled statement has no positiontup")


def check_creator() -> None:
    """Check that SQLAlchemy connects with a function that it is given.

    Raises:
        ImportError: It does not; the message names the versions that do.
    """
    # Its signature does not say so, because it accepts any argument, and passes the rest on to asyncpg.
    if CREATOR not in AsyncAdapt_asyncpg_dbapi.connect.__code__.co_consts:
        raise _does_not_fit("sqlalchemy", f"its connect() for asyncpg does not know {CREATOR}")


def check_aiosqlite() -> None:
    """Check that aiosqlite runs a function in the thread of a connection.

    Raises:
        ImportError: It does not; the message names the versions that do.
    """
    import aiosqlite  # imported here, because Python may be built without sqlite3, and Postgres needs neither

    if missing := [name for name in ("_conn", "_execute") if not hasattr(aiosqlite.Connection, name)]:
        raise _does_not_fit("aiosqlite", f"its Connection has no {', '.join(missing)}")


def _does_not_fit(library: str, reason: str) -> ImportError:
    supported, installed = f"{library}{SUPPORTED[library]}", installed_version(library) or "(version unknown)"
    return ImportError(
        f"mcp-session-store works with {supported}; {library} {installed} is installed, and "
        f"does not fit: {reason}. Install a version that does: pip install '{supported}'"
    )
