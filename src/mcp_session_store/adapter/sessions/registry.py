"""The copies of sessions that this instance has in memory: who is there, who has a seat, who leaves first."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mcp_session_store.adapter import telemetry
from mcp_session_store.adapter.responses import MemoryFull

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport

    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["Residents"]

logger = logging.getLogger(__name__)


class Residents:
    """Memory as a cache of sessions.

    Args:
        transports: The SDK's table of what is resident, which is kept true.
        owners: The SDK's table of whose it is.
        max_sessions: Copies at most; `None`: any number.
    """

    def __init__(
        self,
        transports: MutableMapping[str, StreamableHTTPServerTransport],
        owners: MutableMapping[str, AuthorizationContext],
        *,
        max_sessions: int | None,
    ) -> None:
        self._transports = transports
        self._owners = owners
        self._max_sessions = max_sessions
        self._published: dict[str, ResidentSession] = {}
        self._by_key: dict[UUID, ResidentSession] = {}
        self._leaving: dict[str, ResidentSession] = {}
        self._idle: dict[ResidentSession, None] = {}
        """Published and not busy, those idle for longest first."""
        self.seats = 0
        """Copies in memory: published, or being opened or restored."""

    def __iter__(self) -> Iterator[ResidentSession]:
        return iter(list(self._published.values()))

    def get(self, session_id: str) -> ResidentSession | None:
        """The copy that requests for this session find."""
        return self._published.get(session_id)

    def with_key(self, key: UUID) -> ResidentSession | None:
        """The copy of the session that is stored under this key."""
        return self._by_key.get(key)

    def leaving(self, session_id: str) -> ResidentSession | None:
        """The copy of this session that is on its way out of memory."""
        return self._leaving.get(session_id)

    def take_seat(self, *, may_evict: bool) -> ResidentSession | None:
        """Have room for one more copy.

        Args:
            may_evict: Whether another one may have to make room.

        Returns:
            The copy that had to make room, because nobody has used it for longest: it is withdrawn, and has to leave.

        Raises:
            MemoryFull: There is none.
        """
        evicted: ResidentSession | None = None
        if self._max_sessions is not None and self.seats >= self._max_sessions:
            evicted = next(iter(self._idle), None) if may_evict else None
            # Copies whose clean-up hangs must not pile up.
            if evicted is None or len(self._leaving) >= self._max_sessions:
                logger.warning("%d sessions are in memory, as many as max_sessions allows", self.seats)
                raise MemoryFull
            self.withdraw(evicted)
        self.seats += 1
        return evicted

    def publish(self, session: ResidentSession) -> None:
        """Let requests find a copy."""
        assert session.record is not None
        self._published[session.session_id] = session
        self._by_key[session.record.key] = session
        self._transports[session.session_id] = session.transport
        if session.owner is not None:
            self._owners[session.session_id] = session.owner
        self.used(session)

    def used(self, session: ResidentSession) -> None:
        """A copy became busy, or ceased to be."""
        self._idle.pop(session, None)
        if not session.busy and self._published.get(session.session_id) is session:
            self._idle[session] = None

    def idle_since(self, moment: float) -> list[ResidentSession]:
        """The copies that nobody has used since then, by anyio's clock."""
        found = []
        for session in self._idle:
            if session.idle_since > moment:
                break
            found.append(session)
        return found

    def withdraw(self, session: ResidentSession) -> None:
        """Let no request find this copy any more; a successor under the same id is left alone."""
        if self._published.get(session.session_id) is session:
            del self._published[session.session_id]
            self._owners.pop(session.session_id, None)
        if session.record is not None and self._by_key.get(session.record.key) is session:
            del self._by_key[session.record.key]
        if self._transports.get(session.session_id) is session.transport:
            del self._transports[session.session_id]
        self._idle.pop(session, None)
        if not session.leaving:
            session.leaving = True
            self.seats -= 1
            if session.record is not None:
                telemetry.evicted.add(1)
            if session.running and not session.gone.is_set():
                self._leaving[session.session_id] = session

    async def evict(self, session: ResidentSession, *, answer: str | None = None) -> None:
        """Drop a copy from memory; the record stays.

        Args:
            session: The copy.
            answer: What its calls in flight are told, as the message of a JSON-RPC error; nothing unless given.
        """
        self.withdraw(session)
        await session.leave(answer=answer)

    def gone(self, session: ResidentSession) -> None:
        """The server task of a copy has ended: evicted, crashed, or its transport was terminated by others."""
        self.withdraw(session)
        if self._leaving.get(session.session_id) is session:
            del self._leaving[session.session_id]
