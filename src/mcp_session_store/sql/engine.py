"""From a database URL to an engine: drivers, time bounds, and what cannot work said before it is tried."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.dialects import dialect_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = [
    "checked_engine",
    "checked_schema",
    "checked_url",
    "make_engine",
    "make_migration_engine",
    "shown_options",
    "shown_url",
]

_SYNONYMS: Final = {"postgres": "postgresql"}

_MIGRATION_TIMEOUT: Final = 60.0
"""Seconds to connect, or to wait for SQLite's lock: another process may be migrating."""


def checked_url(url: str | URL) -> tuple[URL, Dialect]:
    """A database URL with the driver that this package uses, and the dialect that goes with it.

    Args:
        url: `postgresql://`, `postgres://` or `sqlite:///`, with or without the driver.

    Raises:
        ConfigurationError: The URL cannot work. The message holds no password.
    """
    try:
        parsed = make_url(url)
        backend, _, driver = parsed.drivername.partition("+")
        parsed.port  # noqa: B018 - read here, where a bad one is told from other faults
    except (ArgumentError, ValueError, AttributeError):
        # Without the cause and its text, which quote the URL.
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user:password@host/database or "
            "sqlite:///path, with special characters in the password percent-encoded"
        ) from None
    dialect = dialect_named(_SYNONYMS.get(backend, backend))
    if driver not in ("", dialect.driver):
        raise ConfigurationError(
            f"the driver {driver!r} in the database URL cannot be used; write {dialect.name}+{dialect.driver}:// "
            f"or only {dialect.name}://"
        )
    return dialect.checked_url(parsed.set(drivername=f"{dialect.name}+{dialect.driver}")), dialect


def checked_engine(engine: AsyncEngine) -> Dialect:
    """The dialect of an engine that somebody else made.

    Raises:
        ConfigurationError: It cannot be used; the message says why.
    """
    if isinstance(engine, sa.Engine):
        raise ConfigurationError(
            "the engine is not async; make it with sqlalchemy.ext.asyncio.create_async_engine, or give the URL"
        )
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(
            f"a {type(engine).__name__} is neither a database URL nor an AsyncEngine; give one of them"
        )
    dialect = dialect_named(engine.dialect.name)
    if engine.dialect.driver != dialect.driver:
        raise ConfigurationError(
            f"the engine's driver is {engine.dialect.driver}; make it with {dialect.name}+{dialect.driver}://"
        )
    dialect.refuse_volatile(engine.url)
    return dialect


def checked_schema(schema: str | None, dialect: Dialect) -> str | None:
    """The schema, if it can be one.

    Raises:
        ConfigurationError: It cannot.
    """
    if schema is None:
        return None
    if not dialect.has_schemas:
        raise ConfigurationError(f"schema={schema!r}: {dialect.name} has no schemas; leave it out")
    # 63 bytes is where Postgres cuts a name, without an error: "Identifiers and Key Words" in its manual.
    # Alembic takes what a dot parts for two names.
    if not isinstance(schema, str) or not schema or {"\0", "."} & set(schema) or len(schema.encode()) > 63:
        raise ConfigurationError(f"schema={schema!r} is no name of a schema: 1 to 63 bytes, without NUL or a dot")
    return schema


def make_engine(url: URL, dialect: Dialect, *, timeout: float) -> AsyncEngine:
    """An engine of ours, in which nothing waits longer than `timeout` seconds and errors hide parameters."""
    driver_url, arguments = dialect.engine_arguments(url, timeout=timeout, command_timeout=timeout)
    engine = create_async_engine(
        driver_url,
        poolclass=AsyncAdaptedQueuePool,
        pool_timeout=timeout,
        hide_parameters=True,
        # Statements stand alone; where several belong together, a transaction is begun in SQL.
        isolation_level="AUTOCOMMIT",
        # A connection that goes back to the pool has nothing to undo, and a round trip to say so is not made.
        skip_autocommit_rollback=True,
        **arguments,
    )
    # After SQLAlchemy's own listener, which makes asyncpg forget the types that it has learned.
    sa.event.listen(engine.sync_engine, "connect", lambda connection, _: dialect.on_connect(connection, url))
    return engine


def make_migration_engine(url: URL, dialect: Dialect) -> AsyncEngine:
    """An engine of ours to migrate with: a migration may take its time, and keeps no connection afterwards."""
    url, arguments = dialect.engine_arguments(url, timeout=_MIGRATION_TIMEOUT, command_timeout=None)
    return create_async_engine(url, poolclass=NullPool, hide_parameters=True, isolation_level="AUTOCOMMIT", **arguments)


def shown_url(url: URL) -> str:
    """The URL as it may stand in a message: without password, driver and options."""
    return URL.create(
        url.drivername.partition("+")[0],
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
    ).render_as_string()


def shown_options(url: URL, schema: str | None) -> str:
    """The options of this package's commands for a database, to be pasted into a shell."""
    options: Mapping[str, str | None] = {"--url": shown_url(url), "--schema": schema}
    return " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value is not None)
