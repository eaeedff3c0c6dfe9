"""A session that is resident in this process: its usage, which keeps it in memory, and how it stops."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import anyio
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED, ErrorData, JSONRPCError

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import LOST
from mcp_session_store.adapter.sdk import streams_of
from mcp_session_store.adapter.sessions.lifetime import Lifetime
from mcp_session_store.adapter.sessions.set_state import SetState
from mcp_session_store.adapter.streams.standalone import StandaloneStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp_types import RequestId

    from mcp_session_store.adapter.replay.marker import SessionRestoreMarker
    from mcp_session_store.adapter.sessions.outlets import Outlet, Outlets
    from mcp_session_store.adapter.sessions.server_loop import ServerLoop
    from mcp_session_store.adapter.streams.event_store import SessionEvents
    from mcp_session_store.adapter.streams.hold import Hold
    from mcp_session_store.records import NewState, SessionRecord
    from mcp_session_store.retention import RetentionPolicy

__all__ = ["RESIDENT_SESSION", "ResidentSession"]

RESIDENT_SESSION: Final = "mcp_session_store.resident_session"
"""Key of a request's ASGI scope under which the resident session stands that serves it."""

NEVER_FRESH: Final = sys.maxsize
"""Revision since which a copy is stale that cannot be refreshed, and leaves memory as soon as it is not in use."""

LAST_ANSWERS: Final = 1.0
"""Seconds that clients have to read the last answers of a copy."""


