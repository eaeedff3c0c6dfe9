"""The place from which the standalone stream begins when a client opens it anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.streams.event_ids import Cursor
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from mcp_session_store.adapter.streams.event_store import SessionEvents
    from mcp_session_store.adapter.streams.hold import Hold

__all__ = ["HAND_OVER_WITHIN", "find_place"]

ENTERED_WITHIN: Final = 5.0
"""Seconds that a stream waits until the store has entered it. Not every store knows holders of streams."""
HAND_OVER_WITHIN: Final = 2.0
"""Seconds that a stream waits to learn how far the instance got that had it before, which may be dead."""


async def find_place(events: SessionEvents, hold: Hold | None, *, resumable: bool) -> Cursor | None:
    """Return the place after which the stream goes on for a client that opens it anew; `None`: not known for now.

    Args:
        events: Events of the session.
        hold: This instance's hold of the stream; `None` where instances do not tell one another of streams.
        resumable: Whether the client is to get an id of the place. In a session without events there is none, so that a
            priming event is stored.

    Raises:
        SessionStoreError: The log cannot be read.
    """
    recorder, key = events.recorder, events.key
    if not events.active or recorder.down:
        return None
    if hold is None:
        sequence = (await recorder.log.heads((key,))).get(key, 0)
    else:
        is_claimed, now = hold.claimed.is_set(), clock.now()
        if not is_claimed and now < hold.opened_at + ENTERED_WITHIN:
            return None
        given = recorder.followers.given(key)
        sent = given if hold.former is None else hold.sent
        if sent is None:
            if is_claimed and not hold.handed_over.is_set() and now < hold.claimed_at + HAND_OVER_WITHIN:
                return None
            sent = (await recorder.log.standalone_places((key,))).get(key, 0)
        # A former holder may have had the stream before this instance had it last.
        sequence = max(sent, given or 0)
        # Without an id it gets what it missed, too.
        events.can_reopen()
    if sequence == 0 and resumable:
        cursor = await events.prime_standalone()
        if cursor is None:
            return None
        # What another copy has said meanwhile is sent, too.
        sequence = cursor.sequence if cursor.sequence == 1 else 0
    return Cursor(STANDALONE_STREAM, sequence, 0)
