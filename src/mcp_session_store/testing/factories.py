"""Factories of sessions, events, messages, presences and values of state that can be stored."""

from __future__ import annotations

import json
import random
import uuid
from typing import Any

from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.records import EventKind, NewEvent, NewSession, NewState, Principal
from mcp_session_store.state_store import MAX_VERSION
from mcp_session_store.stream_mail import NewStreamMessage, StreamMessageKind


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


def new_presence(number: int | None = None, **changes: Any) -> Presence:
    """Return the presence of a new instance that can be stored; `changes` replace its fields."""
    return Presence(**({"instance": f"host:1:{uuid.uuid4().hex}", "number": number} | changes))


def new_message(sequence: int, *, recipient: int | None, sender: int, **changes: Any) -> NewMessage:
    """Return a message that can be posted, of a new session; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "recipient": recipient,
        "sender": sender,
        "sequence": sequence,
        "key": uuid.uuid4(),
        "kind": MessageKind.ANSWER,
        "body": json.dumps({"jsonrpc": "2.0", "id": sequence, "result": {"answer": "name"}}),
    }
    return NewMessage(**(fields | changes))


def new_state(name: str = "name", value: str = "1", **changes: Any) -> NewState:
    """Return a value that can be put, under a version of its own; `changes` replace its fields."""
    version = random.randint(2, MAX_VERSION)  # noqa: S311 - it guards nothing
    fields: dict[str, Any] = {"name": name, "value": value, "version": version}
    return NewState(**(fields | changes))


def new_stream_message(sequence: int, *, sender: int, **changes: Any) -> NewStreamMessage:
    """Return a message for the stream of a session, whose key is one of the `changes`, which replace its fields."""
    fields: dict[str, Any] = {
        "sender": sender,
        "sequence": sequence,
        "kind": StreamMessageKind.NOTIFICATION,
        "body": json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": sequence}}),
    }
    return NewStreamMessage(**(fields | changes))
