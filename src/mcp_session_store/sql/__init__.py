"""Sessions and their events in SQL databases, for any asyncio program: knows SQLAlchemy and not MCP's SDK."""

from mcp_session_store.sql.events.log import SqlEventLog
from mcp_session_store.sql.sessions.store import SqlSessionStore

__all__ = ["SqlEventLog", "SqlSessionStore"]
