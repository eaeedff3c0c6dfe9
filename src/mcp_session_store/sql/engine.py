"""From a database URL to an engine: drivers, time limits, and checks that come before the first connection."""

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
"""Seconds to connect, or to wait for SQLite's lock, because another process may be migrating."""


def checked_url(url: str | URL) -> tuple[URL, Dialect]:
    """Return a database URL with the driver that this package uses, and its dialect.

    Args:
        url: `postgresql://`, `postgres://` or `sqlite:///`, with or without the driver.

    Raises:
        ConfigurationError: The URL cannot work. The message holds no password.
    """
    try:
        parsed = make_url(url)
        backend, _, driver = parsed.drivername.partition("+")
        parsed.port  # noqa: B018 - a port that is no number raises here
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
    """Return the dialect of an engine that the caller made.

    Raises:
        ConfigurationError: The engine cannot be used; the message says why.
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
    if engine.get_execution_options().get("schema_translate_map"):
        raise ConfigurationError(
            "the engine has a schema_translate_map, which statements that go to the driver itself do not follow; "
            "name the schema by schema= instead"
        )
    dialect.refuse_volatile(engine.url)
    return dialect


def checked_schema(schema: str | None, dialect: Dialect) -> str | None:
    """Return a schema that the database can have.

    Raises:
        ConfigurationError: The database cannot have it.
    """
    if schema is None:
        return None
    if not dialect.has_schemas:
        raise ConfigurationError(f"schema={schema!r}: {dialect.name} has no schemas; give none")
    # 63 bytes is where Postgres cuts a name, without an error: "Identifiers and Key Words" in its manual.
    # Alembic reads a dot as the end of one name and the beginning of another.
    if not isinstance(schema, str) or not schema or {"\0", "."} & set(schema) or len(schema.encode()) > 63:
        raise ConfigurationError(f"schema={schema!r} is no name of a schema; give 1 to 63 bytes, without NUL or a dot")
    return schema


def make_engine(url: URL, dialect: Dialect, *, timeout: float) -> AsyncEngine:
    """Return an engine in which each wait ends after `timeout` seconds, and whose errors hide parameters."""
    driver_url, arguments = dialect.engine_arguments(url, timeout=timeout, command_timeout=timeout)
    engine = create_async_engine(
        driver_url,
        poolclass=AsyncAdaptedQueuePool,
        pool_timeout=timeout,
        hide_parameters=True,
        # Each statement is a transaction; where several belong together, SQL begins one.
        isolation_level="AUTOCOMMIT",
        # A connection that goes back to the pool has nothing to roll back, which saves a round trip.
        skip_autocommit_rollback=True,
        **arguments,
    )
    # After SQLAlchemy's own listener, because that makes asyncpg forget the types that it has looked up.
    sa.event.listen(engine.sync_engine, "connect", lambda connection, _: dialect.on_connect(connection, url))
    return engine


def make_migration_engine(url: URL, dialect: Dialect) -> AsyncEngine:
    """Return an engine for migrations: statements have no time limit, and no connection is kept."""
    url, arguments = dialect.engine_arguments(url, timeout=_MIGRATION_TIMEOUT, command_timeout=None)
    return create_async_engine(url, poolclass=NullPool, hide_parameters=True, isolation_level="AUTOCOMMIT", **arguments)


def shown_url(url: URL) -> str:
    """Return a URL as text for messages: without password, driver and options."""
    return URL.create(
        url.drivername.partition("+")[0],
        username=url.username,
        host=url.host,
        port=url.port,
        database=url.database,
    ).render_as_string()


def shown_options(url: URL, schema: str | None) -> str:
    """Return the options with which this package's commands find a database, quoted for a shell."""
    options: Mapping[str, str | None] = {"--url": shown_url(url), "--schema": schema}
    return " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value is not None)
