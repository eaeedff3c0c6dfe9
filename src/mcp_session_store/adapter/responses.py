"""The HTTP answers that the session layer gives itself: which error gets which of them, by the kind of the request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import pydantic_core
from mcp.server.streamable_http import check_accept_headers
from mcp_types import (
    CONNECTION_CLOSED,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from mcp_session_store.errors import (
    RecordUnreadable,
    SchemaError,
    SessionLimitReached,
    SessionStoreError,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcp_types import RequestId
    from starlette.types import Message, Scope, Send

    from mcp_session_store.adapter.requests import Incoming

__all__ = [
    "BAD_EVENT_ID",
    "CALL_LOST",
    "FAILED",
    "LIFESPAN_NOT_ENTERED",
    "LOST",
    "MEMORY_FULL",
    "METHOD_NOT_ALLOWED",
    "NOT_ACCEPTABLE",
    "NOT_RUNNING",
    "ONE_STREAM",
    "RESTORE_FAILED",
    "SCHEMA",
    "SESSION_ENDED",
    "SESSION_NOT_FOUND",
    "SHUTTING_DOWN",
    "STREAM_COMPLETE",
    "TOO_MANY_SESSIONS",
    "UNAVAILABLE",
    "Answer",
    "MemoryFull",
    "RestoreFailed",
    "SessionNotFound",
    "ShuttingDown",
    "TooManyWait",
    "WhyNotFound",
    "answer_to",
    "answering_lost_calls",
    "response_to",
    "session_ended",
    "too_large",
]

SESSION_ENDED: Final = "Session ended"
"""Message of the JSON-RPC error for the calls that were in flight when their session ended."""

LOST: Final = "The call was lost: the server that ran it is gone. It was not run again."
"""Message of the JSON-RPC error for a call whose session goes on."""

_RETRY_AFTER: Final = {"retry-after": "2"}
"""Seconds that `Retry-After` (RFC 9110, section 10.2.3) asks for."""
_STREAM: Final = {"cache-control": "no-cache, no-transform"}
"""Headers of a stream, as the SDK's transport sends them."""


WhyNotFound: TypeAlias = Literal[
    "unknown",
    "malformed",
    "ended",
    "expired",
    "another principal",
    "refused",
    "other version",
    "replay failed",
]
"""Why a session is not found, which metrics and logs know and no client."""


class SessionNotFound(Exception):
    """The session is unknown, ended, expired, or of another namespace or principal: all the same to the client.

    Args:
        reason: Which of these.
    """

    def __init__(self, reason: WhyNotFound = "unknown") -> None:
        super().__init__(reason)
        self.reason: Final[WhyNotFound] = reason


class MemoryFull(Exception):
    """There are as many copies of sessions in memory as there may be, and all are in use."""


class TooManyWait(StoreUnavailable):
    """The store is away, and as many requests wait for it as may."""


class RestoreFailed(SessionStoreError):
    """A session cannot be restored here for now, and not because of the store; its record is as it was."""


class ShuttingDown(SessionStoreError):
    """The instance stops, and serves this request no more."""

    def __init__(self) -> None:
        super().__init__("the manager is shutting down")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets instead of being served: an HTTP answer with a JSON-RPC error in it."""

    status: int
    """HTTP status; where it is 503, a JSON-RPC request gets 200 instead, see `response_to`."""
    code: int
    """Code of the JSON-RPC error."""
    message: str
    """Message of the JSON-RPC error."""
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    """Reason by which the metric of refused requests counts it."""
    lost: bool = False
    """Whether it answers a call that a handler may have seen."""

    @property
    def for_now(self) -> bool:
        """Whether the same request may be served later."""
        return self.status == 503

    def response(self) -> Response:
        """Return the answer as an ASGI application."""
        error = self._error(None, self.message)
        return Response(error, status_code=self.status, headers=self.headers, media_type="application/json")

    def response_with_id(self, request_id: RequestId, *, as_event: bool) -> Response:
        """Return the answer to a JSON-RPC request in a 200 response.

        Args:
            request_id: Id of the request.
            as_event: Whether it is sent as the one event of a stream.
        """
        error = self._error(request_id, self.message if self.lost else f"The request was not handled: {self.message}")
        if as_event:
            return Response(f"event: message\r\ndata: {error}\r\n\r\n", headers=_STREAM, media_type="text/event-stream")
        return Response(error, media_type="application/json")

    def _error(self, request_id: RequestId | None, message: str) -> str:
        data = ErrorData(code=self.code, message=message)
        if self.lost:
            data.data = {"reason": "lost"}
        error = JSONRPCError(jsonrpc="2.0", id=request_id, error=data)
        return error.model_dump_json(by_alias=True, exclude_unset=True)


def _for_now(reason: str, message: str) -> Answer:
    """Return the answer to a request that is refused for now, and leaves the session as it was."""
    return Answer(503, INTERNAL_ERROR, f"{message}; try again later", _RETRY_AFTER, reason)


SESSION_NOT_FOUND: Final = Answer(404, INVALID_REQUEST, "Session not found", reason="not found")
"""The same words for a session that is unknown, ended, expired or another principal's.

