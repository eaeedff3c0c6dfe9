"""What is shown of a database URL, in messages, logs and printed commands; all else in it is a secret."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from sqlalchemy.engine import URL

from mcp_session_store.sql.dialects import DIALECTS
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "ReadUrl",
    "engine_url",
    "is_broken_by_password",
    "secrets_of",
    "shown_command",
    "shown_options",
    "shown_url",
    "url_of",
]

_PLAIN: Final = re.compile(r"[\w.@+-]{1,63}")
"""User names that are shown. Another text may be a password that was written in the wrong place."""

_DELIMITERS: Final = frozenset("@/?#:%&;")
"""Characters that end a part of a URL, and that the name of a database seldom holds."""

_GIVEN_URL: Final = "mcp_session_store_url"
"""Execution option of an engine of this package: the URL that it was made from."""

_OPTION: Final = re.compile(r"/[^?]*\?\w+=")
"""End of a URL in a password: an option has an @ that is not encoded."""

_PEM: Final = "-----BEGIN"
"""Begin of a key that stands where the name of its file belongs."""

_SHORTEST_SECRET: Final = 3
"""Characters of a text that is looked for in others; a shorter one would be found everywhere."""


class ReadUrl(URL):
    """A URL that this package has read from a text, so that the name of its database is that, whatever it holds."""

    __slots__ = ()


def is_broken_by_password(url: URL) -> bool:
    """Return whether a URL that was parsed elsewhere has parts of a password where host, database and options stand.

    SQLAlchemy ends a password at the first @.
    """
    if not DIALECTS[url.get_backend_name()].has_addresses:
        return False
    unknown = url.query.keys() - _public_options(url)
    hosts = _values(url, "host") if "host" in url.query else ()
    return (
        any("@" in host for host in (url.host or "", *hosts))
        or _OPTION.search(str(url.password or "")) is not None
        or not (isinstance(url, ReadUrl) or _DELIMITERS.isdisjoint(url.database or ""))
        or any("@" in value for name in unknown for value in (name, *_values(url, name)))
    )


def shown_url(url: URL) -> str:
    """Return a URL as text for messages: without password, driver and options; a relative path as an absolute one."""
    backend = url.get_backend_name()
    if is_broken_by_password(url):
        return f"{backend}://***"
    return _rendered(url, _shown_user(url) if _has_plain_user(url) else "***")


def shown_options(url: URL, schema: str | None, *, with_user: bool = True) -> str:
    """Return the options with which this package's commands find a database, quoted for a shell.

    The URL has no password, because commands are kept in histories; see `shown_command`.
    """
    shown = f"{url.get_backend_name()}://***"
    if not is_broken_by_password(url):
        shown = _rendered(url, _shown_user(url) if with_user and _has_plain_user(url) else None)
        query = [
            (name, value)
            for name in url.query
            if name in _public_options(url) and (name != "host" or isinstance(url.query[name], str))
            for value in _values(url, name)
            if _PEM not in value
        ]
        if query:
            shown += f"?{urlencode(query, safe='/')}"
    options: Mapping[str, str | None] = {"--url": shown, "--schema": schema}
    return " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items() if value is not None)


def shown_command(
    command: str,
    url: URL,
    schema: str | None,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    as_another_user: bool = False,
) -> str:
    """Return the advice to run a command of this package on a database; it ends with the command.

    asyncpg takes from the environment what the URL does not say.
    """
    if namespace != DEFAULT_NAMESPACE:
        command += f" --namespace {shlex.quote(namespace)}"
    missing = []
    if as_another_user or not _has_plain_user(url):
        missing.append("the user in PGUSER")
    if url.password is not None:
        missing.append("the password in PGPASSWORD")
    given = f"with {' and '.join(missing)}, " if missing else ""
    return f"{given}run: mcp-session-store {command} {shown_options(url, schema, with_user=not as_another_user)}"


def url_of(engine: AsyncEngine | sa.Engine) -> URL:
    """Return the URL that an engine was made from, with the secrets that this package has taken out of the engine's."""
    given: URL = engine.get_execution_options().get(_GIVEN_URL, engine.url)
    return given


def engine_url(url: URL, *, given: URL | None = None) -> tuple[URL, dict[str, Any]]:
    """Return the URL for an engine, and more arguments for it, which hold the secrets of the URL but for the password.

    SQLAlchemy shows all of an engine's URL but the password.

    Args:
        url: URL by which the engine connects.
        given: URL that messages show; the same unless given.
    """
    given = given or url
    names = url.query.keys() - _public_options(url)
    secrets: dict[str, Any] = {name: url.query[name] for name in names}
    url = url.difference_update_query(names)
    if not _has_plain_user(url):
        secrets["user"] = url.username
        url = URL.create(
            url.drivername,
            password=url.password,
            host=url.host,
            port=url.port,
            database=url.database,
            query=url.query,
        )
    return url, {"connect_args": secrets, "execution_options": {_GIVEN_URL: given}}


def secrets_of(url: URL) -> Collection[str]:
    """Return the texts in a URL that no message may hold, the longest first."""
    texts = [] if url.password is None else [str(url.password)]
    if not _has_plain_user(url):
        texts.append(url.username or "")
    for name in url.query.keys() - _public_options(url):
        texts += _values(url, name)
    if is_broken_by_password(url):
        texts += [url.host or "", url.database or "", *(url.query.keys() - _public_options(url))]
    return sorted({text for text in texts if len(text) >= _SHORTEST_SECRET}, key=len, reverse=True)


def _has_plain_user(url: URL) -> bool:
    return url.username is None or _PLAIN.fullmatch(url.username) is not None


def _shown_user(url: URL) -> str | None:
    return None if url.username is None else quote(url.username, safe="")


def _rendered(url: URL, user: str | None) -> str:
    dialect = DIALECTS[url.get_backend_name()]
    name = dialect.shown_database(url)
    database = "" if name is None else f"/{quote(name, safe=' +/,')}"
    at = "" if user is None else f"{user}@"
    return f"{dialect.name}://{at}{_shown_hosts(url)}{database}"


def _shown_hosts(url: URL) -> str:
    # A port without a host is that of the hosts that asyncpg tries, and of a host that is an option.
    if url.host is not None or url.port is not None:
        host = url.host or ""
        host = f"[{host}]" if ":" in host else host
        return host if url.port is None else f"{host}:{url.port}"
    several = url.query.get("host", ())
    return "" if isinstance(several, str) else ",".join(several)


def _values(url: URL, name: str) -> Collection[str]:
    value = url.query[name]
    return (value,) if isinstance(value, str) else value


def _public_options(url: URL) -> Collection[str]:
    """Return the options whose values are shown: a list, because the next one that is invented may be a secret."""
    return DIALECTS[url.get_backend_name()].public_options
