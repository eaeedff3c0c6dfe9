"""Streams without an event log, which have what other instances say from the mailbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter.relay.outlet import HANDED_OVER_WITHIN, QueuedOutlet

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.adapter.relay.stream_messages import StreamMessages
    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["QueuedStreams"]


class QueuedStreams:
    """Has the streams of this instance get what is said on others, and those of others what is said here.

    Args:
        messages: What is said here, and the mailbox that has what others say.
        stores: Whether transports keep what they send in an event store of the user's.
    """

    def __init__(self, messages: StreamMessages, *, stores: bool) -> None:
        self.messages: Final = messages
        self._stores = stores

    def make(self, session: ResidentSession) -> QueuedOutlet:
        """Return the way of a copy to the client's stream."""
        return QueuedOutlet(session, self.messages, stores=self._stores)

    def hinted(self, session: ResidentSession) -> None:
        if (outlet := session.find_outlet()) is not None:
            outlet.take()

    def entered(self, session: ResidentSession, *, waiting: bool) -> None:
        if waiting or (session.record is not None and self.messages.is_pending(session.record.key)):
            self.hinted(session)

    def handed_over(self, session: ResidentSession) -> None:
        self.hinted(session)

    async def hand_over(self, key: UUID, session: ResidentSession | None) -> int | None:  # noqa: ARG002 - the protocol's
        if session is not None and (outlet := session.find_outlet()) is not None:
            if session.hold is not None and session.hold.is_lost:
                session.standalone.close()  # unless it was opened again here
            with anyio.move_on_after(HANDED_OVER_WITHIN):
                await outlet.rest()
        return None
