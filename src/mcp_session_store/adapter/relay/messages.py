"""Which messages of clients are for other instances than the one that they are posted to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pydantic_core
from mcp.server.streamable_http import check_accept_headers
from mcp.shared.dispatcher import as_request_id, coerce_request_id
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCResponse, jsonrpc_message_adapter
from starlette.responses import Response

from mcp_session_store.adapter.question_ids import number_of
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.mailbox import MessageKind
from mcp_session_store.settings import checked_type

if TYPE_CHECKING:
    from mcp_types import JSONRPCMessage, RequestId
    from starlette.requests import Request

__all__ = [
    "ADDRESSED",
    "ERROR",
    "NOTIFICATION",
    "RESULT",
    "ROOTS_CHANGED",
    "ClientMessage",
    "accepted",
    "accepts",
    "named_notifications",
    "read_message",
    "relayed",
]

RESULT: Final = b'"result"'
"""Part of the body of each answer with a result; searched for, so that other bodies need not be parsed."""
ERROR: Final = b'"error"'
"""Part of the body of each answer with an error."""
NOTIFICATION: Final = b'"notifications'
"""Part of the body of each notification of the protocol. Without the slash, which some clients escape."""

ROOTS_CHANGED: Final = "notifications/roots/list_changed"


_PROGRESS: Final = "notifications/progress"
_CANCELLED: Final = "notifications/cancelled"
ADDRESSED: Final = frozenset({_PROGRESS, _CANCELLED})
"""Notifications about a question or a call, which is in one copy."""
_NOT_NAMED: Final = ADDRESSED | {"notifications/initialized"}
"""Notifications that do not concern every copy: of the last one a restore replays its own."""


def named_notifications(methods: Iterable[str]) -> frozenset[str]:
    """Return the methods of all notifications that concern every copy of a session.

    Args:
        methods: Those of the application's own.

    Raises:
        ConfigurationError: One of them cannot be relayed.
    """
    checked_type("relayed_notifications", methods, Iterable, "a sequence of methods")
    named = {ROOTS_CHANGED}
    for method in methods:
        if not isinstance(method, str) or not method.startswith("notifications/") or method in _NOT_NAMED:
            raise ConfigurationError(
                "relayed_notifications must hold methods of the application's own, as in notifications/notes/changed, "
                f"not {method!r}"
            )
        named.add(method)
    return frozenset(named)


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """A message of a client that may be for other instances."""

    kind: MessageKind
    question: RequestId | None = None
    """Id of the question that it answers, or reports progress of, as copies remember it."""
    call: RequestId | None = None
    """Id of the call that it cancels."""

    @property
    def number(self) -> int | None:
        """Number of the instance that has asked the question; `None`: its id names none."""
        return number_of(self.question)


def read_message(body: bytes | str) -> JSONRPCMessage:
    """Return the message in a body, read as the SDK's transport reads it.

    Raises:
        ValueError: It is none.
    """
    message: JSONRPCMessage = jsonrpc_message_adapter.validate_python(pydantic_core.from_json(body), by_name=False)
    return message


def relayed(body: bytes, methods: frozenset[str]) -> ClientMessage | None:
    """Return what a body is, if it may be for other instances.

    Args:
        body: A whole body.
        methods: `ADDRESSED`, and the methods of notifications that concern every copy of a session.
    """
    try:
        value = pydantic_core.from_json(body)
        if "method" in value and value["method"] not in methods:
            return None
        message: JSONRPCMessage = jsonrpc_message_adapter.validate_python(value, by_name=False)
    except (ValueError, TypeError):
        return None  # the transport answers it
    if isinstance(message, JSONRPCResponse | JSONRPCError):
        return None if message.id is None else ClientMessage(MessageKind.ANSWER, question=coerce_request_id(message.id))
    if not isinstance(message, JSONRPCNotification):
        return None
    if message.method == _PROGRESS:
        token = as_request_id((message.params or {}).get("progressToken"))
        # A token that no instance has made is the application's own, for any copy.
        if token is None or number_of(token) is None:
            return None
        return ClientMessage(MessageKind.PROGRESS, question=coerce_request_id(token))
    if message.method == _CANCELLED:
        call = cancelled_request_id_from_params(message.params)
        return None if call is None else ClientMessage(MessageKind.CANCELLED, call=call)
    return ClientMessage(MessageKind.NOTIFICATION)


def accepts(request: Request, *, json_response: bool) -> bool:
    """Return whether a request passes the checks that the SDK's transport makes before it reads the body.

    The transport itself refuses one that does not.

    Args:
        request: The request.
        json_response: Whether calls are answered by JSON instead of streams.
    """
    accepts_json, accepts_events = check_accept_headers(request)
    if not (accepts_json and (accepts_events or json_response)):
        return False
    media_types = request.headers.get("content-type", "").split(";")[0].split(",")
    return any(media_type.strip() == "application/json" for media_type in media_types)


def accepted(session_id: str) -> Response:
    """Return 202, as the SDK's transport answers a message that is no request."""
    return Response(status_code=202, headers={"mcp-session-id": session_id}, media_type="application/json")
