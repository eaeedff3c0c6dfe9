"""Sessions in SQL databases, for any asyncio program: knows SQLAlchemy, and nothing of MCP's SDK."""

from mcp_session_store.sql.session_store import SqlSessionStore

__all__ = ["SqlSessionStore"]
