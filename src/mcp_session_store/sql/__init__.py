"""Sessions and their events in SQL databases, for any asyncio program: knows SQLAlchemy and not MCP's SDK."""

from mcp_session_store.sql.events.log import SqlEventLog
from mcp_session_store.sql.sessions.store import DEFAULT_TIMEOUT, SqlSessionStore

__all__ = ["DEFAULT_TIMEOUT", "SqlEventLog", "SqlSessionStore"]
