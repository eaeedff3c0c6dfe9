"""The errors of this package, under one root."""

from __future__ import annotations

import re
from typing import Final

__all__ = [
    "ConfigurationError",
    "EventTooLarge",
    "InvalidValue",
    "JournalFull",
    "KeyValueFull",
    "NoSession",
    "NotRunning",
    "RecordUnreadable",
    "RestoreRefused",
    "SchemaAhead",
    "SchemaBehind",
    "SchemaError",
    "SchemaMissing",
    "SessionConflict",
    "SessionLimitReached",
    "SessionStoreError",
    "StateConflict",
    "StateFull",
    "StoreBusy",
    "StoreClosed",
    "StoreMisconfigured",
    "StoreUnavailable",
]

_PASSWORDS: Final = (
    # The credentials of a URL, but not of the example in texts of this package, up to the last @ of all that follows.
    (re.compile(r"\b((?!sqlite)[a-z][\w+]*://)(?!user:password@)[^\s/?#@]*(?::|%(?!40)).*@", re.DOTALL), r"\1***@"),
    (re.compile(r"\b((?:\w*password|user)=)[^\s&]+"), r"\1***"),
)


def without_passwords(text: str) -> str:
    """Return a text without the passwords of database URLs in it: for a text that quotes what it was given."""
    for pattern, replacement in _PASSWORDS:
        text = pattern.sub(replacement, text)
    return text


class SessionStoreError(Exception):
    """Root of the errors of this package."""


class ConfigurationError(SessionStoreError, ValueError):
    """An argument, option or setting cannot work; the message names it and the remedy.

    Where the message quotes a value that was given, as one that is no name of a schema, it may be a database URL that
    was meant for elsewhere: its password is taken out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_passwords(message))


class NotRunning(SessionStoreError, RuntimeError):
    """A request came to an app whose lifespan was not entered, or to a session manager that does not run.

    It shows no traceback to what reads one from an error, as uvicorn's log does: that of a request through all
    middlewares says nothing of the cause, and its forty lines hide the message, which does.
    """

    @property
    def __traceback__(self) -> None:
        return None

    @__traceback__.setter
    def __traceback__(self, traceback: object) -> None:
        """Leave it out; `contextlib` sets it."""


class NoSession(SessionStoreError, LookupError):
    """There is no session whose state could be had; the message says why."""


class StoreUnavailable(SessionStoreError):
    """The store is away: it cannot be reached, or did not answer within its bound of seconds.

    The call may or may not have taken effect, and should be repeated later.
    """


class StoreBusy(SessionStoreError):
    """The store answers and cannot take this call now: too many wait already.

    The call should be repeated later; the message says when.
    """


class StoreMisconfigured(SessionStoreError):
    """The store cannot be used as it is set up: wrong password, no such database, missing privilege, damaged file.

    The message says what to change. Until that is done, no call succeeds.
    """


class StoreClosed(SessionStoreError):
    """The store was closed, before the call or while it waited.

    A call that waited may or may not have taken effect.
    """


class SessionConflict(SessionStoreError):
    """A session cannot be created, because there is another record under its key already."""


class SessionLimitReached(SessionStoreError):
    """A session cannot be created, because the retention policy allows no more of its principal, or without one.

    Over HTTP this is a 503.
    """


class JournalFull(SessionStoreError):
    """A call cannot be journaled because the session's journal is full."""


class KeyValueFull(SessionStoreError):
    """A value cannot be stored, because the values of its namespace have as many bytes as `SqlKeyValue` allows."""


class RecordUnreadable(SessionStoreError):
    """What is stored of a session cannot be read, as after a change by hand, or in a file that is damaged.

    The message names columns, and never what they hold. Over HTTP this is a 404.

    Args:
        message: Which columns.
        digest: Digest of the session's principal; `None` for a session without one.
        digest_known: Whether the digest could be read.
    """

    def __init__(self, message: str, *, digest: bytes | None = None, digest_known: bool = False) -> None:
        super().__init__(message)
        self.digest = digest
        self.digest_known = digest_known


class EventTooLarge(SessionStoreError):
    """Events cannot be stored, because they alone exceed the bytes that the policy allows a session."""


class StateConflict(SessionStoreError):
    """A value of a session's state is not the one that a write was to replace: another write was faster."""


class StateFull(SessionStoreError):
    """A value of a session's state cannot be stored, because it, or all of the session, would be larger than allowed.

    The message names the field of the `StatePolicy`.
    """


class InvalidValue(SessionStoreError, ValueError):
    """A value cannot be stored, such as a text with a NUL or a lone surrogate; nothing of the call is stored.

    The message names the value and never quotes it, and no cause is chained, because drivers quote values.
    """


class SchemaError(SessionStoreError):
    """The database's schema does not fit this version of the package; the message names the command to run."""


class SchemaMissing(SchemaError):
    """The database has no tables of this package."""


class SchemaBehind(SchemaError):
    """The database's schema is older than this version of the package needs."""


class SchemaAhead(SchemaError):
    """The database's schema has a major version that this version of the package cannot use."""


class RestoreRefused(SessionStoreError):
    """An application's `on_restore` hook refuses a session, and the client gets 404.

    Args:
        *args: Why, for the application itself.
        ends_session: Whether the session ends. False refuses one request alone, such as that of another user: it is
            answered as if there were no session, which stays as it is.
    """

    def __init__(self, *args: object, ends_session: bool = True) -> None:
        super().__init__(*args)
        self.ends_session = ends_session
