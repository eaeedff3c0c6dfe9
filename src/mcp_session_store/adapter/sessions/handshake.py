"""A genuine `initialize`: what is stored of it, and the HTTP answer that waits for the commit."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS
from pydantic import BaseModel

from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import session_not_found, too_many_sessions, unavailable
from mcp_session_store.records import display_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from mcp.server.context import HandlerResult
    from mcp_types import RequestId
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

__all__ = [
    "DEFAULT_MAX_INITIALIZE_PARAMS",
    "HANDSHAKE",
    "Handshake",
    "HandshakeOutcome",
    "HeldResponse",
    "InitializeParams",
    "held_handshake",
    "negotiated_version",
]

logger = logging.getLogger(__name__)

DEFAULT_MAX_INITIALIZE_PARAMS: Final = 64 * 1024
"""Bytes of `initialize` params that are stored for a session, unless configured."""


HANDSHAKE: Final = "mcp_session_store.handshake"
"""Where a request's ASGI scope holds the handshake that its HTTP answer waits for."""


class HandshakeOutcome(Enum):
    """What became of a handshake."""

    STORED = auto()
    """The record is committed: the client may learn its session id."""
    NOT_OPENED = auto()
    """It was answered with an error, or it was none: the answer goes out as it is."""
    UNAVAILABLE = auto()
    """The record could not be written: 503."""
    TOO_MANY = auto()
    """The retention policy allows no more sessions: 503."""
    NOT_FOUND = auto()
    """It was a second one, in a session that has ended meanwhile: 404."""


class Handshake:
    """One `initialize` on its way through the server."""

    def __init__(self) -> None:
        self.request_id: RequestId | None = None
        self.recorded = False
        """The record is committed."""
        self.outcome: HandshakeOutcome | None = None
        self._settled = Latch()

    def settle(self, outcome: HandshakeOutcome) -> None:
        """Decide the outcome, once."""
        if self.outcome is None:
            self.outcome = outcome
            self._settled.set()

    async def wait(self) -> HandshakeOutcome:
        """The outcome, when it is decided."""
        await self._settled.wait()
        assert self.outcome is not None
        return self.outcome


def held_handshake(request: Any) -> Handshake | None:
    """The handshake that the HTTP answer to this request waits for, if it waits for one."""
    handshake = request.scope.get(HANDSHAKE)
    return handshake if isinstance(handshake, Handshake) else None


_REFUSALS: Final[dict[HandshakeOutcome | None, Callable[[], Response]]] = {
    HandshakeOutcome.UNAVAILABLE: unavailable,
    HandshakeOutcome.TOO_MANY: too_many_sessions,
    HandshakeOutcome.NOT_FOUND: session_not_found,
}


class HeldResponse:
    """The HTTP answer to a handshake, held back until it is known what became of it.

    With SSE the SDK sends `http.response.start`, session id and all, before `initialize` has run.

    Args:
        handshake: Decides.
        scope: The request's ASGI scope.
        receive: The request's.
        send: Where the answer goes.
        opening: The answer would tell the client a session id that it does not know yet; it is
            taken out of every answer to a handshake that did not open the session.
    """

    def __init__(self, handshake: Handshake, scope: Scope, receive: Receive, send: Send, *, opening: bool) -> None:
        self._handshake = handshake
        self._scope = scope
        self._receive = receive
        self._send = send
        self._opening = opening
        self._started = Latch()
        self._replaced = False
        self.opened = False
        """The client was told its session id."""

    async def answered_by(self, serve: Callable[[Send], Awaitable[None]]) -> None:
        """Have a request served, and answer it if that ends without an answer.

        Args:
            serve: Serves the request, and gets the `send` that holds its answer.
        """
        try:
            await serve(self.send)
        except Exception:
            if self._started.is_set() and not self._replaced:
                raise
            logger.exception("a request could not be served")
        if not self._started.is_set():
            await self._replace(unavailable())

    async def send(self, message: Message) -> None:
        """Pass on, hold, or replace one ASGI message of the answer."""
        if message["type"] != "http.response.start":
            # A ping of a slow handshake must not overtake its header.
            await self._started.wait()
            if not self._replaced:
                await self._send(message)
            return
        # Only a request that was accepted is answered 200; any other status decides by itself, unless
        # it is the SDK's for a session that was closed by what befell the handshake.
        status = message["status"]
        outcome = await self._handshake.wait() if status == 200 else self._handshake.outcome
        if self._opening and status >= 500 and outcome not in _REFUSALS:
            # The SDK's, for a server loop or an event store that failed.
            outcome = HandshakeOutcome.UNAVAILABLE
        if (refusal := _REFUSALS.get(outcome)) is not None:
            await self._replace(refusal())
            return
        stored = outcome is HandshakeOutcome.STORED
        if self._opening and not stored:
            message = {**message, "headers": _without_session_id(message.get("headers", ()))}
        self.opened = self._opening and stored
        await self._send(message)
        self._started.set()

    async def _replace(self, response: Response) -> None:
        self._replaced = True
        self._started.set()
        await response(self._scope, self._receive, self._send)


def _without_session_id(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"mcp-session-id"]


@dataclass(frozen=True, slots=True)
class InitializeParams:
    """The params of an `initialize`, in the form in which they are stored."""

    text: str
    client_name: str
    client_version: str

    @classmethod
    def encode(cls, params: Mapping[str, Any] | None, *, limit: int) -> InitializeParams:
        """Write raw params as JSON text.

        Args:
            params: As the client sent them, unknown fields included.
            limit: How many bytes are stored at most.

        Raises:
            MCPError: INVALID_PARAMS; the message names what cannot be stored.
        """
        try:
            # ASCII, so that `\u0000` and lone surrogates stay escapes, which any database keeps.
            text = json.dumps(params, allow_nan=False, separators=(",", ":"))
        except (ValueError, RecursionError):
            raise MCPError(
                code=INVALID_PARAMS,
                message="The params of initialize hold a number that is not finite or too long, or are nested too "
                "deeply, and cannot be stored; send finite numbers in flat structures",
            ) from None
        if len(text) > limit:
            raise MCPError(
                code=INVALID_PARAMS,
                message=f"The params of initialize have {len(text)} bytes as JSON, and this server stores at most "
                f"{limit}; declare less in capabilities, clientInfo and _meta",
            )
        client = (params or {}).get("clientInfo")
        info: Mapping[str, Any] = client if isinstance(client, dict) else {}
        return cls(
            text=text,
            client_name=display_text(info.get("name")),
            client_version=display_text(info.get("version")),
        )


def negotiated_version(result: HandlerResult) -> str:
    """The protocol version in an `initialize` result, in whichever form the middleware chain returns it."""
    if isinstance(result, BaseModel):
        result = result.model_dump(by_alias=True, mode="json")
    version = (result or {}).get("protocolVersion")
    return version if isinstance(version, str) else ""
