"""Classify driver errors: broken connection, unavailable, misconfigured, invalid value, wrong schema."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from sqlalchemy import exc

from mcp_session_store.errors import SessionStoreError, StoreMisconfigured, StoreUnavailable
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.shown import secrets_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.engine import URL

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["cannot_serve", "error_of_one_call", "failure_kind", "hide_secrets", "misconfiguration", "summary_of"]


def failure_kind(error: Exception, dialect: Dialect) -> FailureKind | None:
    """Classify an error of SQLAlchemy, a driver or the network; `None` for any other, which is a bug."""
    if isinstance(error, exc.DBAPIError):
        return _kind_of_driver_error(error, dialect)
    if isinstance(error, exc.TimeoutError):
        return FailureKind.UNAVAILABLE  # no connection of the pool came free
    if isinstance(error, exc.StatementError):
        error = error.orig if isinstance(error.orig, Exception) else error
    # While they connect, the drivers pass on the network's errors, and those of their own time limit.
    if isinstance(error, ConnectionRefusedError):
        return FailureKind.UNAVAILABLE
    if isinstance(error, (ConnectionError, EOFError)):
        return FailureKind.BROKEN
    if isinstance(error, OSError):  # TimeoutError is one
        return FailureKind.UNAVAILABLE
    # Asked before, because a driver may say by a ValueError that its connection is closed.
    if kind := dialect.failure_kind(error):
        return kind
    # Found while a value was made ready to be sent.
    return FailureKind.INVALID_VALUE if isinstance(error, (ValueError, OverflowError)) else None


def _kind_of_driver_error(error: exc.DBAPIError, dialect: Dialect) -> FailureKind:
    driver_error = error.orig
    if error.connection_invalidated:
        return FailureKind.BROKEN
    if driver_error is not None and (kind := dialect.failure_kind(driver_error)):
        return kind
    cause = getattr(driver_error, "__cause__", None) or driver_error
    if isinstance(cause, (ValueError, OverflowError)):
        return FailureKind.INVALID_VALUE  # asyncpg's DataError: a value that cannot be encoded
    if isinstance(error, (exc.InterfaceError, exc.NotSupportedError, exc.InternalError)):
        return FailureKind.BROKEN  # a connection in a wrong state, or a prepared statement that is out of date
    return FailureKind.UNAVAILABLE


def cannot_serve(url: URL, shown_url: str, error: Exception, dialect: Dialect) -> StoreMisconfigured | StoreUnavailable:
    """Return this package's error for a driver's that says nothing of the values of a call."""
    if (reason := misconfiguration(url, error, dialect)) is not None:
        return StoreMisconfigured(f"the database {shown_url} cannot be used: {reason}")
    if failure_kind(error, dialect) is FailureKind.WRONG_SCHEMA:
        # Where the revision does not fit, the check of the schema has said so.
        return StoreMisconfigured(
            f"the database {shown_url} cannot be used: its revision fits, but not what is there "
            f"({summary_of(error, dialect)}); put back what was removed or renamed, or restore a backup"
        )
    return StoreUnavailable(f"the database {shown_url} cannot serve now: {summary_of(error, dialect)}")


def error_of_one_call(error: Exception) -> Exception:
    """Return a copy of our own error for one of the calls that failed by it.

    An error that several tasks raise collects the tracebacks of all.
    """
    if not isinstance(error, SessionStoreError):
        return error
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def misconfiguration(url: URL, error: Exception, dialect: Dialect) -> str | None:
    """Say what is wrong with how a database is set up, and what to do; `None` for an error that may pass."""
    driver_error = _driver_error(error)
    for cause in (driver_error.__cause__, driver_error):
        if cause is not None and (reason := dialect.misconfiguration(cause, url)) is not None:
            return reason
    return None


def _driver_error(error: BaseException) -> BaseException:
    return error.orig if isinstance(error, exc.StatementError) and error.orig is not None else error


def hide_secrets(error: BaseException | None, url: URL) -> None:
    """Keep statements' parameters and secrets of the URL out of the text of an error, and of those that caused it.

    A server quotes the name of a user, and a driver an option, which may be part of a password in a wrong place.
    """
    secrets = secrets_of(url)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, exc.StatementError):
            error.hide_parameters = True
        if any(secret in str(error) for secret in secrets):
            error.args = tuple(_without(secrets, value) for value in error.args)
        error = error.__cause__ or error.__context__


def _without(secrets: Collection[str], value: object) -> object:
    if isinstance(value, str):
        for secret in secrets:
            # A password that is a word may stand in a sentence; as a value it is quoted.
            pattern = rf"(?<=[\"']){secret}(?=[\"'])" if secret.isalpha() else re.escape(secret)
            value = re.sub(pattern, "***", value)
    return value


def summary_of(error: BaseException, dialect: Dialect) -> str:
    """Return an error in a few words, without the statement: its class, the driver's text, and advice."""
    driver_error = _driver_error(error)
    # asyncio and asyncpg raise the error of a time limit from the cancellation by which it holds.
    if not isinstance(driver_error.__cause__, asyncio.CancelledError):
        driver_error = driver_error.__cause__ or driver_error
    text = str(driver_error).partition("\n")[0]
    if not text and isinstance(driver_error, TimeoutError):
        text = "it did not answer in time"
    if advice := dialect.advice_on(driver_error):
        text += f"; {advice}"
    return f"{type(driver_error).__name__}: {text}" if text else type(driver_error).__name__
