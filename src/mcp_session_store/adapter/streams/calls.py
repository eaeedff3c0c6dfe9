"""Streams of the calls that run in this instance, and the JSON-RPC errors that end a call in place of an answer."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_types import (
    INTERNAL_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
)

from mcp_session_store.adapter.instances import INSTANCE_NAME
from mcp_session_store.records import EventKind, NewEvent

if TYPE_CHECKING:
    from collections.abc import Hashable
    from uuid import UUID

    from mcp_types import JSONRPCMessage

__all__ = [
    "CALL_STREAM",
    "NOT_JSON",
    "NOT_RESUMABLE",
    "TRIMMED",
    "CallStream",
    "call_error",
    "call_of",
    "kind_of",
]

NOT_JSON: Final = "The answer to the call cannot be written as JSON."
NOT_RESUMABLE: Final = "The stream of the call cannot be resumed here. The call was not run again."
TRIMMED: Final = "Events of the call that the client has not seen are not kept any more. The call was not run again."

CALL_STREAM: Final = re.compile(rf"{INSTANCE_NAME.pattern}\.[1-9a-f][0-9a-f]*")
"""Name of a call's stream, as `EventRecorder.begin` makes it."""

_INTEGER: Final = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)


@dataclass(slots=True, eq=False)
class CallStream:
    """Stream of one call that runs in this instance."""

    key: UUID
    """Key of the call's session."""
    name: str
    """Name of the stream, unique among all calls of all instances."""
    request_id: RequestId
    resumable: bool
    """Whether the call's client comes back for what it misses."""
    owner: Hashable = None
    """Principal of the session."""
    identified: bool = False
    """Whether the client may have an event id to come back with."""
    answer: NewEvent | None = None
    """Last event of the call, once there is one. Until the log has confirmed it, it may be stored or not."""
    position: int = 0
    """Position of the next event."""
    previous: int = -1
    """Position of the last event that a reader must have seen."""
    under_way: int = 0
    """Number of the call's events that are on their way to the log."""
    idle: bool = False
    """Whether nothing of it was stored since the last search for idle calls."""

    def next_event(self, kind: EventKind, message: str | None) -> NewEvent:
        """Return an event that follows all others of the call."""
        position = self.position
        self.position += 1
        return NewEvent(stream=self.name, position=position, previous=self.previous, kind=kind, message=message)


def call_error(request_id: RequestId | None, message: str, *, code: int = INTERNAL_ERROR, reason: str) -> str:
    """Return a JSON-RPC error that ends a call, as JSON text.

    Args:
        request_id: Id of the call.
        message: Text for people.
        code: JSON-RPC error code.
        reason: Word for programs that know this package, in the error's data.
    """
    error = ErrorData(code=code, message=message, data={"reason": reason})
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=error).model_dump_json(by_alias=True, exclude_unset=True)


def call_of(stream_id: str, body: bytes) -> tuple[RequestId, str | None]:
    """Return the id of a call as the client wrote it, and its method where that matters.

    The SDK passes the id as text only. Search the body for what could make a difference before parsing it once more.
    """
    integer = _INTEGER.fullmatch(stream_id) is not None
    if b'"initialize"' in body or (integer and b'"%s"' % stream_id.encode() in body):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            message = json.loads(body)
            return message["id"], message["method"]
    return (int(stream_id) if integer else stream_id), None


def kind_of(message: JSONRPCMessage | None) -> EventKind:
    """Return the kind of the event of a message; `None` stands for a priming event."""
    match message:
        case None:
            return EventKind.PRIMING
        case JSONRPCRequest():
            return EventKind.REQUEST
        case JSONRPCNotification():
            return EventKind.NOTIFICATION
        case JSONRPCResponse():
            return EventKind.RESPONSE
        case JSONRPCError():
            return EventKind.ERROR
