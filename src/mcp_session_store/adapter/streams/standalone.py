"""The GET stream of a copy: a client that opens it anew takes it over, with all that waits on it."""

from __future__ import annotations

import contextlib
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
from mcp.server.streamable_http import (
    GET_STREAM_KEY,
    REQUEST_STREAM_BUFFER_SIZE,
    EventMessage,
    check_accept_headers,
)
from sse_starlette import EventSourceResponse
from starlette.requests import Request

from mcp_session_store.adapter import clock, responses

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.streams.memory import MemoryObjectReceiveStream
    from mcp.server.transport_security import TransportSecurityMiddleware
    from mcp_types import JSONRPCMessage
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from mcp_session_store.adapter.sdk import TransportStream, TransportStreams
    from mcp_session_store.adapter.streams.hold import Hold

__all__ = ["StandaloneStream", "event_stream", "stream_refusal"]

TAKEN_AT_MOST: Final = 5
"""Number of times that a stream is taken over within `TAKEN_WITHIN`."""
TAKEN_WITHIN: Final = 10.0
"""Seconds in which clients that take a stream from one another again and again are noticed."""

RESUMED_INTERVAL: Final = 0.05
"""Seconds between two looks whether the transport has resumed the stream."""


class StandaloneStream:
    """The GET stream of one copy of a session, which one connection has at a time.

    The SDK refuses a second one for as long as the first is open. Where a proxy holds a dead connection open, that
    locks a client out of its own stream. Here the newer connection is served and the older one is closed. Each message
    goes to one of them (MCP 2025-11-25, basic/transports, multiple connections): what the older one has not taken waits
    for the newer one.

    Args:
        streams: Streams of the SDK's transport.
    """

    __slots__ = ("_opened", "_streams", "hold", "on_closed", "on_opened", "on_received", "taken")

    def __init__(self, streams: TransportStreams) -> None:
        self._streams = streams
        self._opened: TransportStream | None = None
        """The stream that was opened last here."""
        self.taken: deque[float] = deque(maxlen=TAKEN_AT_MOST)
        """When it was taken over the last times, by `clock`, as far as this instance knows."""
        self.hold: Hold | None = None
        """This instance's last hold of the stream, where other instances may have it."""
        self.on_opened: Callable[[], None] | None = None
        """Called when a response opens the stream that no other one here has."""
        self.on_received: Callable[[JSONRPCMessage], bool] | None = None
        """Called with each message that a response takes; returns whether the response is to send it."""
        self.on_closed: Callable[[], None] | None = None
        """Called when the response has ended, and no other one here has taken the stream over."""

    @property
    def is_open(self) -> bool:
        """Whether a connection has it for which the transport's messages wait."""
        return GET_STREAM_KEY in self._streams

    @property
    def is_full(self) -> bool:
        """Whether the connection does not take what waits for it."""
        stream = self._streams.get(GET_STREAM_KEY)
        return stream is not None and stream[0].statistics().current_buffer_used >= REQUEST_STREAM_BUFFER_SIZE // 2

    def close(self) -> None:
        """End the open response, with what it has taken."""
        if (opened := self._streams.pop(GET_STREAM_KEY, None) or self._opened) is not None:
            self._end(opened)

    def may_be_taken(self) -> bool:
        """Note that an open stream is about to be taken over; return whether it may be.

        Two clients of one session that reconnect would take it from each other for ever.
        """
        if self._is_fought_for:
            return False
        self.taken.append(clock.now())
        return True

    @property
    def _is_fought_for(self) -> bool:
        return len(self.taken) == TAKEN_AT_MOST and clock.now() - self.taken[0] < TAKEN_WITHIN

    @property
    def is_refused(self) -> bool:
        """Whether clients take the stream from each other again and again, and another instance had it last."""
        return self.hold is not None and self.hold.is_lost and self._is_fought_for

    async def serve(
        self,
        session_id: str,
        security: TransportSecurityMiddleware,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        hold: Callable[[], Hold] | None = None,
    ) -> None:
        """Serve a GET that opens the stream, as the SDK's transport does.

        Args:
            session_id: Id of the session.
            security: Check of the request, because the SDK's transport, which would check it, does not see it.
            scope: ASGI scope of the request.
            receive: ASGI receive of the request.
            send: ASGI send of the request.
            hold: Notes that the stream is opened here; `None` where no other instance may have it.
        """
        response = await stream_refusal(Request(scope, receive), security)
        if response is None and self.is_open and not (self._is_ours and self.may_be_taken()):
            response = responses.ONE_STREAM.response()
        if response is not None:
            await response(scope, receive, send)
            return
        opened = self._open()
        held = None if hold is None else hold()
        try:
            await event_stream(self._messages(opened[1]), session_id)(scope, receive, send)
        finally:
            if held is not None:
                held.is_open = False
            if self._streams.get(GET_STREAM_KEY) is opened:
                del self._streams[GET_STREAM_KEY]
            if self._opened is opened:
                self._end(opened)
            opened[1].close()

    async def serve_resumed(self, serve: Callable[[], Awaitable[None]], hold: Callable[[], Hold] | None) -> None:
        """Have the transport resume a stream from an event store of the user's, which may be this one.

        Args:
            serve: Has the transport serve the request.
            hold: See `serve`.
        """
        if hold is None or self.is_open:
            await serve()
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hold_resumed, hold)
            await serve()
            tasks.cancel_scope.cancel()

    async def _hold_resumed(self, hold: Callable[[], Hold]) -> None:
        # Which stream it is only the store knows, and the transport says nothing of it.
        while not self.is_open:  # noqa: ASYNC110 - it has no event for it
            await anyio.sleep(RESUMED_INTERVAL)
        if self.on_opened is not None:
            self.on_opened()
        held = hold()
        try:
            await anyio.sleep_forever()
        finally:
            held.is_open = False
            if self.on_closed is not None:
                self.on_closed()

    def _end(self, opened: TransportStream) -> None:
        """End a stream, which no response has any more."""
        with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                opened[1].receive_nowait()  # so that the transport does not wait for room
        opened[0].close()
        if self._opened is opened:
            self._opened = None
            if self.on_closed is not None:
                self.on_closed()

    async def _messages(self, opened: MemoryObjectReceiveStream[EventMessage]) -> AsyncIterator[dict[str, Any] | bytes]:
        with contextlib.suppress(anyio.ClosedResourceError):  # closed by the server between two messages
            async for message in opened:
                if self.on_received is not None and not self.on_received(message.message):
                    continue
                event = {"event": "message", "data": message.message.model_dump_json(by_alias=True, exclude_unset=True)}
                yield {**event, "id": message.event_id} if message.event_id else event

    @property
    def _is_ours(self) -> bool:
        # The transport opens it for a client that resumes it from an event store of the user's, and would close the
        # newer one with its own.
        return self._streams.get(GET_STREAM_KEY) is self._opened

    def _open(self) -> TransportStream:
        """Return the stream for a new response. That which has the stream ends, and leaves what waits there to it."""
        older = self._streams.get(GET_STREAM_KEY)
        if older is not None:
            # The transport may be about to write to it.
            opened = older[0], older[1].clone()
            older[1].close()
        else:
            if self._opened is not None:
                self._end(self._opened)  # the transport has closed it, and its response has not ended yet
            opened = anyio.create_memory_object_stream[EventMessage](REQUEST_STREAM_BUFFER_SIZE)
            cast("Any", opened[0]).send = partial(_send, opened[0].send)
        self._streams[GET_STREAM_KEY] = self._opened = opened
        if older is None and self.on_opened is not None:
            self.on_opened()
        return opened


async def _send(send: Callable[[EventMessage], Awaitable[None]], message: EventMessage) -> None:
    # The transport would remove the stream from its table, where there may be a later one meanwhile.
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        await send(message)


async def stream_refusal(request: Request, security: TransportSecurityMiddleware) -> Response | None:
    """Return the refusal of a GET that the SDK's transport would refuse as well; `None` for any other."""
    refusal = await security.validate_request(request, is_post=False)
    if refusal is None and not check_accept_headers(request)[1]:
        refusal = responses.NOT_ACCEPTABLE.response()
    return refusal


def event_stream(messages: AsyncIterator[dict[str, Any] | bytes], session_id: str) -> Response:
    """Return the response that sends messages as SSE, with the headers of the SDK's transport."""
    headers = {"Cache-Control": "no-cache, no-transform", "mcp-session-id": session_id}
    return EventSourceResponse(messages, headers=headers)
