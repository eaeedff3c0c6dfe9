"""What is read from an ASGI request before the SDK serves it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import anyio
from mcp.server.transport_security import RequestBodyLimitMiddleware
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["POSTED", "READ_AT_ONCE", "INITIALIZE", "BodyLimit", "ClientGone", "Incoming", "Posted"]

READ_AT_ONCE: Final = 64 * 1024
"""Bytes of a body that are read before it is known whether the request must wait; the rest stays with the client."""

INITIALIZE: Final = b'"initialize"'
"""Part of the body of each `initialize`; searched for, and not parsed, as the middleware releases a false positive."""

_VERSION: Final = MCP_PROTOCOL_VERSION_HEADER.encode()
_HANDSHAKE_VERSIONS: Final = frozenset(version.encode() for version in HANDSHAKE_PROTOCOL_VERSIONS)


class BodyLimit(RequestBodyLimitMiddleware):
    """The SDK's limit of bodies, but for requests within a session: the SDK reads each body before the request begins.

    Those are passed on unread, unless they say themselves that they are too long.

    Args:
        app: What serves requests.
        max_body_size: Bytes of a body at most.
        serve_sessionless: Has an app serve a request of a client without a session (2026-07-28 and later).
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_size: int,
        serve_sessionless: Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]],
    ) -> None:
        super().__init__(app, max_body_size)
        self._serve_sessionless = serve_sessionless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose body is not too long, or not read yet."""
        within_session = False
        version: bytes | None = None
        for name, value in scope["headers"] if scope["type"] == "http" else ():
            if name == b"mcp-session-id":
                within_session = True
            elif name == _VERSION:
                # The first one decides the era, in the SDK's manager too.
                version = value if version is None else version
            elif name == b"content-length" and int(value) > self.max_body_size:  # ASGI servers let numbers pass only
                break
        else:
            if within_session and (version is None or version in _HANDSHAKE_VERSIONS):
                await self.app(scope, receive, send)
                return
            if version is not None and version not in _HANDSHAKE_VERSIONS:
                await self._serve_sessionless(super().__call__, scope, receive, send)
                return
        await super().__call__(scope, receive, send)


class ClientGone(Exception):
    """The client of a request has disconnected before it was answered."""


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

    def _sending(self, message: Message) -> Awaitable[None]:
        if self.priming is not None and message["type"] == "http.response.start":
            return self._start(message, self.priming)
        return self._send(message)

    async def _start(self, message: Message, priming: bytes) -> None:
        await self._send(message)
        self.priming = None
        await self._send({"type": "http.response.body", "body": priming, "more_body": True})


POSTED: Final[ContextVar[Posted | None]] = ContextVar("mcp_session_store.posted", default=None)
"""The POST that the current task serves."""


class Incoming:
    """Body of one HTTP request, as far as it was read.

    Args:
        receive: ASGI receive of the request, of which nothing was taken.
    """

    __slots__ = ("_given_back", "_receive", "body", "gone", "whole")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._given_back = False
        self.body = b""
        """The part of the body that was read."""
        self.whole = False
        """The body was read to its end."""
        self.gone = False
        """The client has disconnected, as far as was read."""

    async def read(self, limit: int) -> None:
        """Read on until the body is whole, has more than `limit` bytes, or ends because the client has gone.

        What was read is kept if the call is cancelled.
        """
        if self.whole or self.gone:
            return
        parts: list[bytes] = []
        size = len(self.body) if self.body else 0
        try:
            while size <= limit:
                message = await self._receive()
                if message["type"] != "http.request":
                    self.gone = True
                    return
                part: bytes = message.get("body", b"")
                if not message.get("more_body"):
                    self.whole = True
                    if not size:
                        # One part, as a rule.
                        self.body = part
                        return
                    parts.append(part)
                    return
                parts.append(part)
                size += len(part)
        finally:
            if parts:
                self.body = b"".join((self.body, *parts))

    async def disconnected(self) -> None:
        """Wait until the client has gone: for ever where the body is not whole, because its rest comes first."""
        if not self.whole and not self.gone:
            await anyio.sleep_forever()
        while not self.gone:
            message = await self._receive()
            self.gone = message["type"] == "http.disconnect"

    async def receive(self) -> Message:
        """Give back what was read, as one message, then receive on: the `receive` for the SDK."""
        if not self._given_back:
            self._given_back = True
            if self.body or self.whole:
                return {"type": "http.request", "body": self.body, "more_body": not self.whole}
        if self.gone:
            return {"type": "http.disconnect"}
        return await self._receive()
