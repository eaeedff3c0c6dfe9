"""Sessions and what belongs to them in SQL databases, for any asyncio program: knows SQLAlchemy, not MCP's SDK."""

from mcp_session_store.sql.events.log import SqlEventLog
from mcp_session_store.sql.key_value.store import SqlKeyValue
from mcp_session_store.sql.mailbox.mailbox import SqlMailbox
from mcp_session_store.sql.sessions.store import SqlSessionStore
from mcp_session_store.sql.state.store import SqlStateStore

__all__ = ["SqlEventLog", "SqlKeyValue", "SqlMailbox", "SqlSessionStore", "SqlStateStore"]
