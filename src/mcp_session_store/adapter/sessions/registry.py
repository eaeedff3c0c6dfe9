"""The registry of the sessions in this process: resident, being restored, or stopping; capacity and eviction."""

from __future__ import annotations

import logging
import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, NoReturn

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.refusals import reason_of
from mcp_session_store.adapter.responses import MemoryFull
from mcp_session_store.adapter.session_log import CLOSED, IDLE, MEMORY_FULL, NOT_RESTORED, STALE
from mcp_session_store.adapter.sessions.eviction import EvictionOrder
from mcp_session_store.adapter.sessions.restores import Interest
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport

    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.session_log import SessionLog
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.sessions.restores import Restore

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

OPENING: Final = 100
"""Number of copies, or a tenth of `max_sessions` where that is more, that may be opened at once in a full memory.

They bound what requests take that turn out not to open a session.
"""


class Registry:
    """The sessions in this process's memory, which is a cache of the sessions in the store.

    To evict a copy is to unpublish it, so that no request finds it any more, and then to stop it. The record stays.

    Args:
        transports: The SDK's table of resident transports, which the registry keeps true.
        owners: The SDK's table of the principals of resident sessions, which the registry keeps true.
        tasks: Task group in which copies are evicted in the background.
        log: Log of what becomes of sessions.
        capacity: Highest number of copies in memory; `None`: any number.
    """

    def __init__(
        self,
        transports: MutableMapping[str, StreamableHTTPServerTransport],
        owners: MutableMapping[str, AuthorizationContext],
        tasks: ManagerTasks,
        log: SessionLog,
        *,
        capacity: int | None,
    ) -> None:
        self.log: Final = log
        """Log of what becomes of sessions."""
        self._transports = transports
        self._owners = owners
        self._tasks = tasks
        self._capacity = sys.maxsize if capacity is None else capacity
        self._published: dict[str, ResidentSession] = {}
        self._by_key: dict[UUID, ResidentSession] = {}
        self._stopping: dict[str, ResidentSession] = {}
        self._order = EvictionOrder(self._published.values, capacity=self._capacity)
        self._idle: Final = self._order.idle
        self._interests: dict[UUID, Interest] = {}
        self.restores: dict[str, Restore] = {}
        """Restores under way, by session id."""
        self.on_stale: Callable[[ResidentSession], None] = _nothing
        """Called with a copy in use that is stale."""
        self.reserved = 0
        """Number of copies that hold a place: published, or being restored."""
        self._opening = 0
        """Number of copies that are being opened. They have no place until their handshake is committed."""
        self._promised = 0
        """Number of places that handshakes are promised which are being committed."""

    @property
    def resident(self) -> int:
        """Number of copies that requests find."""
        return len(self._published)

    @property
    def busy(self) -> int:
        """Number of those that are busy."""
        return max(len(self._published) - len(self._idle), 0)

    @property
    def streams(self) -> int:
        """Number of GET streams that are open."""
        return sum(session.streams for session in list(self._published.values()))

    def __iter__(self) -> Iterator[ResidentSession]:
        return iter(list(self._published.values()))

    @property
    def is_arriving(self) -> bool:
        """Whether a session is being opened or restored."""
        return self._opening > 0 or bool(self.restores)

    def get(self, session_id: str) -> ResidentSession | None:
        """Return the copy that requests for this session find."""
        return self._published.get(session_id)

    def with_key(self, key: UUID) -> ResidentSession | None:
        """Return the resident copy of the session that is stored under this key."""
        return self._by_key.get(key)

    def stopping(self, session_id: str) -> ResidentSession | None:
        """Return the evicted copy of this session whose server task has not ended yet."""
        return self._stopping.get(session_id)

    def take_interest(self, key: UUID) -> Interest:
        """Take note from now on of what is heard of the session that is stored under this key."""
        interest = self._interests.get(key)
        if interest is None:
            interest = self._interests[key] = Interest(key)
        interest.holders += 1
        return interest

    def lose_interest(self, interest: Interest) -> None:
        """Undo one `take_interest`."""
        interest.holders -= 1
        if not interest.holders:
            del self._interests[interest.key]
            interest.over.set()

    def interest_in(self, key: UUID) -> Interest | None:
        """Return what is heard of the session that is stored under this key, while it is being loaded or restored."""
        return self._interests.get(key)

    def concerns(self, key: UUID) -> bool:
        """Return whether the session that is stored under this key is resident, or being loaded or restored."""
        return key in self._by_key or key in self._interests

    def restored(self, restore: Restore, session: ResidentSession) -> None:
        """End a restore that succeeded: publish its copy, pinned for all requests that wait for it."""
        self.publish(session)
        if restore.waiters:
            # Before anything else can run: none of the requests meets a stopping copy.
            session.pin(restore.waiters)
        if session.stale_since:
            self.renew_if_stale(session)
        restore.session = session
        assert session.record is not None
        assert session.marker is not None
        marker = session.marker
        self.log.restored(
            session.record,
            previous_instance=marker.previous_instance,
            restores=marker.restores,
            seconds=clock.now() - restore.loaded_at,
        )
        self._end(restore)

    def not_restored(self, restore: Restore, failure: Exception) -> None:
        """End a restore that failed, unless it is over already; its copy, unpublished, stops by itself."""
        if restore.is_over:
            return
        if restore.copy is not None:
            self.unpublish(restore.copy, NOT_RESTORED)
        restore.failure = failure
        self.log.not_restored(reason_of(failure), seconds=clock.now() - restore.loaded_at)
        telemetry.fail_span(restore.span, failure)
        self._end(restore)

    def _end(self, restore: Restore) -> None:
        restore.copy = None
        del self.restores[restore.session_id]
        self.lose_interest(restore.interest)
        restore.span.end()
        restore.end()

    def enter(self, owner: AuthorizationContext | None, *, opens: bool) -> None:
        """Let in a request that may open a session; its copy gets a place when the session is opened.

        Args:
            owner: Principal of the request.
            opens: Whether the request may open a session. One that does not needs no place.

        Raises:
            MemoryFull: There is no place for it, or too many copies are being opened.
        """
        if self.reserved + self._opening >= self._capacity or self._stopping:
            if opens:
                self._check_room(owner)
            most = self._capacity + max(OPENING, self._capacity // 10)
            # Copies that were not opened and whose clean-up hangs must not pile up either.
            if self.reserved + self._opening >= most or len(self._stopping) >= most:
                self._refuse()
        self._opening += 1

    def reserve(self, session: ResidentSession) -> None:
        """Give a copy a place, for which another one leaves if need be.

        Raises:
            MemoryFull: No copy makes room.
        """
        if self.reserved + self._promised >= self._capacity:
            self._check_room(session.owner)
        if self.reserved >= self._capacity:
            self._make_room(session)
        session.placed = True
        self.reserved += 1
        if session.owner is not None:
            self._order.add(session, session.owner)

    def promise(self, session: ResidentSession) -> None:
        """Promise a place to a copy whose handshake is about to be committed. None leaves before that succeeds.

        Raises:
            MemoryFull: No copy makes room.
        """
        if self.reserved + self._promised >= self._capacity:
            self._check_room(session.owner)
        self._promised += 1

    def withdraw(self) -> None:
        """Withdraw a promise, because the handshake could not be committed."""
        self._promised -= 1

    def opened(self, session: ResidentSession) -> None:
        """Publish the copy of a session whose handshake is committed, in the place that it was promised.

        Raises:
            MemoryFull: All copies that could have made room have come into use meanwhile.
        """
        self._promised -= 1
        if session.stopping:
            return  # its client has gone
        self.reserve(session)
        self._opening -= 1
        self.publish(session)

    def _check_room(self, owner: AuthorizationContext | None) -> None:
        """Check that there is a place for one more copy, beside those that are promised."""
        lacking = self.reserved + self._promised + 1 - self._capacity
        if lacking <= 0:
            return
        # Copies whose clean-up hangs must not pile up.
        if len(self._stopping) >= self._capacity or (
            len(self._idle) < lacking and next(islice(self._order.candidates(owner), lacking - 1, None), None) is None
        ):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise MemoryFull

    def _make_room(self, session: ResidentSession) -> None:
        """Evict a copy in favour of another one."""
        evicted = next(self._order.candidates(session.owner))
        if evicted.busy:
            key = session_key(evicted.session_id)
            logger.warning("the session %s leaves memory to make room, and the calls that it runs are lost", key)
        self.evict_soon(evicted, MEMORY_FULL, lost=evicted.busy)

    def publish(self, session: ResidentSession) -> None:
        """Let requests find a copy."""
        assert session.record is not None
        self._published[session.session_id] = session
        self._by_key[session.record.key] = session
        self._transports[session.session_id] = session.transport
        if session.owner is not None:
            self._owners[session.session_id] = session.owner
        # A restored copy that is stale already is evicted after the requests that wait for it, not before.
        if not session.busy:
            self._idle[session] = None

    def usage_changed(self, session: ResidentSession, busy: bool) -> None:
        """Note that a copy became busy or idle, and evict an idle one that is stale."""
        self._idle.pop(session, None)
        if busy:
            return
        if self._published.get(session.session_id) is session:
            self._idle[session] = None
        if session.stale and not session.stopping:
            self.evict_soon(session, STALE)

    def renew_if_stale(self, session: ResidentSession) -> None:
        """Evict an idle copy, or have one in use refreshed, when another copy has changed what a restore replays.

        Where it is evicted, the next request restores all of it.
        """
        if not session.stale or session.stopping:
            return
        if session.busy:
            self.on_stale(session)
        else:
            self.evict_soon(session, STALE)

    def evict_idle(self, since: float) -> None:
        """Evict the idle copies whose clients have not been in contact since a moment of `clock`, in the background."""
        for session in [session for session in self._idle if session.last_contact <= since]:
            self.evict_soon(session, IDLE)

    def evict_soon(self, session: ResidentSession, reason: str = CLOSED, *, lost: bool = False) -> None:
        """Unpublish a copy and stop it in the background.

        Args:
            session: The copy.
            reason: Why it leaves memory, for the metric and the log.
            lost: Whether its calls in flight are answered by the error for lost ones.
        """
        self.unpublish(session, reason)
        self._tasks.start_soon(partial(self.stop, session, lost=lost))

    async def evict(self, session: ResidentSession, reason: str = CLOSED, *, answer: str | None = None) -> None:
        """Unpublish a copy and stop it.

        Args:
            session: The copy.
            reason: Why it leaves memory, for the metric and the log.
            answer: Message of the JSON-RPC error with which its calls in flight are answered; `None`: they get none.
        """
        self.unpublish(session, reason)
        await session.stop(answer=answer)

    async def evict_transport(self, session_id: str, transport: StreamableHTTPServerTransport) -> None:
        """Evict the copy with this transport; a copy that was restored under the same id stays."""
        session = self._published.get(session_id)
        if session is not None and session.transport is transport:
            await self.evict(session)

    def unpublish(self, session: ResidentSession, reason: str = CLOSED) -> None:
        """Let no request find a copy any more, and free its capacity; a successor under the same id stays.

        Args:
            session: The copy.
            reason: Why it leaves memory, for the metric and the log.
        """
        if self._published.get(session.session_id) is session:
            del self._published[session.session_id]
            self._owners.pop(session.session_id, None)
        if session.record is not None and self._by_key.get(session.record.key) is session:
            del self._by_key[session.record.key]
        if self._transports.get(session.session_id) is session.transport:
            del self._transports[session.session_id]
        self._idle.pop(session, None)
        if not session.stopping:
            session.stopping = True
            if session.placed:
                self.reserved -= 1
                self._order.remove(session)
            else:
                self._opening -= 1
            if session.record is not None:
                self.log.evicted(session.record, reason)
            if session.loop.running and not session.loop.stopped.is_set():
                self._stopping[session.session_id] = session

    async def stop(self, session: ResidentSession, *, answer: str | None = None, lost: bool = False) -> None:
        """Stop an unpublished copy, as `ResidentSession.stop` does; a failure is reported and not raised."""
        try:
            await session.stop(answer=answer, lost=lost)
        except Exception as error:
            report_failure("eviction", error, key=session_key(session.session_id), namespace=self.log.namespace)

    def on_stopped(self, session: ResidentSession) -> None:
        """Forget a copy whose server task has ended: evicted, crashed, or its transport terminated by others."""
        self.unpublish(session)
        if self._stopping.get(session.session_id) is session:
            del self._stopping[session.session_id]


def _nothing(session: ResidentSession) -> None:
    """Leave a stale copy as it is."""
