"""The HTTP answer to a handshake, held back until the outcome of the handshake is decided."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import FAILED, Answer, response_to
from mcp_session_store.adapter.sessions.handshake import HANDSHAKE, Handshake, HandshakeOutcome
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Scope, Send

    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["HeldResponse"]

logger = logging.getLogger(__name__)


class HeldResponse:
    """The HTTP answer to a handshake.

    With SSE the SDK sends `http.response.start`, session id and all, before `initialize` has run.

    Args:
        session: The session, whose server loop handles the request.
        scope: ASGI scope of the request.
        incoming: Body of the request, which was read.
        send: Where the answer goes.
        opening: Whether the answer would give the client a session id that it does not know yet; the id is removed
            from each answer to a handshake that did not open the session.
    """

    __slots__ = (
        "_handshake",
        "_incoming",
        "_opening",
        "_replaced",
        "_scope",
        "_send",
        "_session",
        "_started",
        "opened",
    )

    def __init__(
        self, session: ResidentSession, scope: Scope, incoming: Incoming, send: Send, *, opening: bool
    ) -> None:
        self._handshake = Handshake()
        self._session = session
        self._scope = scope
        self._incoming = incoming
        self._send = send
        self._opening = opening
        self._started = Latch()
        self._replaced = False
        self.opened = False
        """The client was given its session id."""

    async def answered_by(self, serve: Callable[[Send], Awaitable[None]]) -> None:
        """Serve a request, and answer it if that ends without an answer.

        Args:
            serve: Serves the request with the `send` that it is given, which holds the answer back.
        """
        handshake, held = self._handshake, self._session.loop.held
        # For the middleware, which decides it, as the end of the loop does.
        self._scope[HANDSHAKE] = handshake
        held.add(handshake)
        try:
            await serve(self.send)
        except Exception:
            if self._started.is_set() and not self._replaced:
                raise
            logger.exception("a handshake of the session %s could not be served", session_key(self._session.session_id))
        finally:
            held.discard(handshake)
        if not self._started.is_set():
            await self._replace(FAILED)

    async def send(self, message: Message) -> None:
        """Pass on, hold, or replace one ASGI message of the answer."""
        if message["type"] != "http.response.start":
            # A ping of a slow handshake must not overtake its header.
            await self._started.wait()
            if not self._replaced:
                await self._send(message)
            return
        # Only a request that was accepted is answered 200; any other status decides by itself, unless it is the
        # SDK's, for a session that was closed because the handshake failed.
        status = message["status"]
        outcome = await self._handshake.wait() if status == 200 else self._handshake.outcome
        if self._opening and status >= 500 and not isinstance(outcome, Answer):
            # The SDK's answer, for a server loop or an event store that failed.
            outcome = FAILED
        if isinstance(outcome, Answer):
            await self._replace(outcome)
            return
        stored = outcome is HandshakeOutcome.STORED
        if self._opening and not stored:
            message = {**message, "headers": _without_session_id(message.get("headers", ()))}
        self.opened = self._opening and stored
        await self._send(message)
        self._started.set()

    async def _replace(self, answer: Answer) -> None:
        self._replaced = True
        self._started.set()
        response = response_to(answer, self._scope, self._incoming.body)
        await response(self._scope, self._incoming.receive, self._send)


def _without_session_id(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() != b"mcp-session-id"]
