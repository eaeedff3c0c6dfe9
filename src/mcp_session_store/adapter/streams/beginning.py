"""The place from which the standalone stream begins when a client opens it anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_session_store.adapter.streams.event_ids import Cursor
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from mcp_session_store.adapter.streams.event_store import SessionEvents

__all__ = ["find_place"]


async def find_place(events: SessionEvents, *, resumable: bool) -> Cursor | None:
    """Return the place after which the stream goes on for a client that opens it anew; `None`: not known for now.

    Args:
        events: Events of the session.
        resumable: Whether the client is to get an id of the place. In a session without events there is none, so that a
            priming event is stored.

    Raises:
        SessionStoreError: The log cannot be read.
    """
    if not events.active or events.recorder.down:
        return None
    sequence = (await events.recorder.log.heads((events.key,))).get(events.key, 0)
    if sequence == 0 and resumable:
        cursor = await events.prime_standalone()
        if cursor is None:
            return None
        # What another copy has said meanwhile is sent, too.
        sequence = cursor.sequence if cursor.sequence == 1 else 0
    return Cursor(STANDALONE_STREAM, sequence, 0)
