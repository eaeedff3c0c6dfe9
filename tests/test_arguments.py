"""Arguments of the wrong type: each public callable refuses them by name, whatever they are."""

from __future__ import annotations

import asyncio
import inspect
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer

from mcp_session_store import (
    DurableSessionManager,
    EventPolicy,
    InstanceSettings,
    MemoryEventLog,
    MemorySessionStore,
    RetentionPolicy,
    SqlEventLog,
    SqlSessionStore,
    durable_app,
    migrations,
    session_key,
)
from mcp_session_store.errors import ConfigurationError, StoreMisconfigured

if TYPE_CHECKING:
    from collections.abc import Callable

STORE = MemorySessionStore()
URL = "sqlite:////nowhere/sessions.db"

VALUES: dict[str, object] = {
    "a number": 7,
    "a fraction": 1.5,
    "no number": float("nan"),
    "a flag": True,
    "nothing": None,
    "a text": "text",
    "no text": "",
    "bytes": b"bytes",
    "a path": Path("/var/lib/sessions.db"),
    "a list": ["text"],
    "a dict": {"a": 1},
    "a tuple": ("sqlite", None),
    "a duration": timedelta(seconds=3),
    "a function": print,
    "a class": SqlSessionStore,
    "an object": object(),
    "a sync engine": sa.create_engine("sqlite://"),
}


def migrate(function: Callable[..., Any]) -> Callable[..., object]:
    where = next(iter(inspect.signature(function).parameters))

    def call(**arguments: Any) -> object:
        return asyncio.run(function(**{where: URL, **arguments}))

    return call


def app(server: Any = None, store: Any = URL, **others: Any) -> object:
    return durable_app(MCPServer("notes") if server is None else server, store, **others)


def manager(app: Any = None, store: Any = None, **others: Any) -> object:
    return DurableSessionManager(
        MCPServer("notes") if app is None else app, MemorySessionStore() if store is None else store, **others
    )


MIGRATIONS: dict[str, Callable[..., Any]] = {
    "upgrade": migrations.upgrade,
    "check": migrations.check,
    "current": migrations.current,
}

CALLABLES: dict[str, tuple[Callable[..., object], Callable[..., Any]]] = {
    "durable_app": (app, durable_app),
    "DurableSessionManager": (manager, DurableSessionManager),
    "SqlSessionStore": (lambda url_or_engine=URL, **others: SqlSessionStore(url_or_engine, **others), SqlSessionStore),
    "SqlEventLog": (lambda where=URL, **others: SqlEventLog(where, **others), SqlEventLog),
    "MemorySessionStore": (MemorySessionStore, MemorySessionStore),
    "MemoryEventLog": (
        lambda store=None, **others: MemoryEventLog(store or MemorySessionStore(), **others),
        MemoryEventLog,
    ),
    "RetentionPolicy": (RetentionPolicy, RetentionPolicy),
    "EventPolicy": (EventPolicy, EventPolicy),
    "InstanceSettings": (InstanceSettings, InstanceSettings),
    "session_key": (session_key, session_key),
    **{name: (migrate(function), function) for name, function in MIGRATIONS.items()},
}
"""Each with the rest of its arguments, and as it is declared."""

SAID_OTHERWISE = ("database", "as the server", "there is no file")
"""What messages say of an argument without its name: a URL that is none, and an object that is no server."""


@pytest.mark.parametrize("name", CALLABLES)
def test_a_value_of_a_wrong_type_is_refused_by_the_name_of_its_argument(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCP_SESSION_STORE_URL", raising=False)
    call, declared = CALLABLES[name]
    arguments = [argument for argument in inspect.signature(declared).parameters if argument != "options"]
    assert arguments
    for argument in arguments:
        for kind, value in VALUES.items():
            try:
                call(**{argument: value})
            except ConfigurationError as error:
                said = str(error)
                assert any(word in said for word in (argument, *SAID_OTHERWISE)), (argument, kind, said)
            except StoreMisconfigured:
                continue  # a type that it takes
            else:
                assert kind != "an object", f"{argument} takes any object"
