"""Factories of sessions and events that can be stored."""

from __future__ import annotations

import json
import uuid
from typing import Any

from mcp_session_store.records import EventKind, NewEvent, NewSession, Principal


def new_session(**changes: Any) -> NewSession:
    """Return a session that can be created, under a new key; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "key": uuid.uuid4(),
        "initialize_params": '{"protocolVersion": "2025-11-25", "capabilities": {}}',
        "protocol_version": "2025-11-25",
        "client_name": "client",
        "client_version": "1.0",
        "principal": Principal.of(client_id="client-id", issuer="https://issuer", subject="somebody"),
        "instance": "instance-a",
    }
    return NewSession(**(fields | changes))


def new_event(position: int = 0, **changes: Any) -> NewEvent:
    """Return an event that can be stored; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "stream": "instance.1",
        "position": position,
        "previous": position - 1,
        "kind": EventKind.NOTIFICATION,
        "message": json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": position}}),
    }
    return NewEvent(**(fields | changes))