class ResidentSession:
    """One copy of a session, from the reservation of its place until it has left memory.

    Args:
        session_id: Id of the session.
        owner: Principal that the session is served to, as the SDK compares principals.
        transport: The SDK's transport, not connected yet.
        on_usage: Called with the session, and whether it is busy, when it becomes busy or idle.
        events: Events that the session's streams are resumed from; `None`: no stream can be resumed.
        loop: Its server loop.
    """

    __slots__ = (
        "_answered",
        "_calls",
        "_on_usage",
        "_outlet",
        "_recording",
        "_set_state",
        "_standalone",
        "elsewhere_until",
        "events",
        "in_flight",
        "last_contact",
        "lifetime",
        "looked_at",
        "loop",
        "marker",
        "new_state",
        "outlets",
        "owner",
        "pins",
        "placed",
        "record",
        "session_id",
        "stale_since",
        "stopping",
        "streams",
        "transport",
        "watched",
        "watched_revision",
    )

    def __init__(
        self,
        session_id: str,
        owner: AuthorizationContext | None,
        transport: StreamableHTTPServerTransport,
        on_usage: Callable[[ResidentSession, bool], None],
        events: SessionEvents | None,
        loop: ServerLoop,
    ) -> None:
        self.session_id = session_id
        self.owner = owner
        self.transport = transport
        self.events = events
        if events is not None:
            events.on_recorded = self._rest
        self.loop = loop
        loop.on_asked_outside = self._asked_outside
        loop.find_outlet = self.find_outlet
        self.lifetime = Lifetime()
        self.record: SessionRecord | None = None
        """The record as this copy has it: when it was opened or restored here, and with what was changed since then;
        `None` before."""
        self.new_state: Mapping[str, NewState] | None = None
        """State that was set in the handshake of a new session, by name, to be stored with the record."""
        self.marker: SessionRestoreMarker | None = None
        """The marker of a restored copy."""
        self.watched: Mapping[str, str] | None = None
        """Watched values of the session's state, by name: JSON texts."""
        self.watched_revision = 0
        """Revision of the session whose watched values they are."""
        self.stale_since = 0
        """Highest revision that was heard of; the copy is stale when it is above the record's."""
        self.placed = False
        """The copy holds a place in memory: it is published, or being restored."""
        self.stopping = False
        """The copy was unpublished: requests do not find it any more."""
        self.pins = 0
        """Number of HTTP requests being served: while there are any, there is contact with the client."""
        self.streams = 0
        """Number of those requests that are open GET streams."""
        self.in_flight = 0
        """Number of messages that were read and whose handlers have not returned."""
        self.last_contact = clock.now()
        """Moment, by `clock`, at which contact with the client ended, if there is none now."""
        self.looked_at = -math.inf
        """Moment at which the store was last asked whether the client is active on other instances: see `Absences`."""
        self.elsewhere_until = -math.inf
        """Moment until which the client counts as active on another instance."""
        self._on_usage = on_usage
        self._recording: anyio.Lock | None = None
        self._set_state: SetState | None = None
        self._standalone: StandaloneStream | None = None
        self.outlets: Outlets | None = None
        """Makes the way to the client's stream on other instances; `None` where there is none, or the log is one."""
        self._outlet: Outlet | None = None
        self._calls: set[RequestId] = set()
        """Ids of the calls among the messages in flight."""
        self._answered: Latch | None = None

    @property
    def recording(self) -> anyio.Lock:
        """Lock that is held while something is being stored that raises the session's revision."""
        # Made on demand: few sessions need it, and the garbage collector visits everything that a session holds.
        if self._recording is None:
            self._recording = anyio.Lock()
        return self._recording

    @property
    def set_state(self) -> SetState:
        """What journaled calls have set in this copy."""
        if self._set_state is None:
            self._set_state = SetState()
        return self._set_state

    @property
    def standalone(self) -> StandaloneStream:
        """The client's GET stream."""
        if self._standalone is None:
            self._standalone = StandaloneStream(streams_of(self.transport))
            if (outlet := self.find_outlet()) is not None:
                self._standalone.on_opened = outlet.opened
                self._standalone.on_received = outlet.received
                self._standalone.on_closed = outlet.closed
        return self._standalone

    def find_outlet(self) -> Outlet | None:
        """Return the way of what is said outside of calls to the client's GET stream, wherever that is open."""
        # Made on demand, because most copies say nothing outside of calls.
        if self._outlet is None and self.outlets is not None:
            self._outlet = self.outlets.make(self)
        return self._outlet

    @property
    def hold(self) -> Hold | None:
        """This instance's last hold of the client's GET stream, where other instances may have it."""
        return None if self._standalone is None else self._standalone.hold

    @property
    def serving(self) -> bool:
        """Whether requests may be given to the copy without asking the store."""
        # The transport is asked too, because others can terminate it: FastMCP does at shutdown.
        if self.stopping or self.transport.is_terminated:
            return False
        now = clock.now()
        return now < self.lifetime.ends_at and (now < self.last_contact + self.lifetime.idle or self.pins > 0)

    @property
    def can_serve(self) -> bool:
        """Whether requests may be given to the copy of a session that the store has said to be live.

        A copy that is past idle as far as this instance knows was in contact with its client on another one, and its
        calls go on. One that runs none is restored, so that it has what was changed there.
        """
        if self.stopping or self.transport.is_terminated or self.lifetime.past_absolute:
            return False
        return self.busy or not self.past_idle

    @property
    def past_idle(self) -> bool:
        """Whether the client has been away for as long as the session may be idle, as far as this instance knows."""
        return clock.now() >= self.last_contact + self.lifetime.idle and self.pins == 0

    @property
    def busy(self) -> bool:
        """Whether a client or a handler would notice if the copy left memory now."""
        # A call outlives its client's connection, and a 202 precedes its processing: so both count. And an answer
        # that is to be stored outlives its handler. Without a call of `at_work`, because each request asks twice.
        if self.pins > 0 or self.in_flight > 0 or self.loop.asked_outside > 0:
            return True
        return self.events is not None and self.events.busy

    @property
    def at_work(self) -> bool:
        """Whether handlers of messages run, or something else of the session waits for an answer of the client."""
        return self.in_flight > 0 or self.loop.asked_outside > 0

    @property
    def answering(self) -> bool:
        """Whether the answer of a call whose handler has returned is on its way to the log or to the client."""
        if self.events is not None and self.events.busy:
            return True
        return self.has_calls and self.in_flight == 0

    @property
    def has_calls(self) -> bool:
        """Whether a client waits for the answer to a request."""
        return self.pins > self.streams

    @property
    def waits_for_client(self) -> bool:
        """Whether the handlers of all messages in flight wait for an answer of the client.

        A question that does not name the call for which it is asked may be that of any handler.
        """
        loop = self.loop
        # What was asked before the last handler returned is no question of those that run now.
        asked = [question.call for question in loop.asked.values() if question.lull == loop.lull]
        calls = self._calls.intersection(call for call in asked if call is not None)
        return self.in_flight <= len(calls) + asked.count(None)

    def runs(self, request_id: RequestId) -> bool:
        """Return whether the call of this id runs in this copy, whether the id is a number or the text of one."""
        wanted = coerce_request_id(request_id)
        return any(coerce_request_id(call) == wanted for call in self._calls)

    @property
    def stale(self) -> bool:
        """Whether another copy has changed what a restore replays."""
        return self.record is not None and self.stale_since > self.record.revision

    def stored(
        self,
        record: SessionRecord,
        policy: RetentionPolicy,
        *,
        new: bool,
        loaded_at: float | None = None,
        newest_event: int | None = None,
    ) -> None:
        """Take over the record that is stored, and from it how long the session lives: see `Lifetime.begin`.

        Args:
            record: The record.
            policy: Policy of the store.
            new: Whether the session was just opened.
            loaded_at: Moment, by `clock`, at which the record was loaded; `None` for one that was just created or
                claimed.
            newest_event: Sequence of the session's newest event at that moment, if it is known.
        """
        self.record = record
        if self.events is not None:
            known_at = clock.now() if loaded_at is None else loaded_at
            self.events.begin(0 if new else newest_event, known_at=known_at)
        self.lifetime.begin(record, policy, new=new, loaded_at=loaded_at)

    def pin(self, times: int = 1) -> None:
        """Note that HTTP requests begin to be served."""
        was_busy = self.busy
        self.pins += times
        if not was_busy:
            self._on_usage(self, True)

    def unpin(self) -> None:
        """Note that one HTTP request is over."""
        self.pins -= 1
        if self._answered is not None and self.pins == self.streams:
            self._answered.set()
        if self.pins == 0:
            self.last_contact = clock.now()
            self._rest()

    def heard_elsewhere(self) -> None:
        """Note that the client was in contact with another instance, which passed on what it sent."""
        if self.busy:
            self.last_contact = clock.now()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count one of the HTTP requests as an open GET stream."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def read(self, request_id: RequestId | None) -> None:
        """Note that a message was read that a handler is going to get.

        Args:
            request_id: Id of a request of the client's; `None` for other messages.
        """
        was_busy = self.pins > 0 or self.busy
        self.in_flight += 1
        if request_id is not None:
            self._calls.add(request_id)
        if not was_busy:
            self._on_usage(self, True)

    def finished(self, request_id: RequestId | None) -> None:
        """Note that the handler of a message has returned."""
        self.in_flight -= 1
        if self.in_flight == 0 and self.loop.asked:
            # Not all questions that no handler waits for any more are withdrawn.
            self.loop.lull += 1
        if request_id is not None:
            self._calls.discard(request_id)
            if self.events is not None:
                self.events.returned(request_id)
        if self.pins == 0:
            self._rest()

    @contextmanager
    def taking_change(self) -> Iterator[None]:
        """Keep the copy at work while a change of another copy is brought in, until it is known to have it."""
        self.read(None)
        try:
            yield
        finally:
            self.finished(None)

    def _asked_outside(self) -> None:
        """Note that the first question outside of calls is open, or none any more."""
        if self.pins == 0 and self.in_flight == 0 and not (self.events is not None and self.events.busy):
            self._on_usage(self, self.loop.asked_outside > 0)

    def _rest(self) -> None:
        if not self.busy:
            self._on_usage(self, False)

    async def stop(self, *, answer: str | None = None, lost: bool = False) -> None:
        """Close the streams of this copy and cancel its calls. The record stays.

        The loop's `stopped` is set when the server task, clean-up included, has ended.

        Args:
            answer: Message of the JSON-RPC error with which the calls in flight are answered, where the session has
                ended; `None`: they get none.
            lost: Whether calls in flight are answered by the error for lost ones, because the session goes on.
        """
        with anyio.CancelScope(shield=True):
            if lost and not self.transport.is_terminated:
                await self._answer_calls(LOST, reason="lost")
            if self.events is not None:
                self.events.close(answer)
            if not self.transport.is_terminated:
                if answer is not None:
                    await self._answer_calls(answer, reason="ended")
                await self.transport.terminate()
        # Closed streams end the loop, unless it is parked in an inline `initialize`.
        self.loop.cancel()

    async def _answer_calls(self, message: str, *, reason: str) -> None:
        if (writer := self.loop.writer) is None:
            return
        self._answered = Latch()
        error = ErrorData(code=CONNECTION_CLOSED, message=message, data={"reason": reason})
        # A client that does not read must not keep the copy.
        with anyio.move_on_after(LAST_ANSWERS):
            try:
                for request_id in list(self._calls):
                    await writer.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=error)))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            if self.has_calls:
                await self._answered.wait()
