"""Options in the query of a Postgres URL: those of libpq and of providers' consoles, for asyncpg."""

from __future__ import annotations

import logging
import os
import ssl
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from sqlalchemy.exc import ArgumentError

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL

__all__ = [
    "BEHIND_PGBOUNCER",
    "PUBLIC_OPTIONS",
    "checked_options",
    "connect_arguments",
    "driver_arguments",
    "explained_options",
    "pool_size",
]

logger = logging.getLogger(__name__)

BEHIND_PGBOUNCER: Final = "pgbouncer"
"""Option of this package, by the name that other libraries give it: whether a pooler stands before the database that
lends a server connection to a client for one transaction only."""

_BOOLEANS: Final = ("true", "false")
_TLS_VERSIONS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    # The store writes: a server that only reads would refuse each request.
    "target_session_attrs": ("any", "primary", "read-write"),
    "direct_tls": _BOOLEANS,
    BEHIND_PGBOUNCER: _BOOLEANS,
    # Other values ask for what asyncpg does not do.
    "channel_binding": ("prefer", "disable"),
    "gssencmode": ("prefer", "disable"),
    "load_balance_hosts": ("disable",),
    "client_encoding": ("utf8", "UTF8", "UTF-8", "auto"),
    "sslcompression": ("0",),
    "sslsni": ("1",),
    "uselibpqcompat": ("true",),
}
"""Values that an option may have."""

_LEAST: Final[Mapping[str, int]] = {
    "port": 1,
    "statement_cache_size": 0,
    "max_cached_statement_lifetime": 0,
    "max_cacheable_statement_size": 0,
    "prepared_statement_cache_size": 0,
    "connect_timeout": 0,
    "pool_size": 1,
    "pool_timeout": 0,
    "keepalives": 0,
    "keepalives_idle": 0,
    "keepalives_interval": 0,
    "keepalives_count": 0,
    "tcp_user_timeout": 0,
}
"""Options that are whole numbers, and the lowest number that each may have."""

_DSN: Final = frozenset(
    {
        "sslmode",
        "sslrootcert",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslcrl",
        "sslnegotiation",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "options",
    }
)
"""Options that asyncpg reads from a DSN, and has no argument for."""

_FILES: Final = frozenset({"sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile"})
"""Options that name a file which has to be there."""

_LONGEST_PATH: Final = 160
"""Characters of a path; a longer text, or one with the marks of PEM, is taken for the content of the file."""

_HIGHEST_PORT: Final = 65535

_ARGUMENTS: Final = frozenset(
    {
        "host",
        "port",
        "passfile",
        "direct_tls",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "statement_cache_size",
        "max_cached_statement_lifetime",
        "max_cacheable_statement_size",
        "prepared_statement_cache_size",
    }
)
"""Options that are arguments of `asyncpg.connect()`, or of SQLAlchemy's dialect for it."""

_OURS: Final = frozenset({BEHIND_PGBOUNCER, "application_name", "connect_timeout", "pool_size"})
"""Options that this package turns into something else."""

_SYNONYMS: Final[Mapping[str, str]] = {
    "ssl": "sslmode",
    "connection_limit": "pool_size",
    "fallback_application_name": "application_name",
}
"""Names that SQLAlchemy, Prisma and libpq give to options."""

_ADDRESS: Final[Mapping[str, str]] = {"user": "username", "password": "password", "dbname": "database"}
"""Options of libpq that name a part of the URL, by the part."""

_LEFT_OUT: Final[Mapping[str, str]] = {
    "channel_binding": "asyncpg has none",
    "gssencmode": "asyncpg has none",
    "load_balance_hosts": "hosts are tried in their order",
    "client_encoding": "it is always UTF-8",
    "sslcompression": "there is none",
    "sslsni": "the name is always sent",
    "pool_timeout": "the store's timeout bounds each wait",
    "keepalives": "the store's timeout bounds each wait",
    "keepalives_idle": "the store's timeout bounds each wait",
    "keepalives_interval": "the store's timeout bounds each wait",
    "keepalives_count": "the store's timeout bounds each wait",
    "tcp_user_timeout": "the store's timeout bounds each wait",
    "supa": "it is a note of Supabase's",
    "workaround": "it is a note of Supabase's",
    "uselibpqcompat": "sslmode means here what it means in libpq",
}
"""Options without which a connection is the same, by the reason."""

_KNOWN: Final = _DSN | _ARGUMENTS | _OURS | _LEFT_OUT.keys() | _ADDRESS.keys()

_SECRETS: Final = frozenset({"password", "sslpassword"})

