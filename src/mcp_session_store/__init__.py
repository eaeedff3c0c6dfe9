"""Durable, SQL-backed sessions for MCP servers on the official Python SDK."""

from mcp_session_store.adapter.manager import DurableSessionManager, EndHook, RestoreHook
from mcp_session_store.adapter.marker import get_restore_marker
from mcp_session_store.app import durable_app
from mcp_session_store.errors import (
    ConfigurationError,
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
from mcp_session_store.memory import MemorySessionStore
from mcp_session_store.records import (
    Activity,
    Change,
    Changes,
    EndReason,
    JournalEntry,
    NewSession,
    Principal,
    SessionRecord,
    SessionRestoreMarker,
    session_key,
)
from mcp_session_store.retention import RetentionPolicy, SweepReport
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.store import SessionStore

__all__ = [
    # Serve a server durably
    "durable_app",
    "DurableSessionManager",
    "get_restore_marker",
    "RestoreHook",
    "EndHook",
    # Stores
    "SessionStore",
    "SqlSessionStore",
    "MemorySessionStore",
    # Retention
    "RetentionPolicy",
    "SweepReport",
    # Records
    "Activity",
    "Change",
    "Changes",
    "EndReason",
    "JournalEntry",
    "NewSession",
    "Principal",
    "SessionRecord",
    "SessionRestoreMarker",
    "session_key",
    # Errors
    "SessionStoreError",
    "ConfigurationError",
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
