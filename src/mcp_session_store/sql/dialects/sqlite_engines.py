"""Engines and connections for SQLite that a caller made: whichever way they begin transactions, ours begin by SQL."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.ext.asyncio import AsyncEngine

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.dialects.private_names import call_in_thread

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import Pool

__all__ = ["in_autocommit", "joining"]


def in_autocommit(engine: AsyncEngine) -> AsyncEngine:
    """Return an engine over the connections of another one that runs each statement as a transaction of its own.

    SQLAlchemy's manual has two ways to let an application begin transactions as it should: a listener that emits BEGIN
    for each connection in use, and the driver's `autocommit=False` ("SQLite", "Enabling Non-Legacy Transactional
    Modes"). With either, a transaction of the application's kind would run already where ours begins one by SQL. So
    this engine has no listeners, and connections leave that mode while they are ours.
    """
    ours = _Engine(engine.sync_engine)
    return AsyncEngine(ours).execution_options(isolation_level="AUTOCOMMIT")


class _Engine(sa.Engine):
    """An engine without listeners over the pool that another engine has now; it may replace its pool."""

    def __init__(self, given: sa.Engine) -> None:
        self._given = given
        super().__init__(given.pool, _dialect_over(given.dialect), given.url, hide_parameters=given.hide_parameters)

    @property
    def pool(self) -> Pool:
        return self._given.pool

    @pool.setter
    def pool(self, pool: Pool) -> None:
        pass


def _dialect_over(given: sa.Dialect) -> sa.Dialect:
    """Return a dialect with the state of another one, which is known after its first connection only."""
    # SQLAlchemy asks each class for itself whether its statements can be cached.
    attributes = {"supports_statement_cache": type(given).supports_statement_cache}
    kind: Any = type("_AutocommitDialect", (_Autocommit, type(given)), attributes)
    dialect: sa.Dialect = kind.__new__(kind)
    dialect.__dict__ = given.__dict__
    return dialect


class _Autocommit:
    """Brings connections into autocommit, and back into the mode that they were in."""

    def set_isolation_level(self, connection: DBAPIConnection, level: str) -> None:  # noqa: ARG002 - AUTOCOMMIT
        driver: Any = connection
        driver.run_async(partial(call_in_thread, function=_enter, argument=driver.driver_connection))

    def reset_isolation_level(self, connection: DBAPIConnection) -> None:
        driver: Any = connection
        driver.run_async(partial(call_in_thread, function=_leave, argument=driver.driver_connection))


_modes: Final[WeakKeyDictionary[Any, tuple[str | None, object]]] = WeakKeyDictionary()
"""Modes in which connections were before they were ours: their isolation level, and their autocommit."""


def _enter(connection: sqlite3.Connection, driver: Any) -> None:
    # Since Python 3.12; the number -1 stands for the mode of older versions, in which the isolation level counts.
    autocommit = getattr(connection, "autocommit", -1)
    _modes[driver] = (connection.isolation_level, autocommit)
    if autocommit is False:
        connection.autocommit = True  # type: ignore[attr-defined]
    connection.isolation_level = None


def _leave(connection: sqlite3.Connection, driver: Any) -> None:
    level, autocommit = _modes.pop(driver)
    connection.isolation_level = level  # type: ignore[assignment]
    if autocommit is False:
        connection.autocommit = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def joining(connection: sa.Connection, *, begin: str) -> Iterator[None]:
    """Migrate within a block, in the transaction that runs on a connection; see `Dialect.joining`.

    Python's driver begins a transaction before a change of rows only, and not before DDL, so that one may run for
    SQLAlchemy and not for SQLite. Then it is begun here: the driver commits it with the caller's.

    Args:
        connection: The connection.
        begin: Statement that begins a transaction for changes.
    """
    # SQLAlchemy begins its transaction before the first statement, and calls an application's listener that begins one.
    connection.exec_driver_sql("SELECT 1")
    pooled = connection.connection
    driver: Any = pooled.dbapi_connection
    if isinstance(driver, AdaptedConnection):
        function = partial(call_in_thread, function=_begun, argument=begin)
        begun = driver.run_async(function)
    else:
        begun = _begun(driver, begin)
    if not begun:
        raise ConfigurationError(
            "the connection is in autocommit, so that there is no transaction to join; begin one on it, by BEGIN "
            "IMMEDIATE, or give one without isolation_level='AUTOCOMMIT' or autocommit=True, or the engine or the URL, "
            "for a transaction of its own"
        )
    yield


def _begun(connection: sqlite3.Connection, begin: str) -> bool:
    """Return whether a transaction runs that the driver's `commit` ends, and begin one where none does."""
    if connection.in_transaction:
        return True
    # Without an isolation level, or with Python 3.12's own autocommit, statements are committed by themselves.
    if connection.isolation_level is None or getattr(connection, "autocommit", -1) is True:
        return False
    connection.execute(begin)
    return True
