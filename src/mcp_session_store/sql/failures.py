"""What a driver's error means for who waits: which failures pass, which are the data's fault, which the schema's."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, Final

from sqlalchemy import exc

__all__ = ["Meaning", "hide_parameters", "meaning_of", "summary_of"]


class Meaning(Enum):
    """What to do about a driver's error."""

    BROKEN = auto()
    """The connection is gone, or what it has prepared is. Another connection may work at once."""
    UNAVAILABLE = auto()
    """The database cannot serve now."""
    BAD_DATA = auto()
    """The database does not take a value. The same statement without it works."""
    BAD_SCHEMA = auto()
    """A table or column is not there."""


# Classes and codes of SQLSTATE, "PostgreSQL Error Codes" in its manual.
_POSTGRES: Final = (
    ("08", Meaning.BROKEN),  # connection exception
    ("57P", Meaning.BROKEN),  # the server shuts down, or starts
    ("25006", Meaning.BROKEN),  # a read-only transaction: what was the primary has become a standby
    ("40", Meaning.BROKEN),  # deadlock, serialization failure: the statement is undone and may be repeated
    ("22", Meaning.BAD_DATA),
    ("23", Meaning.BAD_DATA),  # an integrity constraint
    ("54", Meaning.BAD_DATA),  # a program limit
    ("42P01", Meaning.BAD_SCHEMA),  # undefined table
    ("42703", Meaning.BAD_SCHEMA),  # undefined column
    ("3F000", Meaning.BAD_SCHEMA),  # undefined schema
)
# "Result and Error Codes" of SQLite, without their extended bits.
_SQLITE: Final = {
    18: Meaning.BAD_DATA,  # SQLITE_TOOBIG
    19: Meaning.BAD_DATA,  # SQLITE_CONSTRAINT
    20: Meaning.BAD_DATA,  # SQLITE_MISMATCH
}


# A prepared statement is not there, or one of another client is: the server connection has changed in between.
_POOLED_STATEMENT: Final = frozenset({"26000", "42P05"})
_SQLITE_NOT_WRITABLE: Final = frozenset({8, 14})  # SQLITE_READONLY, SQLITE_CANTOPEN


def meaning_of(error: Exception) -> Meaning | None:
    """What an error of SQLAlchemy, a driver or the network means; `None` for any other, which is a bug."""
    if isinstance(error, exc.DBAPIError):
        return _meaning_of_driver(error, error.orig)
    if isinstance(error, exc.TimeoutError):
        return Meaning.UNAVAILABLE  # no connection of the pool came free
    if isinstance(error, exc.StatementError):
        error = error.orig if isinstance(error.orig, Exception) else error
    # While connecting the drivers let the network's errors pass; and there is a time bound in them too.
    if isinstance(error, ConnectionRefusedError):
        return Meaning.UNAVAILABLE
    if isinstance(error, (ConnectionError, EOFError)):
        return Meaning.BROKEN
    if isinstance(error, OSError):  # TimeoutError is one
        return Meaning.UNAVAILABLE
    if isinstance(error, (ValueError, OverflowError)):
        return Meaning.BAD_DATA  # found while a value was made ready to be sent
    return _meaning_of_state(error) or _meaning_of_code(error) or _meaning_of_connection(error)


def _meaning_of_connection(error: Exception) -> Meaning | None:
    # asyncpg's own, which SQLAlchemy lets pass while it makes a connection ready, and which we meet as we call it.
    import asyncpg  # who uses SQLite does without

    wrong_state = isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError))
    return Meaning.BROKEN if wrong_state else None


def _meaning_of_driver(error: exc.DBAPIError, driver: Any) -> Meaning:
    if error.connection_invalidated:
        return Meaning.BROKEN
    if meaning := _meaning_of_state(driver) or _meaning_of_code(driver):
        return meaning
    cause = getattr(driver, "__cause__", None) or driver
    if isinstance(cause, (ValueError, OverflowError)):
        return Meaning.BAD_DATA  # asyncpg's DataError: a value that cannot be encoded
    if isinstance(error, (exc.InterfaceError, exc.NotSupportedError, exc.InternalError)):
        return Meaning.BROKEN  # a connection in a wrong state, or a prepared statement that is out of date
    return Meaning.UNAVAILABLE


def _meaning_of_state(driver: Any) -> Meaning | None:
    state = getattr(driver, "sqlstate", None)
    if not isinstance(state, str):
        return None
    return next((meaning for start, meaning in _POSTGRES if state.startswith(start)), Meaning.UNAVAILABLE)


def _meaning_of_code(driver: Any) -> Meaning | None:
    code = getattr(driver, "sqlite_errorcode", None)
    if code is None:
        return None
    if meaning := _SQLITE.get(code & 0xFF):
        return meaning
    # SQLITE_ERROR says everything that is wrong with a statement, and only its text tells what.
    missing = ("no such table", "no such column", "has no column")
    return Meaning.BAD_SCHEMA if any(text in str(driver) for text in missing) else Meaning.UNAVAILABLE


def hide_parameters(error: BaseException | None) -> None:
    """Keep a statement's parameters out of the text of an error, and of those that caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, exc.StatementError):
            error.hide_parameters = True
        error = error.__cause__ or error.__context__


def summary_of(error: BaseException) -> str:
    """An error in a few words, without the statement: its kind, and what the driver says."""
    driver = error.orig if isinstance(error, exc.StatementError) and error.orig is not None else error
    driver = driver.__cause__ or driver
    text = str(driver).partition("\n")[0]
    if getattr(driver, "sqlite_errorcode", 0) & 0xFF in _SQLITE_NOT_WRITABLE:
        text += "; the file's folder must exist, and this process must be allowed to write there"
    if getattr(driver, "sqlstate", None) in _POOLED_STATEMENT:
        text += "; behind PgBouncer in transaction mode, add ?pgbouncer=true to the database URL"
    return f"{type(driver).__name__}: {text}" if text else type(driver).__name__
