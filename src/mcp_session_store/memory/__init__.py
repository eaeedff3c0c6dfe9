"""Stores, event logs, mailboxes and state in memory, for tests and as the reference of their contracts.

They end with the process.
"""

from mcp_session_store.memory.events import MemoryEventLog
from mcp_session_store.memory.mailbox import MemoryMailbox
from mcp_session_store.memory.sessions import MemorySessionStore
from mcp_session_store.memory.state import MemoryStateStore

__all__ = ["MemoryEventLog", "MemoryMailbox", "MemorySessionStore", "MemoryStateStore"]
