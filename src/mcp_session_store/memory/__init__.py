"""Stores and event logs in memory, for tests and as the reference of both contracts. They end with the process."""

from mcp_session_store.memory.events import MemoryEventLog
from mcp_session_store.memory.sessions import MemorySessionStore

__all__ = ["MemoryEventLog", "MemorySessionStore"]
