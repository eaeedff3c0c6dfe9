"""From a database URL to an engine: drivers, time limits, and checks that come before the first connection."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlencode

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

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
    "make_engine_without_pool",
    "make_migration_engine",
    "shown_options",
    "shown_url",
]

_SYNONYMS: Final = {"postgres": "postgresql"}

_PLAIN: Final = re.compile(r"[\w.@+-]{1,63}")
"""User names that are shown. Another text may be a password that was written in the wrong place."""

_SECRET_OPTIONS: Final = frozenset({"sslpassword", "password", "user"})

_DELIMITERS: Final = frozenset("@/?#:%")
"""Characters that end a part of a URL, and no one puts into the name of a database."""

_MIGRATION_TIMEOUT: Final = 60.0
"""Seconds to connect, or to wait for SQLite's lock, because another process may be migrating."""


def checked_url(url: str | URL) -> tuple[URL, Dialect]:
    """Return a database URL with the driver that this package uses, and its dialect.

    Args:
        url: `postgresql://`, `postgres://` or `sqlite:///`, with or without the driver. White space around it is
            ignored.

    Raises:
        ConfigurationError: The URL cannot work. The message holds no part of a password.
    """
    given = _readable(url) if isinstance(url, str) else url
    try:
        parsed = make_url(given)
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
    if isinstance(url, URL) and _is_broken_by_password(parsed):
        raise _unencoded()
    return dialect.checked_url(parsed.set(drivername=f"{dialect.name}+{dialect.driver}")), dialect


def _readable(text: str) -> str:
    """Return a URL as SQLAlchemy reads it: without white space around it, and with several hosts as options.

    Raises:
        ConfigurationError: The URL stands in quotes, or a character of the password is not encoded.
    """
    text = text.strip()
    if text[:1] in ("'", '"'):
        raise ConfigurationError("the database URL stands in quotes, which are part of the value; remove them")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.startswith("sqlite"):
        return text
    # RFC 3986, section 3.2: the authority ends at the first of these.
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    others = rest[len(authority) :]
    if "@" in user or "@" in others:
        raise _unencoded()
    if "," not in hosts:
        return text
    path, _, query = others.partition("?")
    options = urlencode([("host", host if ":" in host else f"{host}:5432") for host in hosts.split(",")])
    return f"{scheme}://{user}{at}{path}?{options}{'&' if query else ''}{query}"


def _is_broken_by_password(url: URL) -> bool:
    """Return whether a URL that was parsed elsewhere has parts of a password where host and database stand.

    SQLAlchemy ends a password at the first @.
    """
    return url.host is not None and ("@" in url.host or not _DELIMITERS.isdisjoint(url.database or ""))


def _unencoded() -> ConfigurationError:
    return ConfigurationError(
        "the database URL has a special character between :// and the last @ that is not percent-encoded; write "
        "%40 for @, %2F for /, %3F for ?, %23 for #, %3A for :, %25 for %"
    )


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
    engine = create_async_engine(
        url,
        # `Connections` keeps those for queries; one that listens is kept by its listener.
        poolclass=NullPool,
        hide_parameters=True,
        # Each statement is a transaction; where several belong together, SQL begins one.
        isolation_level="AUTOCOMMIT",
        # A connection that is closed has nothing to roll back, which saves a round trip.
        skip_autocommit_rollback=True,
        **dialect.engine_arguments(url, timeout=timeout, command_timeout=timeout),
    )
    # After SQLAlchemy's own listener, because that makes asyncpg forget the types that it has looked up.
    sa.event.listen(engine.sync_engine, "connect", lambda connection, _: dialect.on_connect(connection, url))
    return engine


def make_migration_engine(url: URL, dialect: Dialect) -> AsyncEngine:
    """Return an engine for migrations: statements have no time limit, and no connection is kept."""
    return make_engine_without_pool(url, dialect, timeout=_MIGRATION_TIMEOUT, command_timeout=None)


def make_engine_without_pool(
    url: URL, dialect: Dialect, *, timeout: float, command_timeout: float | None
) -> AsyncEngine:
    """Return an engine that keeps no connection; see `Dialect.engine_arguments`."""
    arguments = dialect.engine_arguments(url, timeout=timeout, command_timeout=command_timeout)
    return create_async_engine(url, poolclass=NullPool, hide_parameters=True, isolation_level="AUTOCOMMIT", **arguments)


def shown_url(url: URL) -> str:
    """Return a URL as text for messages: without password, driver and options."""
    backend = url.drivername.partition("+")[0]
    if _is_broken_by_password(url):
        return f"{backend}://***"
    # Rendered alone, because a host with a port would be taken for an address of IPv6.
    database = URL.create(backend, database=url.database).render_as_string().partition("://")[2]
    return f"{backend}://{_shown_authority(url)}{database}"


def _shown_authority(url: URL) -> str:
    if url.host is not None:
        host = f"[{url.host}]" if ":" in url.host else url.host
        hosts = host if url.port is None else f"{host}:{url.port}"
    else:
        several = url.query.get("host", ())
        hosts = "" if isinstance(several, str) else ",".join(several)
    if url.username is None:
        return hosts
    user = quote(url.username, safe="") if _PLAIN.fullmatch(url.username) else "***"
    return f"{user}@{hosts}"


def shown_options(url: URL, schema: str | None) -> str:
    """Return the options with which this package's commands find a database, quoted for a shell.

    The URL has no password, because commands are kept in histories; asyncpg takes it from `PGPASSWORD` or a file.
    """
    shown = shown_url(url)
    query = [
        (name, value)
        for name, values in url.query.items()
        if name not in _SECRET_OPTIONS and (name != "host" or isinstance(values, str))
        for value in ([values] if isinstance(values, str) else values)
    ]
    if query:
        shown += f"?{urlencode(query, safe='/')}"
    options: Mapping[str, str | None] = {"--url": shown, "--schema": schema}
    return " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value is not None)