PUBLIC_OPTIONS: Final = (_DSN | _ARGUMENTS | _OURS | _LEFT_OUT.keys()) - _SECRETS
"""Options whose values may be shown. The name of a user is not among them, because it may not be plain."""

_AS_SCHEMA: Final = "write options=-csearch_path%3Dname, or name the schema by schema= or --schema"
_AS_TIMEOUT: Final = "remove it, and give the store a timeout"
_AS_POOLER: Final = f"remove it, or write {BEHIND_PGBOUNCER}=true where a pooler in transaction mode is meant"
_REMEDIES: Final[Mapping[str, str]] = {
    "channel_binding": "remove it, because asyncpg cannot bind the channel, and let the server prove itself by its "
    "certificate: sslmode=verify-full&sslrootcert=system",
    "gssencmode": "remove it, because asyncpg does not encrypt by GSSAPI, and use TLS: sslmode=verify-full",
    "schema": "remove it, and name the schema by schema= or --schema",
    "search_path": _AS_SCHEMA,
    "currentSchema": _AS_SCHEMA,
    "sslaccept": "write sslmode=verify-full for strict, sslmode=require for accept_invalid_certs",
    "sslidentity": "write sslcert and sslkey",
    "socket_timeout": _AS_TIMEOUT,
    "command_timeout": _AS_TIMEOUT,
    "timeout": _AS_TIMEOUT,
    "statement_timeout": "write options=-cstatement_timeout%3D30s, or remove it, because the store has a timeout",
    "max_overflow": "remove it, because pool_size is the number of connections at most",
    "prepared_statements": _AS_POOLER,
    "prepareThreshold": _AS_POOLER,
    "hostaddr": "write the address as the host",
    "service": "write the host, the database and the user of the service",
}
"""What to do about an option, or a value of it, that cannot be used."""


def checked_options(url: URL) -> URL:
    """Return a Postgres URL whose options are known, by one name each, and have values that they may have.

    Raises:
        ConfigurationError: An option cannot be used; the message names it and the remedy.
    """
    options: dict[str, Any] = {}
    for given, value in url.query.items():
        name = _SYNONYMS.get(given, given)
        if value == "" and name in _KNOWN:
            # As in libpq.
            logger.info(
                "the option %s of the database URL is left out: it is empty, which stands for its default", given
            )
            continue
        if not isinstance(value, str) and name not in ("host", "port"):
            raise ConfigurationError(f"the database URL has the option {given} twice; write it once")
        if name in options:
            other = next(other for other in url.query if other != given and _SYNONYMS.get(other, other) == name)
            raise ConfigurationError(
                f"the database URL has the options {other} and {given}, which are the same; write one of them"
            )
        if name in _FILES and not _is_path(str(value)):
            # Not by its value, which is the key itself.
            raise ConfigurationError(
                f"{given} in the database URL is no path; write its content to a file, and the path of that"
            )
        _check_option(given, name, value, beside_a_secret=not _SECRETS.isdisjoint(url.query))
        options[name] = value
    if options.get("sslrootcert") == "system" and options.get("sslmode", "verify-full") != "verify-full":
        raise ConfigurationError(
            "sslrootcert='system' in the database URL cannot be used with another sslmode; write sslmode=verify-full"
        )
    for option, part in _ADDRESS.items():
        if option in options:
            value = options.pop(option)
            if not getattr(url, part):
                url = url.set(**{part: value})
    url = url.set(query=options)
    _check_hosts(url)
    return url


def _check_hosts(url: URL) -> None:
    """Refuse hosts and ports that SQLAlchemy cannot read, or that no address has."""
    try:
        arguments: Mapping[str, Any] = url.get_dialect()().create_connect_args(url)[1]
    except (ArgumentError, TypeError, ValueError):
        # Without the cause, which quotes them.
        raise ConfigurationError(
            "the hosts and ports in the database URL cannot be read; write "
            "postgresql://user:password@host1:5432,host2:5432/database, or as options host=host1,host2&port=5432,5432"
        ) from None
    ports = arguments.get("port", ())
    # SQLAlchemy leaves out a port 0.
    for port in [url.port, ports] if isinstance(ports, int) else [url.port, *ports]:
        if port is not None and not 0 < port <= _HIGHEST_PORT:
            raise ConfigurationError(
                f"the port {port} in the database URL is no port; write one from 1 to {_HIGHEST_PORT}"
            )


def _is_path(value: str) -> bool:
    return len(value) <= _LONGEST_PATH and "\n" not in value and "-----" not in value


