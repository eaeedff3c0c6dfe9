"""The SDK's server loop of one session, between its transport and the streams that the loop reads and writes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Self

import anyio
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from mcp_session_store.adapter.background import is_cancelled
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import FAILED
from mcp_session_store.adapter.sessions.handshake import HandshakeOutcome
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Context
    from types import TracebackType
    from typing import TypeAlias

    from anyio.abc import TaskStatus
    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp_types import JSONRPCMessage, RequestId

    from mcp_session_store.adapter.replay.replay import Replay
    from mcp_session_store.adapter.replay.request_ids import RequestIds
    from mcp_session_store.adapter.sdk import MessageReadStream, MessageWriteStream
    from mcp_session_store.adapter.sessions.handshake import Handshake

    ServeLoop: TypeAlias = Callable[[MessageReadStream, MessageWriteStream, str, Replay | None], Awaitable[None]]
    """The SDK's server loop over a pair of streams, for the session of this id, after this replay."""

__all__ = ["ServerLoop"]

logger = logging.getLogger(__name__)

STANDALONE_STREAM_WAIT: Final = 30.0
"""Seconds for which a question that a replayed handler asks waits for the client to open its GET stream.

After a restart the client's stream is gone, and the SDK drops what it cannot deliver. The official
clients come back within seconds.
"""


