"""A session that is resident in this instance: the SDK's transport, the server loop on it, and what keeps it busy."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import (
    CONNECTION_CLOSED,
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
)

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import UNAVAILABLE
from mcp_session_store.adapter.sessions.handshake import HandshakeOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context
    from types import TracebackType

    from anyio.abc import TaskStatus
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp_types import JSONRPCMessage, RequestId
    from starlette.types import Scope

    from mcp_session_store.adapter.replay.journal import Journal, JournalWrite
    from mcp_session_store.adapter.replay.replay import Replay
    from mcp_session_store.adapter.replay.request_ids import RequestIds
    from mcp_session_store.adapter.sessions.handshake import Handshake, InitializeParams
    from mcp_session_store.adapter.streams.event_store import SessionEvents
    from mcp_session_store.records import SessionRecord, SessionRestoreMarker
    from mcp_session_store.retention import RetentionPolicy

__all__ = ["RESIDENT_SESSION", "ResidentSession", "SessionRecorder", "resident_session"]

logger = logging.getLogger(__name__)

RESIDENT_SESSION: Final = "mcp_session_store.resident_session"
"""Where a request's ASGI scope holds the resident session that serves it."""

STANDALONE_STREAM_WAIT: Final = 30.0
"""Seconds for which a question that a replayed handler asks waits for the client to open its GET stream.

After a restart the client's stream is gone, and the SDK drops what it cannot deliver. The official
clients come back within seconds.
"""


LAST_ANSWERS: Final = 1.0
"""Seconds that the last answers of a copy may take to be read by the clients."""


class SessionRecorder(Protocol):
    """Who stores what a restore replays."""

    @property
    def max_initialize_params(self) -> int:
        """Bytes of params that are stored at most."""
        ...

    @property
    def journal(self) -> Journal:
        """Which calls are stored, and as what."""
        ...

    async def record_call(self, session: ResidentSession, write: JournalWrite) -> bool:
        """Commit what a call changes in the journal of this session; False when the session is not live any more.

        Raises:
            SessionStoreError: It could not be stored.
        """
        ...

    def used(self, session: ResidentSession) -> None:
        """The session became busy, or ceased to be."""
        ...

    async def record_handshake(self, session: ResidentSession, params: InitializeParams, version: str) -> bool:
        """Commit a handshake of this session; False when the session is not live any more.

        Raises:
            SessionStoreError: It could not be stored.
        """
        ...


