"""Ids of the requests that a restored copy sends to the client, kept apart from those of the session's other copies."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.dispatcher import coerce_request_id
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage

__all__ = ["RequestIds"]

_REQUESTS_OF_A_COPY: Final = 1 << 20
_COPY_BITS: Final = 32
"""The product stays below 2 ** 53, up to which JSON's numbers are exact for every client (RFC 8259, section 6)."""


class RequestIds:
    """Shifts the ids that the SDK counts from 1 in every copy of a session.

    A requestor must not use an id twice within a session (MCP 2025-11-25, basic, requests). And the
    answer to a question from before a restart, or from another instance, must not be taken for the
    answer to this copy's question of the same number: shifted back, it is the answer to none.
    """

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        copy = random.getrandbits(_COPY_BITS) + 1
        self._offset = copy * _REQUESTS_OF_A_COPY

    def outbound(self, item: SessionMessage) -> SessionMessage:
        """Return the message that goes to the client for one that the server writes."""
        message = item.message
        if isinstance(message, JSONRPCRequest) and isinstance(message.id, int):
            # The SDK's dispatcher takes a request's id for its progress token, too.
            params = _with_token(message.params, message.id, message.id + self._offset)
            return _with(item, message, id=message.id + self._offset, params=params)
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled" and message.params:
            request_id = message.params.get("requestId")
            if isinstance(request_id, int):
                return _with(item, message, params={**message.params, "requestId": request_id + self._offset})
        return item

    def inbound(self, item: SessionMessage) -> SessionMessage:
        """Return the message that the server reads for one of the client's."""
        message = item.message
        if isinstance(message, JSONRPCResponse | JSONRPCError) and message.id is not None:
            request_id = coerce_request_id(message.id)
            if isinstance(request_id, int):
                return _with(item, message, id=request_id - self._offset)
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/progress" and message.params:
            token = message.params.get("progressToken")
            # A smaller one is the application's own.
            if isinstance(token, int) and token > self._offset:
                return _with(item, message, params={**message.params, "progressToken": token - self._offset})
        return item


def _with_token(params: dict[str, Any] | None, token: int, shifted: int) -> dict[str, Any] | None:
    meta = params.get("_meta") if params else None
    if params is None or not isinstance(meta, dict) or meta.get("progressToken") != token:
        return params
    return {**params, "_meta": {**meta, "progressToken": shifted}}


def _with(item: SessionMessage, message: Any, **changes: Any) -> SessionMessage:
    # Change only fields that were set: the transport leaves out the others.
    changed = {name: value for name, value in changes.items() if name in message.model_fields_set}
    return replace(item, message=message.model_copy(update=changed))
