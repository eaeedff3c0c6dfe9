"""What is read from an ASGI request before the SDK serves it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

__all__ = ["POSTED", "Posted", "may_initialize", "read_body", "replayed_receive", "session_id_of"]


class Posted:
    """POST that is being served, for the event store, to which the SDK gives a request id as text only.

    Args:
        body: Body of the request.
    """

    __slots__ = ("_send", "body", "priming")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.priming: bytes | None = None
        """Priming event of the call as SSE, a part of the answer's body that precedes what the SDK sends."""

    def sending_to(self, send: Send) -> Send:
        """Return the `send` for the SDK."""
        self._send = send
        return self._sending

    async def _sending(self, message: Message) -> None:
        await self._send(message)
        if self.priming is not None and message["type"] == "http.response.start":
            body, self.priming = self.priming, None
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


POSTED: Final[ContextVar[Posted | None]] = ContextVar("mcp_session_store.posted", default=None)
"""The POST that the current task serves."""


def session_id_of(scope: Scope) -> str | None:
    """Return the `Mcp-Session-Id` of a request."""
    for name, value in scope["headers"]:
        if name == b"mcp-session-id":
            decoded: str = value.decode("latin-1")
            return decoded
    return None


def may_initialize(message: Message) -> bool:
    """Return whether a request whose body begins with this message may be an `initialize`."""
    # Search the body instead of parsing it; the middleware releases a false positive.
    return b'"initialize"' in message.get("body", b"")


async def read_body(message: Message, receive: Receive) -> Message:
    """Return the first message of a request with the rest of its body, which the SDK waits for as well."""
    if not message.get("more_body"):
        return message
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            return message  # the client has disconnected
        parts.append(message.get("body", b""))
    return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def replayed_receive(message: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives back a message that was taken from it, then goes on."""
    taken: Message | None = message

    async def replayed() -> Message:
        nonlocal taken
        if taken is not None:
            message, taken = taken, None
            return message
        return await receive()

    return replayed
