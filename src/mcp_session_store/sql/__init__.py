"""Sessions in SQL databases, for any asyncio program: knows SQLAlchemy, and nothing of MCP's SDK."""

from mcp_session_store.sql.event_log import SqlEventLog
from mcp_session_store.sql.session_store import DEFAULT_TIMEOUT, SqlSessionStore

__all__ = ["DEFAULT_TIMEOUT", "SqlEventLog", "SqlSessionStore"]
