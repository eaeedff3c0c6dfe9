"""Streams with an event log, which all instances read: what they tell one another is only that there is more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from mcp_session_store.adapter.streams.beginning import HAND_OVER_WITHIN
from mcp_session_store.adapter.streams.followers import HINTED_INTERVAL
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.streams.followers import Followers

__all__ = ["LoggedStreams"]


class LoggedStreams:
    """Has the streams of an instance read the log when others have stored something for them, or hand them over.

    Args:
        followers: Open responses that follow a stream of the log.
    """

    def __init__(self, followers: Followers) -> None:
        self._followers = followers
        followers.standalone_interval = HINTED_INTERVAL

    def hinted(self, session: ResidentSession) -> None:
        self._look(session)

    def entered(self, session: ResidentSession, *, waiting: bool) -> None:  # noqa: ARG002 - nothing waits there
        # What was stored before was hinted at to no instance, or to another one.
        self._look(session)

    def handed_over(self, session: ResidentSession) -> None:
        self._look(session)

    async def hand_over(self, key: UUID, session: ResidentSession | None) -> int | None:
        if session is not None and session.hold is not None and session.hold.is_lost:  # or it was opened again here
            for follower in self._followers.of(key, STANDALONE_STREAM):
                follower.close()
        given, sent = self._followers.given(key), None
        if session is not None and (hold := session.hold) is not None and hold.former is not None:
            # It may not know yet itself where the one before it got.
            with anyio.move_on_after(HAND_OVER_WITHIN):
                await hold.handed_over.wait()
            sent = hold.sent
        return max((place for place in (given, sent) if place is not None), default=None)

    def _look(self, session: ResidentSession) -> None:
        if session.record is not None:
            self._followers.look(session.record.key)