class ResidentSession:
    """One copy of a session, from admission until it has left memory.

    Args:
        session_id: Its id.
        owner: The principal that it is served to, as the SDK compares them.
        transport: The SDK's transport, not connected yet.
        recorder: Stores what a restore of it replays.
        events: What its streams can be resumed from; `None`: they cannot.
    """

    def __init__(
        self,
        session_id: str,
        owner: AuthorizationContext | None,
        transport: StreamableHTTPServerTransport,
        recorder: SessionRecorder,
        events: SessionEvents | None = None,
    ) -> None:
        self.session_id = session_id
        self.recorder = recorder
        self.owner = owner
        self.transport = transport
        self.events = events
        if events is not None:
            events.on_recorded = self._rest
        self.record: SessionRecord | None = None
        """As it was when the session was opened or restored here; `None` before."""
        self.marker: SessionRestoreMarker | None = None
        self.replay: Replay | None = None
        """Until it is over."""
        self.late_replay: Replay | None = None
        """One that is over, and some of whose calls have not been answered."""
        self.request_ids: RequestIds | None = None
        """Of a restored copy: keeps its own requests' ids apart from those of other copies."""
        self.handshake: Handshake | None = None
        """The genuine `initialize` that the server handles now."""
        self.stale_since = 0
        """The highest revision that was heard of; what this copy has is older when it is above the record's."""
        self._recording: anyio.Lock | None = None
        self.ends_at = math.inf
        """When its absolute lifetime is over, by anyio's clock."""
        self.idle_lifetime = math.inf
        """Seconds for which it lives without being used."""
        self.reported_at = -math.inf
        """When its activity was last stored, by anyio's clock."""
        self.expiry_reported = -math.inf
        """When it expires by what was last stored, by anyio's clock."""
        self.swallow_initialized = False
        """The client's own `notifications/initialized` was replayed before it came."""
        self.held: set[Handshake] = set()
        """Handshakes, or what may be one, whose HTTP answers wait."""
        self.leaving = False
        """It was withdrawn: requests find it no more."""
        self.running = False
        """Its server task has begun."""
        self.gone = Latch()
        """Its server task has ended, clean-up included."""
        self.pins = 0
        """HTTP requests that are being served."""
        self.streams = 0
        """Those among them that are open GET streams."""
        self.unsettled = 0
        """Messages that were read and whose handlers have not returned."""
        self._calls: set[RequestId] = set()
        """The calls among them."""
        self._answered: Latch | None = None
        self.idle_since = anyio.current_time()
        self.standalone_stream_open = Latch()
        self._scope = anyio.CancelScope()
        self._write: sdk.MessageWriteStream | None = None

    @property
    def recording(self) -> anyio.Lock:
        """Held while something of this session is being stored that raises its revision."""
        # Made when it is needed: few sessions do, and what each one holds the garbage collector visits.
        if self._recording is None:
            self._recording = anyio.Lock()
        return self._recording

    @property
    def serving(self) -> bool:
        """Whether requests may still be given to it."""
        # The transport is asked too, because others can terminate it: FastMCP does at shutdown.
        return not self.leaving and not self.transport.is_terminated and not self.expired

    @property
    def expired(self) -> bool:
        """Whether its life is over as far as this instance knows; the store knows for sure."""
        return self.outlived or (not self.busy and anyio.current_time() >= self.idle_since + self.idle_lifetime)

    @property
    def outlived(self) -> bool:
        """Whether its absolute lifetime is over."""
        return self.ends_at < math.inf and anyio.current_time() >= self.ends_at

    @property
    def busy(self) -> bool:
        """Whether somebody would notice if it left memory now."""
        # A call outlives its client's connection, and a 202 precedes its processing: so both count. And an answer
        # that is to be stored outlives its handler.
        return self.pins > 0 or self.unsettled > 0 or (self.events is not None and self.events.busy)

    @property
    def stale(self) -> bool:
        """Whether another copy has changed what a restore replays."""
        return self.record is not None and self.stale_since > self.record.revision

    def stored(self, record: SessionRecord, policy: RetentionPolicy, *, new: bool) -> None:
        """Take over the record that was just stored, and from it how long the session lives.

        By anyio's clock, and from differences of the store's own times: a wall clock that is wrong changes nothing.
        """
        self.record = record
        if self.events is not None:
            self.events.active = True
        now = anyio.current_time()
        if policy.absolute is not None:
            self.ends_at = now + (record.created_at + policy.absolute - record.last_seen_at).total_seconds()
        if new:
            self.idle_lifetime = policy.new_session_lifetime.total_seconds()
            # Until its first activity is stored it lives on borrowed time.
            self.expiry_reported = -math.inf
        else:
            self.reported(now, policy)

    def reported(self, moment: float, policy: RetentionPolicy) -> None:
        """Its activity up to a moment, by anyio's clock, is stored."""
        self.reported_at = moment
        self.idle_lifetime = math.inf if policy.idle is None else policy.idle.total_seconds()
        self.expiry_reported = min(moment + self.idle_lifetime, self.ends_at)

    def pin(self, times: int = 1) -> None:
        """HTTP requests begin to be served."""
        was_busy = self.busy
        self.pins += times
        if not was_busy:
            self.recorder.used(self)

    def unpin(self) -> None:
        """One is over."""
        self.pins -= 1
        if self._answered is not None and self.pins == self.streams:
            self._answered.set()
        self._rest()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """While one of the requests is an open GET stream."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def read(self, message: JSONRPCMessage) -> None:
        """A message was read that a handler is going to get."""
        was_busy = self.busy
        self.unsettled += 1
        if isinstance(message, JSONRPCRequest):
            self._calls.add(message.id)
        if not was_busy:
            self.recorder.used(self)

    def settled(self, request_id: RequestId | None) -> None:
        """A handler has returned."""
        self.unsettled -= 1
        if request_id is not None:
            self._calls.discard(request_id)
            if self.events is not None:
                self.events.returned(request_id)
        self._rest()

    def _rest(self) -> None:
        if not self.busy:
            self.idle_since = anyio.current_time()
            self.recorder.used(self)

    async def run(
        self,
        manager: sdk.ManagerSeams,
        on_gone: Callable[[ResidentSession], None],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the session until it leaves memory; for new and restored sessions alike.

        Args:
            manager: Whose server loop runs.
            on_gone: Called at the end, whatever it was.
            task_status: Told when requests can be given to the transport.
        """
        self.running = True
        try:
            with self._scope:
                async with self.transport.connect() as (read, write):
                    self._write = write
                    task_status.started()
                    await sdk.serve_loop(manager, _Inbound(read, self), _Outbound(write, self), self.session_id)
        except Exception:
            logger.exception("the server loop of a session crashed; the session can be restored")
        finally:
            # Whatever waits for a decision of this loop gets one.
            for handshake in self.held:
                handshake.settle(UNAVAILABLE)
            if self.replay is not None:
                self.replay.cut_short("the server loop ended during the replay")
            self.gone.set()
            on_gone(self)

    async def leave(self, *, answer: str | None = None) -> None:
        """Close the streams of this copy and cancel its calls. The record stays.

        `gone` tells when the server task, clean-up included, has ended.

        Args:
            answer: What its calls in flight are told, as the message of a JSON-RPC error; nothing unless given.
        """
        if self.events is not None:
            self.events.close(answer)
        with anyio.CancelScope(shield=True):
            if not self.transport.is_terminated:
                if answer is not None:
                    await self._answer_calls(answer)
                await self.transport.terminate()
        # Closed streams end the loop, unless it is parked in an inline `initialize`.
        self._scope.cancel()

    async def _answer_calls(self, message: str) -> None:
        if self._write is None:
            return
        self._answered = Latch()
        error = ErrorData(code=CONNECTION_CLOSED, message=message)
        # A client that does not read must not keep the copy.
        with anyio.move_on_after(LAST_ANSWERS):
            try:
                for request_id in list(self._calls):
                    await self._write.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=error)))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            if self.pins > self.streams:
                await self._answered.wait()


