"""Durable, SQL-backed sessions for MCP servers on the official Python SDK.

The names here are those to write a server with. Other modules are public, too: `store`, `event_log`, `mailbox`,
`state_store`, `records`, `retention`, `errors` and `testing` for a store of one's own, and `migrations` for programs
that migrate a database.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import (
    ConfigurationError,
    InvalidValue,
    NoSession,
    RestoreRefused,
    SchemaError,
    SessionStoreError,
    StateConflict,
    StateFull,
    StoreMisconfigured,
    StoreUnavailable,
)
from mcp_session_store.event_log import EventLog
from mcp_session_store.mailbox import Mailbox
from mcp_session_store.memory import MemoryEventLog, MemoryMailbox, MemorySessionStore, MemoryStateStore
from mcp_session_store.records import EndReason, SessionRecord, session_key
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import InstanceSettings
from mcp_session_store.state_store import StateStore
from mcp_session_store.store import SessionStore

if TYPE_CHECKING:
    from mcp_session_store.adapter.manager import DurableSessionManager, EndHook, RestoreHook
    from mcp_session_store.adapter.replay.journal import JournaledMethod
    from mcp_session_store.adapter.replay.marker import SessionRestoreMarker, get_restore_marker
    from mcp_session_store.adapter.sessions.state import SessionState, get_session_state
    from mcp_session_store.app import durable_app
    from mcp_session_store.serving import run_durable
    from mcp_session_store.sql import SqlEventLog, SqlKeyValue, SqlMailbox, SqlSessionStore, SqlStateStore

__all__ = [
    # Serve a server durably
    "durable_app",
    "run_durable",
    "InstanceSettings",
    "DurableSessionManager",
    "JournaledMethod",
    "get_restore_marker",
    "get_session_state",
    "SessionState",
    "RestoreHook",
    "EndHook",
    # Stores of sessions and their state, event logs and mailboxes
    "SessionStore",
    "SqlSessionStore",
    "MemorySessionStore",
    "EventLog",
    "SqlEventLog",
    "MemoryEventLog",
    "Mailbox",
    "SqlMailbox",
    "MemoryMailbox",
    "StateStore",
    "SqlStateStore",
    "MemoryStateStore",
    # Values that belong to no session
    "SqlKeyValue",
    # Retention
    "RetentionPolicy",
    "EventPolicy",
    "StatePolicy",
    # Records
    "EndReason",
    "SessionRecord",
    "SessionRestoreMarker",
    "session_key",
    # Errors
    "SessionStoreError",
    "ConfigurationError",
    "InvalidValue",
    "NoSession",
    "RestoreRefused",
    "SchemaError",
    "StateConflict",
    "StateFull",
    "StoreMisconfigured",
    "StoreUnavailable",
]

_IMPORTED_WHEN_USED: Final = {
    "JournaledMethod": "adapter.replay.journal",
    "DurableSessionManager": "adapter.manager",
    "EndHook": "adapter.manager",
    "RestoreHook": "adapter.manager",
    "get_restore_marker": "adapter.replay.marker",
    "SessionRestoreMarker": "adapter.replay.marker",
    "get_session_state": "adapter.sessions.state",
    "SessionState": "adapter.sessions.state",
    "durable_app": "app",
    "run_durable": "serving",
    "SqlEventLog": "sql",
    "SqlKeyValue": "sql",
    "SqlMailbox": "sql",
    "SqlSessionStore": "sql",
    "SqlStateStore": "sql",
}
"""Modules of the names that need the SDK or SQLAlchemy, which take long to import: most commands need no SDK."""

_MOVED: Final = {
    **dict.fromkeys(
        (
            "Change",
            "Changes",
            "EventKind",
            "EventPage",
            "JournalEntry",
            "NewEvent",
            "NewSession",
            "Principal",
            "StoredEvent",
        ),
        "records",
    ),
    "Activity": "activity",
    **dict.fromkeys(("EventSweepReport", "SweepReport"), "retention"),
    **dict.fromkeys(
        (
            "EventTooLarge",
            "JournalFull",
            "SchemaAhead",
            "SchemaBehind",
            "SchemaMissing",
            "SessionConflict",
            "SessionLimitReached",
        ),
        "errors",
    ),
}
"""Modules of the names that stood here before, and work here for one more version, with a warning."""


# Type checkers know the names from above, and no others.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if (module := _IMPORTED_WHEN_USED.get(name)) is not None:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
        if (module := _MOVED.get(name)) is not None:
            warnings.warn(
                f"{__name__}.{name} is deprecated and goes with the next version; "
                f"write: from {__name__}.{module} import {name}",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
