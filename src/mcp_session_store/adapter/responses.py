"""The answers that the session layer gives itself, as HTTP responses with a JSON-RPC error in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, ErrorData, JSONRPCError
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "SESSION_ENDED",
    "bad_event_id",
    "method_not_allowed",
    "not_acceptable",
    "one_stream",
    "session_ended",
    "session_not_found",
    "stream_complete",
    "too_many_sessions",
    "unavailable",
]

SESSION_ENDED: Final = "Session ended"
"""Message of the JSON-RPC error for the calls that were in flight when their session ended."""

RETRY_AFTER: Final = 2
"""Seconds that `Retry-After` (RFC 9110, section 10.2.3) asks for."""


def session_not_found() -> Response:
    """404: the same words for a session that is unknown, ended, expired or somebody else's.

    MCP 2025-11-25, basic/transports, session management, 3: the client starts a new session.
    """
    return _error(404, INVALID_REQUEST, "Session not found")


def unavailable() -> Response:
    """503: the store did not answer; the session is as it was."""
    return _error(503, INTERNAL_ERROR, "Session store unavailable; try again later", {"retry-after": str(RETRY_AFTER)})


def too_many_sessions() -> Response:
    """503: memory holds as many sessions as it may."""
    return _error(503, INTERNAL_ERROR, "Too many open sessions", {"retry-after": str(RETRY_AFTER)})


def method_not_allowed() -> Response:
    """405: the transport speaks POST, GET and DELETE."""
    return _error(405, INVALID_REQUEST, "Method Not Allowed", {"allow": "GET, POST, DELETE"})


def bad_event_id() -> Response:
    """400: the `Last-Event-ID` is none that this session was given, whoever else may have been.

    Not 404, which ends the session (MCP 2025-11-25, basic/transports, session management). The specification names no
    answer; every client that was tried gives up after a few, and 200 without a response makes them come back for ever.
    """
    return _error(400, INVALID_REQUEST, "Last-Event-ID is not an event id of this session")


def stream_complete() -> Response:
    """405: the client comes back for a call that it has the answer of; as where there is no stream to be had.

    MCP 2025-11-25, basic/transports, listening for messages from the server. Clients take it for an end without error.
    """
    return _error(405, INVALID_REQUEST, "The stream is complete", {"allow": "POST, DELETE"})


def not_acceptable() -> Response:
    """406: a stream is had as `text/event-stream`."""
    return _error(406, INVALID_REQUEST, "Not Acceptable: Client must accept text/event-stream")


def one_stream() -> Response:
    """409: the session's standalone stream is open already, as the SDK's transport answers it."""
    return _error(409, INVALID_REQUEST, "Conflict: Only one SSE stream is allowed per session")


def session_ended(session_id: str) -> Response:
    """200 to a DELETE, as the SDK's transport answers it."""
    return Response(status_code=200, headers={"mcp-session-id": session_id}, media_type="application/json")


def _error(status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = JSONRPCError(jsonrpc="2.0", id=None, error=ErrorData(code=code, message=message))
    return Response(
        body.model_dump_json(by_alias=True, exclude_unset=True),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )
