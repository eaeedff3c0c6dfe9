"""Every error that this package raises on purpose, under one root."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "EventTooLarge",
    "InvalidValue",
    "JournalFull",
    "RestoreRefused",
    "SchemaAhead",
    "SchemaBehind",
    "SchemaError",
    "SchemaMissing",
    "SessionConflict",
    "SessionLimitReached",
    "SessionStoreError",
    "StoreUnavailable",
]


class SessionStoreError(Exception):
    """Root of the errors of this package."""


class ConfigurationError(SessionStoreError, ValueError):
    """An argument, option or setting that cannot work; the message names it and the remedy."""


class StoreUnavailable(SessionStoreError):
    """The store could not be reached, did not answer in time, or has too much queued.

    Nothing is known to have changed, and trying again later is right: over HTTP this is a 503
    with `Retry-After`.
    """


class SessionConflict(SessionStoreError):
    """A session cannot be created because another record already stands under its key."""


class SessionLimitReached(SessionStoreError):
    """A session cannot be created because the retention policy allows no more of its kind: 503 over HTTP."""


class JournalFull(SessionStoreError):
    """A call cannot be journaled because the session's journal holds as many entries as it may."""


class EventTooLarge(SessionStoreError):
    """An event cannot be stored because it alone takes more bytes than the events of a session may."""


class InvalidValue(SessionStoreError, ValueError):
    """A value cannot be stored, such as a text with a NUL or a lone surrogate; nothing of the call is stored.

    The message names the value and never quotes it, and no cause is chained, because drivers quote values.
    """


class SchemaError(SessionStoreError):
    """The database's schema does not fit this version of the package; the message names the command to run."""


class SchemaMissing(SchemaError):
    """The database holds none of our tables."""


class SchemaBehind(SchemaError):
    """The database's schema is older than this version of the package needs."""


class SchemaAhead(SchemaError):
    """The database's schema has another major version than this version of the package can use."""


class RestoreRefused(SessionStoreError):
    """Raised by an application's `on_restore` hook: the session ends, and the client gets 404."""
