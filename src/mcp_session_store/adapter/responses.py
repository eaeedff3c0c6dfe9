"""The HTTP answers that the session layer gives itself, and which error gets which of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, JSONRPCError
from starlette.responses import Response

from mcp_session_store.adapter import telemetry
from mcp_session_store.errors import RecordUnreadable, SchemaError, SessionLimitReached, SessionStoreError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

__all__ = [
    "BAD_EVENT_ID",
    "METHOD_NOT_ALLOWED",
    "NOT_ACCEPTABLE",
    "ONE_STREAM",
    "SESSION_ENDED",
    "SESSION_NOT_FOUND",
    "STREAM_COMPLETE",
    "TOO_MANY_SESSIONS",
    "UNAVAILABLE",
    "Answer",
    "MemoryFull",
    "RestoreFailed",
    "SessionNotFound",
    "ShuttingDown",
    "answer_to",
    "log_unavailable",
    "refuse",
    "session_ended",
]

logger = logging.getLogger(__name__)

SESSION_ENDED: Final = "Session ended"
"""Message of the JSON-RPC error for the calls that were in flight when their session ended."""

MAX_REPORTED: Final = 1000
"""Number of sessions that cannot be read after which they are logged again."""

_RETRY_AFTER: Final = {"retry-after": "2"}
"""Seconds that `Retry-After` (RFC 9110, section 10.2.3) asks for."""


class SessionNotFound(Exception):
    """The session is unknown, ended, expired, or of another namespace or principal: all the same to the client."""


class MemoryFull(Exception):
    """There are as many copies of sessions in memory as there may be, and all are in use."""


class RestoreFailed(SessionStoreError):
    """A session cannot be restored here for now, and not because of the store; its record is as it was."""


class ShuttingDown(SessionStoreError):
    """The instance stops, and serves this request no more."""

    def __init__(self) -> None:
        super().__init__("the manager is shutting down")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer with a JSON-RPC error in it."""

    status: int
    code: int
    """Code of the JSON-RPC error."""
    message: str
    """Message of the JSON-RPC error."""
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    """Reason by which the metric of refused requests counts it."""

    def response(self) -> Response:
        """Return the answer as an ASGI application."""
        body = JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=self.code, message=self.message))
        return Response(
            body.model_dump_json(by_alias=True, exclude_unset=True),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


SESSION_NOT_FOUND: Final = Answer(404, INVALID_REQUEST, "Session not found", reason="not found")
"""The same words for a session that is unknown, ended, expired or another principal's.

MCP 2025-11-25, basic/transports, session management, 3: the client starts a new session.
"""
UNAVAILABLE: Final = Answer(
    503, INTERNAL_ERROR, "Session store unavailable; try again later", _RETRY_AFTER, "unavailable"
)
"""The store did not answer; the session is as it was."""
TOO_MANY_SESSIONS: Final = Answer(503, INTERNAL_ERROR, "Too many open sessions", _RETRY_AFTER, "too many sessions")
"""Memory or the store holds as many sessions as it may."""
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
    (MemoryFull, TOO_MANY_SESSIONS),
    (SessionLimitReached, TOO_MANY_SESSIONS),
    # As an unknown session: the client can begin anew, and trying again would not help.
    (RecordUnreadable, SESSION_NOT_FOUND),
    # The store, the schema, or a bug of ours: the session is as it was, and the client may try again.
    (Exception, UNAVAILABLE),
)


def answer_to(error: Exception) -> Answer:
    """Return the answer to a request that failed with an error."""
    return next(answer for kind, answer in _BY_ERROR if isinstance(error, kind))


def refuse(error: Exception, session: UUID) -> Answer:
    """Return the answer to a request that failed with an error; log the error and count the request as refused.

    Args:
        error: The error.
        session: Key of the session that the request is for.
    """
    answer = answer_to(error)
    telemetry.refused.add(1, {"reason": answer.reason})
    if isinstance(error, SessionLimitReached):
        logger.warning("the new session %s is refused: %s", session, error)
    elif isinstance(error, RecordUnreadable):
        _report_unreadable(error, session)
    elif answer is UNAVAILABLE:
        log_unavailable(error, session)
    return answer


_reported: Final[set[UUID]] = set()
"""Keys of the sessions that cannot be read, and were logged by this process."""


def _report_unreadable(error: RecordUnreadable, session: UUID) -> None:
    """Count a request for a session that cannot be read, and log the first one."""
    telemetry.unreadable.add(1)
    if session in _reported:
        return
    if len(_reported) >= MAX_REPORTED:
        _reported.clear()
    _reported.add(session)
    logger.error(
        "the session %s is answered as unknown, because its record cannot be read (%s); mcp-session-store check --rows "
        "lists all such rows",
        session,
        error,
    )


def log_unavailable(error: Exception, session: UUID) -> None:
    """Log why a request that needs the store is refused.

    Args:
        error: The error of the store, or of a bug of ours.
        session: Key of the session that the request is for.
    """
    if isinstance(error, SchemaError):
        logger.error("a request for the session %s is refused, the session store cannot be used: %s", session, error)
    elif isinstance(error, SessionStoreError):
        logger.warning("a request for the session %s is refused for now: %s", session, error)
    else:
        logger.error("a request for the session %s is refused because of an unexpected error", session, exc_info=error)


def session_ended(session_id: str) -> Response:
    """Return 200 to a DELETE, as the SDK's transport answers it."""
    return Response(status_code=200, headers={"mcp-session-id": session_id}, media_type="application/json")