MCP 2025-11-25, basic/transports, session management, 3: the client starts a new session.
"""
UNAVAILABLE: Final = _for_now("unavailable", "Session store unavailable")
"""The store is away, busy or closed."""
SCHEMA: Final = _for_now("schema", "Session store unavailable")
"""The schema of the database does not fit."""
MEMORY_FULL: Final = _for_now("memory full", "Too many open sessions")
"""Memory holds as many sessions as it may, and all are in use."""
TOO_MANY_SESSIONS: Final = _for_now("too many sessions", "Too many open sessions")
"""The policy allows no more sessions."""
RESTORE_FAILED: Final = _for_now("restore failed", "Session cannot be restored now")
"""The replay took too long, the record kept changing, or an earlier copy does not stop."""
SHUTTING_DOWN: Final = _for_now("shutting down", "Server is shutting down")
"""The instance stops."""
NOT_RUNNING: Final = _for_now("", "Server is not running")
"""The lifespan of the app was not entered; no metric counts it, because no manager runs."""
FAILED: Final = _for_now("error", "Internal error")
"""A bug of ours, or of the application's in a restore."""
CALL_LOST: Final = Answer(503, CONNECTION_CLOSED, LOST, _RETRY_AFTER, lost=True)
"""The copy that ran the call has left memory, or its server loop has crashed."""
METHOD_NOT_ALLOWED: Final = Answer(405, INVALID_REQUEST, "Method Not Allowed", {"allow": "GET, POST, DELETE"})
"""The transport speaks POST, GET and DELETE."""
BAD_EVENT_ID: Final = Answer(400, INVALID_REQUEST, "Last-Event-ID is not an event id of this session")
"""The session never gave this `Last-Event-ID`, whichever other session may have.

Not 404, which ends the session (MCP 2025-11-25, basic/transports, session management). The specification names no
answer; every client that was tried gives up after a few, and 200 without a response makes them come back for ever.
"""
STREAM_COMPLETE: Final = Answer(405, INVALID_REQUEST, "The stream is complete", {"allow": "POST, DELETE"})
"""The client comes back for a call whose answer it has; the same as where no stream can be had.

MCP 2025-11-25, basic/transports, listening for messages from the server. Clients take it for an end without error.
"""
NOT_ACCEPTABLE: Final = Answer(406, INVALID_REQUEST, "Not Acceptable: Client must accept text/event-stream")
"""A stream comes as `text/event-stream`."""
ONE_STREAM: Final = Answer(409, INVALID_REQUEST, "Conflict: Only one SSE stream is allowed per session")
"""The session's standalone stream is open already, as the SDK's transport answers it."""

_BY_ERROR: Final[tuple[tuple[type[Exception], Answer], ...]] = (
    (SessionNotFound, SESSION_NOT_FOUND),
    (MemoryFull, MEMORY_FULL),
    (SessionLimitReached, TOO_MANY_SESSIONS),
    # As an unknown session: the client can begin anew, and trying again would not help.
    (RecordUnreadable, SESSION_NOT_FOUND),
    (RestoreFailed, RESTORE_FAILED),
    (ShuttingDown, SHUTTING_DOWN),
    (SchemaError, SCHEMA),
    (SessionStoreError, UNAVAILABLE),
    (Exception, FAILED),
)


def answer_to(error: Exception) -> Answer:
    """Return the answer to a request that failed with an error."""
    return next(answer for kind, answer in _BY_ERROR if isinstance(error, kind))


def response_to(answer: Answer, scope: Scope, body: bytes | None) -> Response:
    """Return the response that gives one request its answer.

    A JSON-RPC request that is refused for now gets 200 and an error with its id, because this fails that one call in
    every client, while 503 ends some clients as a whole. An `initialize` gets 503, as a session that was not opened
    leaves nothing to go on in; so do messages that have no answer in JSON-RPC.

    Args:
        answer: The answer.
        scope: ASGI scope of the request.
        body: Whole body of the request; `None` if it was not read.
    """
    if not answer.for_now or scope["method"] != "POST" or body is None:
        return answer.response()
    # A body that is no message gets the SDK's own answer, as after the outage.
    try:
        message = jsonrpc_message_adapter.validate_python(pydantic_core.from_json(body), by_name=False)
    except ValidationError as error:
        return Answer(400, INVALID_PARAMS, f"Validation error: {error}").response()
    except ValueError as error:
        return Answer(400, PARSE_ERROR, f"Parse error: {error}").response()
    if not isinstance(message, JSONRPCRequest) or message.method == "initialize":
        return answer.response()
    accepts_json, accepts_events = check_accept_headers(Request(scope))
    return answer.response_with_id(message.id, as_event=accepts_events and not accepts_json)


def answering_lost_calls(scope: Scope, incoming: Incoming, send: Send) -> Send:
    """Return the `send` for a JSON response of the SDK, which answers a call that was lost with its id.

    The SDK answers 500, which this package never does, without the id, and that ends some clients as a whole.
    """
    lost = False

    async def sending(message: Message) -> None:
        nonlocal lost
        if message["type"] == "http.response.start" and message["status"] == 500:
            lost = True
            await response_to(CALL_LOST, scope, incoming.body)(scope, incoming.receive, send)
        elif not lost:
            await send(message)

    return sending


def too_large() -> Response:
    """Return 413 to a request whose body is too long, as the SDK's manager answers it."""
    return Response("Request body too large", status_code=413)


def session_ended(session_id: str) -> Response:
    """Return 200 to a DELETE, as the SDK's transport answers it."""
    return Response(status_code=200, headers={"mcp-session-id": session_id}, media_type="application/json")


LIFESPAN_NOT_ENTERED: Final = (
    "the server does not run, because the lifespan of its app was not entered: where the app that durable_app returned "
    "is mounted in another app, the lifespan of that one enters it, async with app.router.lifespan_context(app); the "
    "ASGI server has to support lifespans (uvicorn: without --lifespan off); a DurableSessionManager in an app of your "
    "own serves within async with manager.run()"
)
"""Message of `NotRunning`."""
