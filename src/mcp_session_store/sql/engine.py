"""From a database URL to an engine: drivers, time limits, and checks that come before the first connection."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import parse_qsl, unquote, urlencode

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from mcp_session_store.errors import ConfigurationError, StoreMisconfigured
from mcp_session_store.settings import checked_type
from mcp_session_store.sql.dialects import dialect_named
from mcp_session_store.sql.shown import (
    ReadUrl,
    engine_url,
    is_broken_by_password,
    shown_command,
    shown_options,
    shown_url,
    url_of,
)

if TYPE_CHECKING:
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.dialects.watched_file import WatchedFile

__all__ = [
    "UrlOrEngine",
    "check_place",
    "checked_engine",
    "checked_schema",
    "checked_url",
    "is_engine",
    "make_engine",
    "make_engine_without_pool",
    "make_migration_engine",
    "refuse_absent",
    "shown_command",
    "shown_options",
    "shown_url",
    "url_of",
]

UrlOrEngine: TypeAlias = str | URL | AsyncEngine
"""What names a database; an engine is the caller's to dispose."""

_SYNONYMS: Final = {"postgres": "postgresql"}
_INVISIBLE: Final = "\ufeff\u200b\u2060"
"""Characters that editors and web pages leave around a text, and that are no white space."""
_QUOTES: Final = tuple("'\"`\u201c\u201d\u2018\u2019")

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
    if isinstance(given, str):
        parsed = _whole(parsed, given, dialect)
    parsed = parsed.set(drivername=f"{dialect.name}+{dialect.driver}")
    if isinstance(url, URL) and is_broken_by_password(parsed):
        raise _unencoded()
    return dialect.checked_url(parsed), dialect


def _whole(parsed: URL, text: str, dialect: Dialect) -> URL:
    """Return a URL with the options that are empty, which SQLAlchemy leaves out, and with its database decoded.

    Args:
        parsed: URL as SQLAlchemy reads it.
        text: Its text.
        dialect: Its dialect.

    Raises:
        ConfigurationError: An option has no value.
    """
    place, _, query = text.partition("://")[2].partition("?")
    if without := [option for option in query.split("&") if option and "=" not in option]:
        # Any other name may be the end of a password.
        named = f"the option {without[0]}" if without[0] in dialect.public_options else "an option"
        raise ConfigurationError(f"the database URL has {named} without a value; write name=value, or remove it")
    # In their order, which printed commands keep.
    options: dict[str, list[str]] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        options.setdefault(name, []).append(value)
    _, slash, database = place.partition("/")
    if dialect.has_addresses and re.search(r"[&;]\w+=", database):
        # Not by the text, which may hold a password.
        raise ConfigurationError(
            "the database URL has options behind the name of the database without a ? between them; write ? before the "
            "first option and & before each other one, or %26 for a & in the name"
        )
    if slash:
        # SQLAlchemy before 2.1 does not decode it.
        parsed = parsed.set(database=unquote(database))
    if "\0" in unquote(text):
        raise ConfigurationError("the database URL holds a NUL character (%00), which no part of it may have")
    return ReadUrl(*parsed.set(query={name: values if values[1:] else values[0] for name, values in options.items()}))


def _readable(text: str) -> str:
    """Return a URL as SQLAlchemy reads it: without white space around it, and with several hosts as options.

    Raises:
        ConfigurationError: The URL stands in quotes or on several lines, or a character of the password is not encoded.
    """
    text = text.strip().strip(_INVISIBLE).strip()
    if text[:1] in _QUOTES:
        raise ConfigurationError("the database URL stands in quotes, which are part of the value; remove them")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.startswith("sqlite"):
        _refuse_comment(text)
        return text
    # RFC 3986, section 3.2: the authority ends at the first of these.
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    others = rest[len(authority) :]
    if "@" in user or "@" in others:
        raise _unencoded()
    _refuse_comment(others)
    if re.search(r"[\x00-\x1f\x7f]", text) or re.search(r"\s", hosts):
        raise ConfigurationError(
            "the database URL has a line's end, a tab or a blank within it; write it on one line, with %20 for a blank "
            "in the password"
        )
    path, _, query = others.partition("?")
    if "," not in hosts:
        folder, _, port = hosts.partition(":")
        if not unquote(folder).startswith("/"):
            return text
        # libpq: the folder of a socket, which SQLAlchemy takes as an option only.
        options = urlencode({"host": unquote(folder)} | ({"port": port} if port else {}), safe="/")
        return f"{scheme}://{user}{at}{path}?{options}{'&' if query else ''}{query}"
    addresses = [_address(host) for host in hosts.split(",")]
    if "[" in hosts:
        # Addresses of IPv6, whose colons SQLAlchemy takes for that of a port.
        options = urlencode(
            {"host": ",".join(host for host, _ in addresses), "port": ",".join(p for _, p in addresses)}
        )
    else:
        options = urlencode([("host", f"{host}:{port}") for host, port in addresses])
    return f"{scheme}://{user}{at}{path}?{options}{'&' if query else ''}{query}"


