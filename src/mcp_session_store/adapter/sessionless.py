"""Requests of clients without a session (2026-07-28 and later): a stop answers those that are not over in time.

The SDK serves them itself, without a query and without a wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from mcp_types import JSONRPCRequest, jsonrpc_message_adapter

from mcp_session_store.adapter.responses import CALL_LOST, response_to

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SessionlessRequests"]

LAST_ANSWER = 1.0
"""Seconds that a client has to read the last answer."""


class SessionlessRequests:
    """The requests without a session that are being served."""

    def __init__(self) -> None:
        self._open: set[_Exchange] = set()

    def __len__(self) -> int:
        return len(self._open)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have an app serve a request."""
        exchange = _Exchange(scope, receive, send)
        self._open.add(exchange)
        try:
            with exchange.handling:
                await app(scope, exchange.receive, exchange.send)
            if exchange.is_lost:
                await exchange.answered.wait()
        except anyio.get_cancelled_exc_class():
            # A thread cannot be cancelled, so that the server cancels the request. Its client has the answer.
            if not exchange.answered.is_set():
                raise
        finally:
            self._open.discard(exchange)

    async def lose(self) -> None:
        """Answer the calls that still run as lost, and cancel them."""
        async with anyio.create_task_group() as tasks:
            for exchange in list(self._open):
                tasks.start_soon(exchange.lose)


class _Exchange:
    """One request and its answer."""

    __slots__ = (
        "_is_complete",
        "_is_stream",
        "_parts",
        "_receive",
        "_scope",
        "_send",
        "answered",
        "handling",
        "is_lost",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._parts: list[bytes] = []
        """The body, as far as it was read."""
        self._is_stream: bool | None = None
        """Whether the answer is a stream; `None` before it has begun."""
        self._is_complete = False
        self.handling = anyio.CancelScope()
        self.is_lost = False
        """Whether the answer is the error of a lost call, and what the handler still says is dropped."""
        self.answered = anyio.Event()
        """Set when the client of a lost call was answered."""

    async def receive(self) -> Message:
        message = await self._receive()
        if body := message.get("body"):
            self._parts.append(body)
        return message

    async def send(self, message: Message) -> None:
        if self.is_lost:
            return
        if message["type"] == "http.response.start":
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        elif not message.get("more_body"):
            self._is_complete = True
        await self._send(message)

    async def lose(self) -> None:
        """Answer a call that still runs as lost, and cancel it. A thread that it waits for may run on."""
        if self._is_complete or self._is_stream is False:
            return
        self.is_lost = True
        self.handling.cancel()
        try:
            with anyio.move_on_after(LAST_ANSWER):
                body = b"".join(self._parts)
                if self._is_stream is None:
                    await response_to(CALL_LOST, self._scope, body)(self._scope, self._receive, self._send)
                    return
                # Only the answer to a request is a stream.
                request = jsonrpc_message_adapter.validate_json(body, by_name=False)
                assert isinstance(request, JSONRPCRequest)
                event = CALL_LOST.response_with_id(request.id, as_event=True).body
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            self.answered.set()