class ServerLoop:
    """The server loop of one copy of a session, with what it replays and the handshake that it handles.

    Args:
        session_id: Id of the session.
        transport: The SDK's transport, not connected yet.
    """

    __slots__ = (
        "_scope",
        "asked",
        "handshake",
        "held",
        "replay",
        "request_ids",
        "running",
        "session_id",
        "standalone_stream_open",
        "stopped",
        "swallow_initialized",
        "transport",
        "writer",
    )

    def __init__(self, session_id: str, transport: StreamableHTTPServerTransport) -> None:
        self.session_id = session_id
        self.transport = transport
        self.replay: Replay | None = None
        """The replay, until it is over."""
        self.request_ids: RequestIds | None = None
        """Keeps the ids of a restored copy's own requests apart from those of the session's other copies."""
        self.swallow_initialized = False
        """The client's own `notifications/initialized` was replayed before it came."""
        self.handshake: Handshake | None = None
        """The genuine `initialize` that the server handles now."""
        self.held: set[Handshake] = set()
        """Handshakes, or requests that may be one, whose HTTP answers wait; the end of the loop decides them."""
        self.asked: dict[RequestId, RequestId | None] = {}
        """Requests to the client that it has not answered, each with the call for which it was sent, where that is
        known."""
        self.running = False
        """The server task has begun."""
        self.stopped = Latch()
        """The server task has ended, clean-up included."""
        self.standalone_stream_open = Latch()
        """The client has opened its GET stream."""
        self.writer: MessageWriteStream | None = None
        """The stream that goes to the client, once the transport is connected."""
        self._scope = anyio.CancelScope()

    def begin_with(self, replay: Replay, deadline: float, request_ids: RequestIds) -> None:
        """Make it the loop of a restored copy.

        Args:
            replay: What is replayed before the client's messages are read.
            deadline: Moment, by anyio's clock, at which the server task is cancelled.
            request_ids: Keeps the ids of the copy's own requests apart from those of the session's other copies.
        """
        self.replay = replay
        self.request_ids = request_ids
        self.swallow_initialized = True
        self.limit(deadline)

    def limit(self, deadline: float) -> None:
        """Cancel the server task at a moment of anyio's clock, unless another one is set before."""
        self._scope.deadline = deadline

    async def run(
        self,
        serve_loop: ServeLoop,
        on_read: Callable[[RequestId | None], None],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the session until it leaves memory; for new and restored sessions alike.

        Args:
            serve_loop: The SDK's server loop.
            on_read: Called for each message that a handler is going to get, with the id of a request.
            task_status: Started when requests can be given to the transport.
        """
        self.running = True
        try:
            with self._scope:
                async with self.transport.connect() as (read, write):
                    self.writer = write
                    task_status.started()
                    await serve_loop(
                        _Inbound(read, self, on_read), _Outbound(write, self), self.session_id, self.replay
                    )
        except (Exception, anyio.get_cancelled_exc_class()) as error:
            if not isinstance(error, Exception) and is_cancelled():
                raise
            key = session_key(self.session_id)
            logger.exception("the server loop of the session %s crashed; the session can be restored", key)
        finally:
            # Each request that waits for a decision of this loop gets one.
            for handshake in self.held:
                handshake.settle(FAILED)
            if self.replay is not None:
                self.replay.cut_short()
            self.stopped.set()

    def cancel(self) -> None:
        """Cancel the server task."""
        self._scope.cancel()

    def heard(self, message: JSONRPCMessage) -> None:
        """Note that the client has answered a request, if the message does so."""
        if isinstance(message, JSONRPCResponse | JSONRPCError) and message.id is not None:
            self.asked.pop(coerce_request_id(message.id), None)

    def withdrawn(self, message: JSONRPCMessage) -> None:
        """Note that no handler waits for the answer of the client any more, if a message to the client says so."""
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
            request_id = cancelled_request_id_from_params(message.params)
            if request_id is not None:
                self.asked.pop(coerce_request_id(request_id), None)


class _Inbound:
    """What the server loop reads: the client's messages, after the replay.

    It wraps without a task or a buffer of its own, so that a message costs one more call.
    """

    __slots__ = ("_inner", "_loop", "_on_read")

    def __init__(self, inner: MessageReadStream, loop: ServerLoop, on_read: Callable[[RequestId | None], None]) -> None:
        self._inner = inner
        self._loop = loop
        self._on_read = on_read

    @property
    def last_context(self) -> Context | None:
        # The SDK's dispatcher reads it by this name, to run a handler in its sender's context.
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise anyio.EndOfStream from None

    async def __anext__(self) -> SessionMessage | Exception:
        # The SDK's dispatcher iterates.
        loop = self._loop
        if loop.replay is not None:
            # Only now that the server loop reads can a handler send the client a request.
            serves = await loop.replay.finish()
            loop.replay = None
            if not serves:
                raise StopAsyncIteration
        while True:
            try:
                received = await self._inner.receive()
            except anyio.EndOfStream:
                raise StopAsyncIteration from None
            if isinstance(received, SessionMessage):
                message = received.message
                if isinstance(message, JSONRPCRequest):
                    self._on_read(message.id)
                elif isinstance(message, JSONRPCNotification):
                    if loop.swallow_initialized and message.method == "notifications/initialized":
                        continue
                    self._on_read(None)
                if loop.request_ids is not None:
                    received = loop.request_ids.inbound(received)
                if loop.asked:
                    loop.heard(received.message)
            return received

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class _Outbound:
    """What the server loop writes, on its way to the client."""

    __slots__ = ("_inner", "_loop")

    def __init__(self, inner: MessageWriteStream, loop: ServerLoop) -> None:
        self._inner = inner
        self._loop = loop

    async def send(self, item: SessionMessage) -> None:
        message = item.message
        loop = self._loop
        if type(message) is JSONRPCRequest:
            metadata = item.metadata
            related = metadata.related_request_id if isinstance(metadata, ServerMessageMetadata) else None
            loop.asked[coerce_request_id(message.id)] = related
            if loop.replay is not None:
                loop.replay.asked()
                with anyio.move_on_after(STANDALONE_STREAM_WAIT):
                    await loop.standalone_stream_open.wait()
        elif loop.asked:
            loop.withdrawn(message)
        if loop.handshake is not None:
            self._settle(loop.handshake, message)
        if loop.request_ids is not None:
            item = loop.request_ids.outbound(item)
        await self._inner.send(item)

    def _settle(self, handshake: Handshake, message: JSONRPCMessage) -> None:
        """Decide a handshake by its answer, before the answer goes on."""
        if not isinstance(message, JSONRPCResponse | JSONRPCError) or message.id != handshake.request_id:
            return
        self._loop.handshake = None
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