def _refuse_comment(text: str) -> None:
    if re.search(r"\s#", text):
        raise ConfigurationError(
            "the database URL is followed by a comment, which is part of the value; remove it, or write %20%23 for a "
            "blank and a # that belong to the URL"
        )


def _address(text: str) -> tuple[str, str]:
    """Return the host and the port of one of several addresses."""
    host, end, port = text.rpartition("]") if text.startswith("[") else ("", "", text)
    name, _, port = port.partition(":")
    return (host.removeprefix("[") if end else name), port or "5432"


def _unencoded() -> ConfigurationError:
    return ConfigurationError(
        "the database URL has a special character between :// and the last @ that is not percent-encoded; write "
        "%40 for @, %2F for /, %3F for ?, %23 for #, %3A for :, %25 for %"
    )


def refuse_absent(url: URL, dialect: Dialect) -> None:
    """Refuse what cannot be a database, and a database that a connection would create, as that of a mistyped name.

    Raises:
        StoreMisconfigured: There can be no database; the message says why.
        ConfigurationError: The database does not exist.
    """
    if (reason := dialect.unusable(url, writes=False)) is not None:
        raise StoreMisconfigured(f"the database {shown_url(url)} cannot be used: {reason}")
    if dialect.is_absent(url):
        raise ConfigurationError(
            f"there is no file {url.database!r}; to make it, {shown_command('upgrade', url, None)}"
        )


def check_place(name: str, place: object) -> None:
    """Refuse what is neither a database URL nor an `AsyncEngine`.

    Args:
        name: Name of the argument.
        place: Its value.

    Raises:
        ConfigurationError: The value has another type; the message says what to give.
    """
    if isinstance(place, sa.Engine):
        raise ConfigurationError(
            f"{name} is an engine that is not async; make it with sqlalchemy.ext.asyncio.create_async_engine, or give "
            "the URL"
        )
    as_url = " (for a file, a text such as sqlite:////var/lib/sessions.db)" if isinstance(place, PurePath) else ""
    checked_type(name, place, str | URL | AsyncEngine, f"a database URL{as_url} or an AsyncEngine")


def is_engine(place: UrlOrEngine) -> bool:
    """Return whether a database is named by an engine, which has a pool of its own."""
    return isinstance(place, AsyncEngine)


def checked_engine(engine: AsyncEngine) -> Dialect:
    """Return the dialect of an engine that the caller made.

    Raises:
        ConfigurationError: The engine cannot be used; the message says why.
    """
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


def make_engine(url: URL, dialect: Dialect, *, timeout: float, file: WatchedFile | None = None) -> AsyncEngine:
    """Return an engine in which each wait ends after `timeout` seconds, and whose errors hide parameters.

    Args:
        url: URL that `checked_url` returned.
        dialect: Its dialect.
        timeout: See above.
        file: File of the database, which its connections watch.
    """
    shown, arguments = engine_url(url)
    arguments["connect_args"] |= dialect.connect_arguments(url, timeout=timeout, command_timeout=timeout)
    engine = create_async_engine(
        shown,
        # `Connections` keeps those for queries; one that listens is kept by its listener.
        poolclass=NullPool,
        hide_parameters=True,
        # Each statement is a transaction; where several belong together, SQL begins one.
        isolation_level="AUTOCOMMIT",
        # A connection that is closed has nothing to roll back, which saves a round trip.
        skip_autocommit_rollback=True,
        **arguments,
    )
    # After SQLAlchemy's own listener, because that makes asyncpg forget the types that it has looked up.
    sa.event.listen(engine.sync_engine, "connect", lambda connection, _: dialect.on_connect(connection, url))
    if file is not None:
        file.attach(engine.sync_engine, watches=True)
    return engine


def make_migration_engine(url: URL, dialect: Dialect) -> AsyncEngine:
    """Return an engine for migrations: statements have no time limit, and no connection is kept."""
    return make_engine_without_pool(url, dialect, timeout=_MIGRATION_TIMEOUT, command_timeout=None)


def make_engine_without_pool(
    url: URL, dialect: Dialect, *, timeout: float, command_timeout: float | None, given: URL | None = None
) -> AsyncEngine:
    """Return an engine that keeps no connection; see `engine_url` and `Dialect.connect_arguments`."""
    shown, arguments = engine_url(url, given=given)
    arguments["connect_args"] |= dialect.connect_arguments(url, timeout=timeout, command_timeout=command_timeout)
    engine = create_async_engine(
        shown,
        poolclass=NullPool,
        hide_parameters=True,
        isolation_level="AUTOCOMMIT",
        **arguments,
    )
    if (file := dialect.file(url)) is not None:
        file.attach(engine.sync_engine, watches=False)
    return engine
