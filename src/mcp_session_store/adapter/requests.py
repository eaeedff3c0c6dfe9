"""What is taken from an ASGI request before the SDK serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

__all__ = ["again", "session_id_of", "whole"]


def session_id_of(scope: Scope) -> str | None:
    """The `Mcp-Session-Id` of a request."""
    for name, value in scope["headers"]:
        if name == b"mcp-session-id":
            decoded: str = value.decode("latin-1")
            return decoded
    return None


async def whole(message: Message, receive: Receive) -> Message:
    """The first message of a request, with the rest of its body, which the SDK waits for as well."""
    if not message.get("more_body"):
        return message
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            return message  # the client has left
        parts.append(message.get("body", b""))
    return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def again(message: Message, receive: Receive) -> Receive:
    """`receive`, with a message that was taken from it put back."""
    taken: Message | None = message

    async def again() -> Message:
        nonlocal taken
        if taken is not None:
            message, taken = taken, None
            return message
        return await receive()

    return again