class _Inbound:
    """What the server loop reads: the messages to replay, then the client's.

    It wraps without a task or a buffer of its own, so that a message costs one more call.
    """

    __slots__ = ("_context", "_inner", "_session")

    def __init__(self, inner: sdk.MessageReadStream, session: ResidentSession) -> None:
        self._inner = inner
        self._session = session
        self._context: Context | None = None

    @property
    def last_context(self) -> Context | None:
        # The SDK's dispatcher reads it by this name, to run a handler in its sender's context.
        return self._context if self._context is not None else getattr(self._inner, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        session = self._session
        if session.replay is not None:
            item = await session.replay.next()
            if item is not None:
                self._context = session.replay.context
                session.read(item.message)
                return item
            if session.replay.failure is not None:
                raise anyio.EndOfStream
            if session.replay.unanswered:
                session.late_replay = session.replay
            session.replay = None
            self._context = None
        while True:
            received = await self._inner.receive()
            if isinstance(received, SessionMessage):
                message = received.message
                if isinstance(message, JSONRPCRequest | JSONRPCNotification):
                    if session.swallow_initialized and message.method == "notifications/initialized":
                        continue
                    session.read(message)
                if session.request_ids is not None:
                    received = session.request_ids.inbound(received)
            return received

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class _Outbound:
    """What the server loop writes: answers to replayed messages come off, all else goes to the client."""

    __slots__ = ("_inner", "_session")

    def __init__(self, inner: sdk.MessageWriteStream, session: ResidentSession) -> None:
        self._inner = inner
        self._session = session

    async def send(self, item: SessionMessage) -> None:
        message = item.message
        session = self._session
        if session.replay is not None:
            if session.replay.takes(item):
                return
            if isinstance(message, JSONRPCRequest):
                session.replay.handler_done()
                with anyio.move_on_after(STANDALONE_STREAM_WAIT):
                    await session.standalone_stream_open.wait()
        elif session.late_replay is not None and session.late_replay.takes(item):
            return
        if session.handshake is not None:
            self._settle(session.handshake, message)
        if session.request_ids is not None:
            item = session.request_ids.outbound(item)
        await self._inner.send(item)

    def _settle(self, handshake: Handshake, message: JSONRPCMessage) -> None:
        """Decide a handshake by its answer, before the answer goes on."""
        if not isinstance(message, JSONRPCResponse | JSONRPCError) or message.id != handshake.request_id:
            return
        self._session.handshake = None
        stored = isinstance(message, JSONRPCResponse) and handshake.recorded
        handshake.settle(HandshakeOutcome.STORED if stored else HandshakeOutcome.NOT_OPENED)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def resident_session(request: Any) -> ResidentSession | None:
    """The resident session that serves this request; `None` outside of one."""
    scope: Scope | None = getattr(request, "scope", None)
    session = None if scope is None else scope.get(RESIDENT_SESSION)
    return session if isinstance(session, ResidentSession) else None
