"""Engines for SQLite that a caller made: whichever way they begin transactions, ours begin by SQL alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from mcp_session_store.sql.dialects.private_names import call_in_thread

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import Pool

__all__ = ["in_autocommit"]


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
