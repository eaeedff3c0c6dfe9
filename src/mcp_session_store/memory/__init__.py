"""Both contracts in memory: for tests, and as their reference reading. Nothing here survives the process."""

from mcp_session_store.memory.sessions import MemoryEventLog, MemorySessionStore

__all__ = ["MemoryEventLog", "MemorySessionStore"]
