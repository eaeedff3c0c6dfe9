"""Both contracts in memory: for tests, and as their reference reading. Nothing here survives the process."""

from mcp_session_store.memory.events import MemoryEventLog
from mcp_session_store.memory.sessions import MemorySessionStore

__all__ = ["MemoryEventLog", "MemorySessionStore"]
