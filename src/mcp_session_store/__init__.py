"""Durable, SQL-backed sessions for MCP servers on the official Python SDK."""

import importlib
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import (
    ConfigurationError,
    EventTooLarge,
    InvalidValue,
    JournalFull,
    RestoreRefused,
    SchemaAhead,
    SchemaBehind,
    SchemaError,
    SchemaMissing,
    SessionConflict,
    SessionLimitReached,
    SessionStoreError,
    StoreUnavailable,
)
from mcp_session_store.event_log import EventLog
from mcp_session_store.memory import MemoryEventLog, MemorySessionStore
from mcp_session_store.records import (
    Activity,
    Change,
    Changes,
    EndReason,
    EventKind,
    EventPage,
    JournalEntry,
    NewEvent,
    NewSession,
    Principal,
    SessionRecord,
    SessionRestoreMarker,
    StoredEvent,
    session_key,
)
from mcp_session_store.retention import EventPolicy, EventSweepReport, RetentionPolicy, SweepReport
from mcp_session_store.store import SessionStore

if TYPE_CHECKING:
    from mcp_session_store.adapter.manager import DurableSessionManager, EndHook, RestoreHook
    from mcp_session_store.adapter.replay.journal import JournaledMethod
    from mcp_session_store.adapter.replay.marker import get_restore_marker
    from mcp_session_store.app import durable_app
    from mcp_session_store.sql import SqlEventLog, SqlSessionStore

__all__ = [
    # Serve a server durably
    "durable_app",
    "DurableSessionManager",
    "JournaledMethod",
    "get_restore_marker",
    "RestoreHook",
    "EndHook",
    # Stores
    "SessionStore",
    "SqlSessionStore",
    "MemorySessionStore",
    # Event logs
    "EventLog",
    "SqlEventLog",
    "MemoryEventLog",
    # Retention
    "RetentionPolicy",
    "SweepReport",
    "EventPolicy",
    "EventSweepReport",
    # Records
    "Activity",
    "Change",
    "Changes",
    "EndReason",
    "EventKind",
    "EventPage",
    "JournalEntry",
    "NewEvent",
    "NewSession",
    "Principal",
    "SessionRecord",
    "SessionRestoreMarker",
    "StoredEvent",
    "session_key",
    # Errors
    "SessionStoreError",
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
    "StoreUnavailable",
]

_IMPORTED_WHEN_USED: Final = {
    "JournaledMethod": "adapter.replay.journal",
    "DurableSessionManager": "adapter.manager",
    "EndHook": "adapter.manager",
    "RestoreHook": "adapter.manager",
    "get_restore_marker": "adapter.replay.marker",
    "durable_app": "app",
    "SqlEventLog": "sql",
    "SqlSessionStore": "sql",
}
"""Where the names are that need the SDK or SQLAlchemy, which take long to import: most commands need no SDK."""


# Type checkers know the names from above, and no others.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if (module := _IMPORTED_WHEN_USED.get(name)) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
