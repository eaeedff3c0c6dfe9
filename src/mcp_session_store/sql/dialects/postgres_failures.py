"""What errors of Postgres, of poolers before it, and of asyncpg mean, and what is to be done about those that stay."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING, Final

from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.dialects.strangers import NotPostgres

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["POOLED_STATEMENT", "advice_on_settings", "kind_of_failure", "misconfiguration"]

# Classes and codes of SQLSTATE, "PostgreSQL Error Codes" in its manual.
_KINDS: Final = (
    ("08", FailureKind.BROKEN),  # connection exception
    ("57P", FailureKind.BROKEN),  # the server shuts down, or starts
    ("25006", FailureKind.BROKEN),  # a read-only transaction: what was the primary has become a standby
    ("40", FailureKind.BROKEN),  # deadlock, serialization failure: the statement is undone and may be repeated
    ("53300", FailureKind.NO_ROOM),  # too many connections: of all, of this role, or of this database
    ("0A000", FailureKind.BROKEN),  # a prepared statement that is out of date, within a transaction
    ("22", FailureKind.INVALID_VALUE),  # data exception
    ("23", FailureKind.INVALID_VALUE),  # an integrity constraint
    ("54", FailureKind.INVALID_VALUE),  # a program limit
    ("42P01", FailureKind.WRONG_SCHEMA),  # undefined table
    ("42703", FailureKind.WRONG_SCHEMA),  # undefined column
    ("3F000", FailureKind.WRONG_SCHEMA),  # undefined schema
)
_NO_ROOM: Final = (
    "max clients reached",
    "max client connections reached",
    "no more connections allowed",
    "too many clients",
    "too many connections",
)
"""As poolers say it under codes of other failures: Supabase's in two versions, PgBouncer, and others."""
# A prepared statement is missing, or another client has one of that name: behind a pooler the server connection has
# changed in between.
POOLED_STATEMENT: Final = frozenset({"26000", "42P05"})

_USER: Final = "correct the user in the URL, or have the server let this one in"
_AUTHORIZATION: Final = (
    ("does not exist", f"there is no such user; {_USER}"),
    ("not permitted to log in", "the user may not log in; run: ALTER ROLE name LOGIN"),
    ("client certificate", "the server asks for a client certificate; add sslcert= and sslkey= to the URL"),
    (
        "no encryption",
        "the server lets this user in from here only with TLS, or not at all; add sslmode=require to the URL, or an "
        "entry to the server's pg_hba.conf",
    ),
    ("SSL off", "the server lets this user in from here only with TLS; add sslmode=require to the URL"),
    ("pg_hba.conf", "the server does not let this user in from here; add an entry to its pg_hba.conf"),
)
"""What errors of the class 28 other than a wrong password mean, by a part of the server's text."""
_STATES: Final = {
    "28P01": "the server refuses the user or the password; correct them in the URL, or the password in PGPASSWORD or "
    "in the password file",
    "3D000": "the server has no such database; create it, or correct its name in the URL",
}
_POOLER_TEXTS: Final = (
    # PgBouncer, some versions of which give all that ends a connection the code 08P01.
    ("password authentication failed|no such user", _STATES["28P01"]),
    ('database ".*" does not exist|no such database', _STATES["3D000"]),
    # Supabase's pooler, and Neon's proxy.
    ("Tenant or user not found", f"the pooler knows no such user, which names the project there; {_USER}"),
    ("endpoint could not be found", "the host names no endpoint of the provider; copy the URL from its console again"),
)
"""What poolers say under other codes of a URL that cannot work."""
_DENIED: Final = re.compile("permission denied for (schema|database) (.+)")
_USES: Final = {"schema": "USAGE ON SCHEMA", "database": "CONNECT ON DATABASE"}
"""Least privilege that lets a user in; where an upgrade needs more, it says so before it begins."""
_QUOTED: Final = re.compile(r'(?:parameter "|startup parameter: |in options: )([A-Za-z_][\w.]*)')
"""Where the text of a server or of PgBouncer names a parameter; its value stands elsewhere, and is never shown."""


