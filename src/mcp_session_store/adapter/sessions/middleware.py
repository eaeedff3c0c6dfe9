"""The one middleware of ours in `Server.middleware`: it stores what a restore replays, and notes handlers' returns."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, InitializeRequestParams

from mcp_session_store.adapter.outage import RequestWait
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER
from mcp_session_store.adapter.responses import SESSION_NOT_FOUND, answer_to
from mcp_session_store.adapter.sdk import session_id_of
from mcp_session_store.adapter.sessions.handshake import (
    HANDSHAKE,
    Handshake,
    HandshakeOutcome,
    InitializeParams,
    negotiated_version,
)
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION
from mcp_session_store.errors import JournalFull

if TYPE_CHECKING:
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp.server.lowlevel.server import Server
    from starlette.types import Scope

    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["CURRENT_SCOPE", "OUTSIDE", "SessionMiddleware", "install"]

logger = logging.getLogger(__name__)

_NO_SCOPE: Final[Scope] = {}

CURRENT_SCOPE: Final[ContextVar[Scope]] = ContextVar("mcp_session_store.current_scope")
"""ASGI scope of the message that is being handled: empty where no HTTP request brought it."""

OUTSIDE: Final[Scope] = {}
"""Scope of what runs outside of all messages."""


def install(server: Server[Any]) -> SessionMiddleware:
    """Make the session middleware the outermost one of the server, and return it; a second call changes nothing.

    Outermost, because what is stored is what the whole chain let through, and because a failure to
    store still vetoes the handshake: the SDK commits it only when the chain has succeeded.
    """
    found = next((entry for entry in server.middleware if isinstance(entry, SessionMiddleware)), None)
    others = [entry for entry in server.middleware if entry is not found]
    ours = found or SessionMiddleware(server.name)
    server.middleware[:] = [ours, *others]
    return ours


class SessionMiddleware:
    """Stores handshakes and journaled calls.

    Messages that are replayed, and those outside of a resident session (stdio, 2026-07-28), pass by.

    Args:
        server_name: Name of the server.
    """

    def __init__(self, server_name: str) -> None:
        self._server_name = server_name
        self._has_warned = False
        self.notes_scope = False
        """Whether `CURRENT_SCOPE` is set for each message, for what is not given a context."""

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        """Serve one message."""
        scope: Scope = getattr(ctx.request, "scope", _NO_SCOPE)
        if self.notes_scope:
            # Not reset: each message is handled in a context of its own.
            CURRENT_SCOPE.set(scope)
        session: ResidentSession | None = scope.get(RESIDENT_SESSION)
        if session is None:
            if ctx.method == "initialize" and not self._has_warned:
                self._warn_of_another_app(ctx, scope)
            return await call_next(ctx)
        try:
            handshake: Handshake | None = scope.get(HANDSHAKE)
            if ctx.method == "initialize" and ctx.request_id is not None:
                return await _store_handshake(ctx, call_next, session, handshake or Handshake())
            if not session.lifetime.used and ctx.request_id is not None and ctx.method != "ping":
                scope[RECORD_WRITER].on_first_use(session)
            if handshake is not None:
                handshake.settle(HandshakeOutcome.NOT_OPENED)
            if ctx.request_id is not None and ctx.method in scope[RECORD_WRITER].journal.methods:
                return await _store_call(ctx, call_next, session)
            return await call_next(ctx)
        finally:
            session.finished(ctx.request_id)

    def _warn_of_another_app(self, ctx: ServerRequestContext[Any, Any], scope: Scope) -> None:
        """Warn once when a client opens a session through an app that the server built itself, beside the durable one.

        Every example of the SDK ends with a `run()` that builds such an app.
        """
        # A session id stands on the connections of Streamable HTTP with sessions alone.
        if ctx.request is None or RESTORE_MARKER in scope or session_id_of(ctx) is None:
            return
        self._has_warned = True
        logger.warning(
            "a client opens a session with the server %r that is not durable, because it does not come through the app "
            "that durable_app returned: server.run(), streamable_http_app() and http_app() build another app; serve "
            "the one that durable_app returned, or write run_durable(server, url) in place of server.run()",
            self._server_name,
        )


async def _store_handshake(
    ctx: ServerRequestContext[Any, Any], call_next: CallNext, session: ResidentSession, handshake: Handshake
) -> HandlerResult:
    handshake.request_id = ctx.request_id
    session.loop.handshake = handshake
    writer = _writer_of(ctx)
    params = InitializeParams.encode(ctx.params, limit=writer.max_initialize_params)
    # Its body is the SDK's to read, which notices that the client goes.
    request = RequestWait("POST", held=len(params.text))
    result = await call_next(ctx)
    if isinstance(result, ErrorData):
        # A middleware may refuse by returning it; the SDK makes an error of it after the chain.
        raise MCPError.from_error_data(result)
    # A middleware that answers by itself has passed the SDK's own checks by.
    InitializeRequestParams.model_validate(ctx.params or {}, by_name=False)
    version = negotiated_version(result)
    if not version:
        raise MCPError(code=INTERNAL_ERROR, message="The server answered initialize without a protocolVersion")
    try:
        live = await writer.record_handshake(session, params, version, request)
    except Exception as error:
        answer = answer_to(error)
        handshake.settle(answer)
        raise MCPError(code=answer.code, message=answer.message) from error
    if not live:
        handshake.settle(SESSION_NOT_FOUND)
        raise MCPError(code=SESSION_NOT_FOUND.code, message=SESSION_NOT_FOUND.message)
    handshake.recorded = True
    return result


async def _store_call(
    ctx: ServerRequestContext[Any, Any], call_next: CallNext, session: ResidentSession
) -> HandlerResult:
    """Let a call set its state, and commit the call before it is answered."""
    writer = _writer_of(ctx)
    write = writer.journal.write(ctx.method, ctx.params)
    call = session.set_state.begin_own(write.name)
    try:
        result = await call_next(ctx)
        if isinstance(result, ErrorData):
            return result
        try:
            live = await writer.record_call(session, write, call, ctx.method, ctx.params)
        except JournalFull as error:
            raise MCPError(code=INVALID_REQUEST, message=str(error)) from error
        except Exception as error:
            answer = answer_to(error)
            raise MCPError(code=answer.code, message=answer.message) from error
    finally:
        session.set_state.end_own(call)
    if not live:
        raise MCPError(code=SESSION_NOT_FOUND.code, message=SESSION_NOT_FOUND.message)
    return result


def _writer_of(ctx: ServerRequestContext[Any, Any]) -> RecordWriter:
    request: Any = ctx.request
    writer: RecordWriter = request.scope[RECORD_WRITER]
    return writer
