"""The GET stream of a copy: a client that opens it anew takes it over, with all that waits on it."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final

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
    from collections.abc import AsyncIterator

    from anyio.streams.memory import MemoryObjectReceiveStream
    from mcp.server.transport_security import TransportSecurityMiddleware
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from mcp_session_store.adapter.sdk import TransportStream, TransportStreams

__all__ = ["StandaloneStream", "event_stream", "stream_refusal"]

TAKEN_AT_MOST: Final = 5
"""Number of times that a stream is taken over within `TAKEN_WITHIN`."""
TAKEN_WITHIN: Final = 10.0
"""Seconds in which clients that take a stream from one another again and again are noticed."""


class StandaloneStream:
    """The GET stream of one copy of a session, which one connection has at a time.

    The SDK refuses a second one for as long as the first is open. Where a proxy holds a dead connection open, that
    locks a client out of its own stream. Here the newer connection is served and the older one is closed. Each message
    goes to one of them (MCP 2025-11-25, basic/transports, multiple connections): what the older one has not taken waits
    for the newer one.

    Args:
        streams: Streams of the SDK's transport.
    """

    __slots__ = ("_opened", "_streams", "_taken")

    def __init__(self, streams: TransportStreams) -> None:
        self._streams = streams
        self._opened: TransportStream | None = None
        """The stream that was opened last here."""
        self._taken: deque[float] = deque(maxlen=TAKEN_AT_MOST)
        """When it was taken over the last times, by `clock`."""

    @property
    def is_open(self) -> bool:
        """Whether a connection has it for which the transport's messages wait."""
        return GET_STREAM_KEY in self._streams

    def may_be_taken(self) -> bool:
        """Note that an open stream is about to be taken over; return whether it may be.

        Two clients of one session that reconnect would take it from each other for ever.
        """
        now = clock.now()
        if len(self._taken) == TAKEN_AT_MOST and now - self._taken[0] < TAKEN_WITHIN:
            return False
        self._taken.append(now)
        return True

    async def serve(
        self, session_id: str, security: TransportSecurityMiddleware, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a GET that opens the stream, as the SDK's transport does.

        Args:
            session_id: Id of the session.
            security: Check of the request, because the SDK's transport, which would check it, does not see it.
            scope: ASGI scope of the request.
            receive: ASGI receive of the request.
            send: ASGI send of the request.
        """
        response = await stream_refusal(Request(scope, receive), security)
        if response is None and self.is_open and not (self._is_ours and self.may_be_taken()):
            response = responses.ONE_STREAM.response()
        if response is not None:
            await response(scope, receive, send)
            return
        opened = self._open()
        try:
            await event_stream(_messages(opened[1]), session_id)(scope, receive, send)
        finally:
            if self._streams.get(GET_STREAM_KEY) is opened:
                del self._streams[GET_STREAM_KEY]
                # Or a transport that waits for room would close the next stream.
                _drain(opened[1])
            for end in opened:
                end.close()

    @property
    def _is_ours(self) -> bool:
        # The transport opens it for a client that resumes it from an event store of the user's, and would close the
        # newer one with its own.
        return self._streams.get(GET_STREAM_KEY) is self._opened

    def _open(self) -> TransportStream:
        """Return a stream in the place of the open one, which ends, with all that waits there."""
        waiting: list[EventMessage] = []
        if self.is_open:
            sending, receiving = self._streams[GET_STREAM_KEY]
            waiting = _drain(receiving)
            sending.close()
        opened = self._opened = anyio.create_memory_object_stream[EventMessage](
            max(REQUEST_STREAM_BUFFER_SIZE, len(waiting))
        )
        for message in waiting:
            opened[0].send_nowait(message)
        self._streams[GET_STREAM_KEY] = opened
        return opened


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


def _drain(stream: MemoryObjectReceiveStream[EventMessage]) -> list[EventMessage]:
    """Take what waits on a stream, that for which the transport waits to have room included."""
    waiting = []
    with contextlib.suppress(anyio.WouldBlock):
        while True:
            waiting.append(stream.receive_nowait())
    return waiting


async def _messages(opened: MemoryObjectReceiveStream[EventMessage]) -> AsyncIterator[dict[str, Any] | bytes]:
    with contextlib.suppress(anyio.ClosedResourceError):  # closed by the server between two messages
        async for message in opened:
            event = {"event": "message", "data": message.message.model_dump_json(by_alias=True, exclude_unset=True)}
            yield {**event, "id": message.event_id} if message.event_id else event