def kind_of_failure(error: BaseException) -> FailureKind | None:
    """Classify an error of the driver; `None` for any other."""
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        text = str(error).lower()
        if any(part in text for part in _NO_ROOM):
            return FailureKind.NO_ROOM
        return next((kind for start, kind in _KINDS if state.startswith(start)), FailureKind.UNAVAILABLE)
    import asyncpg  # imported here, because users of SQLite do without it

    if isinstance(error, asyncpg.DataError):
        return FailureKind.INVALID_VALUE  # an InterfaceError as well
    # asyncpg's own errors: SQLAlchemy lets them pass while it makes a connection ready, and `run` meets them.
    wrong_state = isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError))
    return FailureKind.BROKEN if wrong_state else None


def advice_on_settings(error: BaseException) -> str | None:
    """Say which setting of the server keeps a statement from its end although it may be changed at any time."""
    match getattr(error, "sqlstate", None):
        case "25006":
            return (
                "name the primary, or all hosts with target_session_attrs=read-write; or turn "
                "default_transaction_read_only off for this role and database"
            )
        case "57014" if "statement timeout" in str(error):
            return "give this role a longer statement_timeout, as by options=-cstatement_timeout%3D30s in the URL"
    return None


def misconfiguration(error: BaseException) -> str | None:
    """Say what is wrong with how the database is set up, and what to do; `None` for an error that may pass.

    The texts of servers and drivers are quoted only where they hold no part of a URL.
    """
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return _by_state(state, str(error), is_fatal=_is_fatal(error))
    return next((reason for judge in _OF_THE_DRIVER if (reason := judge(error)) is not None), None)


def _by_state(state: str, text: str, *, is_fatal: bool) -> str | None:
    if (known := _STATES.get(state)) is not None:
        return known
    if state.startswith("28"):
        return next(
            (reason for part, reason in _AUTHORIZATION if part in text), f"the server refuses the user; {_USER}"
        )
    if state == "42501":
        # The text names a table, a schema or a function.
        first = text.partition("\n")[0]
        return f"the user lacks a privilege ({first}); {_remedy_of_denial(first)}"
    known = next((reason for pattern, reason in _POOLER_TEXTS if re.search(pattern, text) is not None), None)
    if known is not None:
        return known
    parameter = _QUOTED.search(text)
    if is_fatal and (state.startswith(("22", "42", "0P")) or (parameter and state.startswith("08"))):
        # While it connects; later errors of these classes are not fatal.
        named = f" {parameter[1]!r}" if parameter else ""
        return f"the server does not take the parameter{named} that options in the URL set; correct or remove it"
    return None


def _remedy_of_denial(text: str) -> str:
    if text.startswith("must be owner"):
        return "use the role that owns it"
    if (place := _DENIED.fullmatch(text)) is not None:
        return f"run: GRANT {_USES[place[1]]} {place[2]} TO the user"
    return "grant it; the command doctor lists all that a server needs"


def _is_fatal(error: BaseException) -> bool:
    # The first is always in English; PgBouncer does not send it.
    return "FATAL" in (getattr(error, "severity_en", None), getattr(error, "severity", None))


def _tls_failure(error: BaseException) -> str | None:
    if isinstance(error, NotPostgres):
        return f"what answers there is no Postgres server: {error}; correct the host and the port in the URL"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of the server is refused ({error.verify_message.rstrip('.')}); name the authority that "
            "signed it by sslrootcert= in the URL, and the server as the certificate does"
        )
    if isinstance(error, ssl.SSLError) and not isinstance(
        error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    ):
        return (
            f"no TLS can be spoken with the server ({error.reason}); check sslmode, the certificates and the versions "
            "of TLS in the URL and on the server"
        )
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
        return "the server speaks no TLS, which sslmode in the URL asks for; turn it on there, or write sslmode=prefer"
    return None


def _driver_refusal(error: BaseException) -> str | None:
    import asyncpg  # imported here, because users of SQLite do without it

    if isinstance(error, asyncpg.InterfaceError):
        text = str(error).partition("\n")[0]
        if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
            return f"{text}; correct the URL, or the variable whose name begins with PG"
        if text.startswith(("unsupported authentication", "unsupported SASL")):
            return f"asyncpg cannot log in as the server asks for ({text}); let the user log in by scram-sha-256"
        if "server signature" in text:
            return "the server does not know the user's password, and may be another one; check the host in the URL"
    return None


_OF_THE_DRIVER: Final[tuple[Callable[[BaseException], str | None], ...]] = (_tls_failure, _driver_refusal)