def _check_option(given: str, name: str, value: Any, *, beside_a_secret: bool) -> None:
    if name not in _KNOWN:
        if beside_a_secret:
            # Not by its name, which may be the end of a password.
            raise ConfigurationError(
                "the database URL has an option that cannot be used, beside a password that is an option; write "
                "%26 for a & in the password, or remove the other option"
            )
        # As where a web page has put &amp; for an &.
        plain = name.removeprefix("amp;").lower()
        other = f"write {plain}" if plain in _KNOWN else "remove it, or give an AsyncEngine made with connect_args"
        remedy = _REMEDIES.get(name, other)
        raise ConfigurationError(f"the database URL has the option {given}, which cannot be used; {remedy}")
    if (choices := _CHOICES.get(name)) is not None and value not in choices:
        remedy = _REMEDIES.get(name, f"write {_alternatives(choices)}")
        raise ConfigurationError(f"{given}={value!r} in the database URL cannot be used; {remedy}")
    if (least := _LEAST.get(name)) is not None:
        for number in [value] if isinstance(value, str) else value:
            if not all(part.isascii() and part.isdigit() and int(part) >= least for part in number.split(",")):
                raise ConfigurationError(
                    f"{given}={number!r} in the database URL cannot be used; write a whole number of {least} or more"
                )


def _alternatives(choices: tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def connect_arguments(url: URL, *, timeout: float) -> dict[str, Any]:
    """Return the arguments for SQLAlchemy's `connect` that the options of a checked URL stand for.

    Options without an effect are logged.

    Args:
        url: URL that `checked_options` returned.
        timeout: Seconds that connecting may take.

    Raises:
        ConfigurationError: A file that the URL names cannot be read.
    """
    query = url.query
    for name in _FILES & query.keys():
        if query[name] != "system" and not os.access(str(query[name]), os.R_OK):
            raise ConfigurationError(
                f"{name}={query[name]!r} in the database URL cannot be used: there is no such file, or this process "
                "may not read it"
            )
    for name in sorted(_LEFT_OUT.keys() & query.keys()):
        logger.info("the option %s of the database URL is left out: %s", name, _LEFT_OUT[name])
    # libpq: zero stands for no limit.
    limit = int(str(query.get("connect_timeout", 0)))
    arguments: dict[str, Any] = {
        "timeout": min(timeout, limit) if limit else timeout,
        "server_settings": {"application_name": query.get("application_name", "mcp-session-store")},
    }
    numbers = _ARGUMENTS & _LEAST.keys() & query.keys() - {"port"}
    arguments |= {name: int(str(query[name])) for name in numbers}
    if "direct_tls" in query:
        arguments["direct_tls"] = query["direct_tls"] == "true"
    if query.get(BEHIND_PGBOUNCER) == "true":
        # Without its cache asyncpg sends an unnamed statement together with the values, in one message: it needs
        # nothing that was on the server connection before, and leaves nothing on it.
        arguments |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": str,
        }
    return arguments


def pool_size(url: URL) -> int | None:
    """Return the number of connections for queries that the options of a checked URL ask for."""
    size = url.query.get("pool_size")
    return None if size is None else int(str(size))


def explained_options(url: URL) -> dict[str, str]:
    """Return what becomes of each option of a checked URL.

    The value is shown of those that are a number or one of a few words, because it may be a secret of any other.
    """
    explained = {}
    for name, value in url.query.items():
        shown = f"{name}={value}" if name in _CHOICES or name in _LEAST else name
        if name in _LEFT_OUT:
            explained[shown] = f"left out, because {_LEFT_OUT[name]}"
        else:
            explained[shown] = "for this package" if name in _OURS else "for the driver"
    return explained


def driver_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for `asyncpg.connect()` out of those that SQLAlchemy makes of a checked URL.

    SQLAlchemy passes each option of the URL as an argument. Those that asyncpg reads from a DSN alone are put into one.
    """
    others = {
        name: value
        for name, value in arguments.items()
        if name not in _DSN and name not in _OURS and name not in _LEFT_OUT
    }
    options = {name: value for name, value in arguments.items() if name in _DSN}
    if options.get("sslrootcert") == "system":
        # libpq: the certificates that the system trusts, and verify-full as the only mode.
        others["ssl"] = context = ssl.create_default_context()
        if "sslcert" in options:
            context.load_cert_chain(options["sslcert"], options.get("sslkey"), options.get("sslpassword"))
        if (lowest := options.get("ssl_min_protocol_version")) is not None:
            context.minimum_version = _tls_version(lowest)
        if (highest := options.get("ssl_max_protocol_version")) is not None:
            context.maximum_version = _tls_version(highest)
        options = {name: value for name, value in options.items() if name in ("options", "sslnegotiation")}
    if options:
        others["dsn"] = f"postgresql://?{urlencode(options)}"
    return others


def _tls_version(text: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[text.replace(".", "_")]
