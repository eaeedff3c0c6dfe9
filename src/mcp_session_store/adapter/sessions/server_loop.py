"""The SDK's server loop of one session, between its transport and the streams that the loop reads and writes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Self

import anyio
from mcp.shared.dispatcher import as_request_id, coerce_request_id
from mcp.shared.exceptions import NoBackChannelError
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.background import is_cancelled
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.question_ids import MAX_QUESTIONS, Question, QuestionIds, as_asked, renamed
from mcp_session_store.adapter.responses import FAILED
from mcp_session_store.adapter.sessions.handshake import HandshakeOutcome
from mcp_session_store.mailbox import MessageKind
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Context
    from types import TracebackType
    from typing import TypeAlias

    from anyio.abc import TaskStatus
    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp_types import JSONRPCMessage, RequestId

    from mcp_session_store.adapter.replay.mirrored import MirroredCalls
    from mcp_session_store.adapter.replay.replay import Replay
    from mcp_session_store.adapter.sdk import MessageReadStream, MessageWriteStream
    from mcp_session_store.adapter.sessions.handshake import Handshake
    from mcp_session_store.adapter.sessions.outlets import Outlet

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
        question_ids: Makes the ids of the copy's questions.
        on_dropped: Called with the kind of each message, answer or progress, that is for no open question of this copy.
    """

    __slots__ = (
        "_on_dropped",
        "_scope",
        "asked",
        "asked_outside",
        "find_outlet",
        "handshake",
        "held",
        "lull",
        "mirrored",
        "on_asked_outside",
        "question_ids",
        "replay",
        "running",
        "session_id",
        "standalone_stream_open",
        "stopped",
        "swallow_initialized",
        "transport",
        "writer",
    )

    def __init__(
        self,
        session_id: str,
        transport: StreamableHTTPServerTransport,
        question_ids: QuestionIds,
        on_dropped: Callable[[MessageKind], None],
    ) -> None:
        self.session_id = session_id
        self.transport = transport
        self.question_ids = question_ids
        self._on_dropped = on_dropped
        self.replay: Replay | None = None
        """The replay, until it is over."""
        self.swallow_initialized = False
        """The client's own `notifications/initialized` was replayed before it came."""
        self.handshake: Handshake | None = None
        """The genuine `initialize` that the server handles now."""
        self.held: set[Handshake] = set()
        """Handshakes, or requests that may be one, whose HTTP answers wait; the end of the loop decides them."""
        self.asked: dict[RequestId, Question] = {}
        """Questions that the client has not answered, by the ids that it got, in their order."""
        self.asked_outside = 0
        """Number of these that keep the copy in use although it handles no message: see `Question.outside`."""
        self.on_asked_outside: Callable[[], None] = lambda: None
        """Called when the first of them is asked, and when the last is answered, withdrawn or forgotten."""
        self.lull = 0
        """Number of times that the last handler of the copy has returned while there were questions."""
        self.mirrored: MirroredCalls | None = None
        """Calls that other copies have run and that this one runs, too, once there was one."""
        self.running = False
        """The server task has begun."""
        self.stopped = Latch()
        """The server task has ended, clean-up included."""
        self.standalone_stream_open = Latch()
        """The client has opened its GET stream, or gets later what is said before."""
        self.find_outlet: Callable[[], Outlet | None] = lambda: None
        """Returns what takes messages outside of calls, for the client's stream on any instance, if anything does."""
        self.writer: MessageWriteStream | None = None
        """The stream that goes to the client, once the transport is connected."""
        self._scope = anyio.CancelScope()

    def begin_with(self, replay: Replay, deadline: float) -> None:
        """Make it the loop of a restored copy.

        Args:
            replay: What is replayed before the client's messages are read.
            deadline: Moment, by anyio's clock, at which the server task is cancelled.
        """
        self.replay = replay
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

    def asks(self, item: SessionMessage, message: JSONRPCRequest) -> tuple[SessionMessage, Question]:
        """Return a question of the server as its client gets it, and as this copy knows it."""
        # An older one of this id was given up, or its answer would be taken for the answer to this one.
        self.forget(message.id)
        if len(self.asked) >= MAX_QUESTIONS:
            self._take(next(iter(self.asked)))
        metadata = item.metadata
        call = metadata.related_request_id if isinstance(metadata, ServerMessageMetadata) else None
        question_id = self.question_ids.new()
        question, item = as_asked(item, message, question_id, call, self.lull)
        self.asked[question_id] = question
        if question.outside:
            self.asked_outside += 1
            if self.asked_outside == 1:
                self.on_asked_outside()
        return item, question

    def withdraws(self, item: SessionMessage, message: JSONRPCNotification) -> SessionMessage | None:
        """Return the withdrawal of a question as the client gets it; `None`: the client knows of no such question."""
        request_id = cancelled_request_id_from_params(message.params)
        question_id = None if request_id is None else self.forget(request_id)
        if message.params is None or question_id is None:
            return None
        return renamed(item, params={**message.params, "requestId": question_id})

    def forget(self, request_id: RequestId) -> RequestId | None:
        """Forget the question that the copy knows by an id, and return the id that the client knows it by."""
        request_id = coerce_request_id(request_id)
        for question_id, question in reversed(self.asked.items()):
            if question.request_id == request_id:
                self._take(question_id)
                return question_id
        return None

    def _take(self, question_id: RequestId) -> Question | None:
        """Return a question by the id that the client knows it by, and forget it."""
        question = self.asked.pop(question_id, None)
        if question is not None and question.outside:
            self.asked_outside -= 1
            if self.asked_outside == 0:
                self.on_asked_outside()
        return question

    def answered(self, item: SessionMessage, message: JSONRPCResponse | JSONRPCError) -> SessionMessage | None:
        """Return an answer of the client as the server reads it; `None`: no question waits for it, and it is dropped.

        Otherwise the answer to the question of another copy might be taken for the answer to one of this copy's.
        """
        question = None if message.id is None else self._take(coerce_request_id(message.id))
        if question is None:
            self._on_dropped(MessageKind.ANSWER)
            return None
        return renamed(item, id=question.request_id)

    def progressed(self, item: SessionMessage, message: JSONRPCNotification) -> SessionMessage | None:
        """Return progress of the client as the server reads it; `None`: no question has its token, and it is dropped.

        A token that cannot be an id of ours was chosen by the application, and goes to it as it is.
        """
        token = as_request_id((message.params or {}).get("progressToken"))
        if message.params is None or token is None:
            return item
        token = coerce_request_id(token)
        question = self.asked.get(token)
        if question is not None and question.token is not None:
            return renamed(item, params={**message.params, "progressToken": question.token})
        if isinstance(token, str):
            return item
        self._on_dropped(MessageKind.PROGRESS)
        return None


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
                    if loop.mirrored is None or not loop.mirrored.has(message.id):
                        self._on_read(message.id)
                elif isinstance(message, JSONRPCNotification):
                    if loop.swallow_initialized and message.method == "notifications/initialized":
                        continue
                    if message.method == "notifications/progress":
                        progress = loop.progressed(received, message)
                        if progress is None:
                            continue
                        received = progress
                    self._on_read(None)
                else:
                    answer = loop.answered(received, message)
                    if answer is None:
                        continue
                    received = answer
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
        if loop.mirrored is not None and loop.mirrored.takes(item):
            return
        if type(message) is JSONRPCRequest:
            item, question = loop.asks(item, message)
            outlet = loop.find_outlet() if question.call is None else None
            if loop.replay is not None:
                loop.replay.asked()
                if outlet is None:
                    with anyio.move_on_after(STANDALONE_STREAM_WAIT):
                        await loop.standalone_stream_open.wait()
            if outlet is not None and await outlet.takes(item):
                return
            if not sdk.reaches_client(loop.transport, question.call):
                # The SDK would drop it, and its handler would wait for ever.
                loop.forget(message.id)
                raise NoBackChannelError(message.method)
        elif type(message) is JSONRPCNotification:
            if message.method == "notifications/cancelled":
                withdrawal = loop.withdraws(item, message)
                if withdrawal is None:
                    return
                item = withdrawal
            if _is_outside(item) and (outlet := loop.find_outlet()) is not None and await outlet.takes(item):
                return
        if loop.handshake is not None:
            self._settle(loop.handshake, message)
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


def _is_outside(item: SessionMessage) -> bool:
    """Return whether a message of the server's belongs to no call."""
    metadata = item.metadata
    return not isinstance(metadata, ServerMessageMetadata) or metadata.related_request_id is None
