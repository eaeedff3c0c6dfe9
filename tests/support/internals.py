"""Private members of the product that tests need: the one module of the tests that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store import MemoryEventLog, MemorySessionStore
    from mcp_session_store.adapter.streams.event_ids import EventIds
    from mcp_session_store.memory.data import Log, Row
    from mcp_session_store.sql import SqlEventLog, SqlSessionStore
    from mcp_session_store.sql.database import Database

# Of stores in memory


def rows_of(store: MemorySessionStore) -> dict[UUID, Row]:
    """The sessions that a store in memory holds, by their keys."""
    return store.data.rows


def is_listened_to(store: MemorySessionStore) -> bool:
    """Whether an instance listens for the changes of a store in memory."""
    return store.data.listeners != []


def logs_of(log: MemoryEventLog) -> dict[UUID, Log]:
    """The events that a log in memory holds, by the keys of their sessions."""
    return log.data.logs


# Of stores in a database


def database_of(store: SqlSessionStore | SqlEventLog) -> Database:
    """The way of a store or a log to its database."""
    return store._database


async def trim_waiting(log: SqlEventLog, key: UUID) -> None:
    """Remove events of a session that is over its bounds, as an append does: waiting for other transactions."""
    await log._do(lambda attempt: log._trimming.trim(attempt, [key], limit=10, wait=True))


# Of the adapter


def tag_of(ids: EventIds, payload: bytes) -> bytes:
    """The tag that makes a payload an event id of a session."""
    return ids._tag(payload)
