"""The servers that are compared, which serve the same tool, and the operations that clients ask of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer

from benchmarks.endpoint import Endpoint
from mcp_session_store import durable_app
from mcp_session_store.memory import MemoryEventLog, MemorySessionStore

try:
    from mcp_persist import with_persistence
except ImportError:
    with_persistence = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from starlette.applications import Starlette

CLIENTS: Final = 16
"""Number of requests at once where rates are measured, and of operations that precede the measured ones."""


@dataclass(frozen=True)
class Mode:
    """Form of the answers to calls, and whether streams can be resumed."""

    name: str
    json_response: bool = False
    events: bool = False


JSON: Final = Mode("JSON", json_response=True)
SSE: Final = Mode("SSE")
EVENTS: Final = Mode("SSE, events on", events=True)
MODES: Final = (JSON, SSE, EVENTS)


@dataclass(frozen=True)
class Contender:
    """A server to compare with the others."""

    name: str
    make_app: Callable[[Mode], Starlette]
    restores: bool = True
    """Whether sessions survive a restart. Clients of a server whose sessions do not initialize anew."""

    @contextlib.asynccontextmanager
    async def serving(self, mode: Mode) -> AsyncIterator[Endpoint]:
        app = self.make_app(mode)
        async with app.router.lifespan_context(app):
            yield Endpoint(app, app.state.path if hasattr(app.state, "path") else "/mcp")


def make_server() -> MCPServer[Any]:
    server = MCPServer("benchmark")

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    return server


def stock() -> Contender:
    """Return the SDK, without events in every mode."""
    return Contender(
        "stock SDK", lambda mode: make_server().streamable_http_app(json_response=mode.json_response), restores=False
    )


def ours(name: str, url: str | None) -> Contender:
    """Return this package on a database, or in memory: then only the cost of its own code is left."""
    store = MemorySessionStore()

    def make_app(mode: Mode) -> Starlette:
        if url is not None:
            return durable_app(make_server(), url, events=mode.events, json_response=mode.json_response)
        events = MemoryEventLog(store) if mode.events else False
        return durable_app(make_server(), store, events=events, json_response=mode.json_response)

    return Contender(name, make_app)


def peer(name: str, url: str) -> Contender:
    """Return mcp-persist with durable sessions, as it comes.

    Its app always stores events and answers with SSE. For the other modes both are switched off in its session
    manager, which is what its users would do.
    """
    location = sa.make_url(url)
    backend = location.get_backend_name()
    if backend == "sqlite":
        target = str(location.database)
    else:
        backend, target = "postgres", location.set(drivername="postgresql").render_as_string(hide_password=False)

    def make_app(mode: Mode) -> Starlette:
        app = with_persistence(make_server(), backend=backend, url=target, durable_sessions=True)
        lifespan = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def configured(of: Starlette) -> AsyncIterator[Any]:
            async with lifespan(of) as state:
                manager = app.state.session_manager
                manager.json_response = mode.json_response
                if not mode.events:
                    manager.event_store = None
                yield state

        app.router.lifespan_context = configured
        # Its endpoint is mounted, and a mount answers a path without the slash with a redirect.
        app.state.path = "/mcp/"
        return app

    return Contender(name, make_app)


def has_peer() -> bool:
    """Return whether mcp-persist is installed."""
    return with_persistence is not None


Perform: TypeAlias = Callable[[int], Awaitable[object]]
"""Performs the operation of a number, from 0. Each number is performed once."""


@dataclass(frozen=True)
class Operation:
    """Something that clients ask of a server."""

    name: str
    prepared: Callable[[Contender, Mode, int], AbstractAsyncContextManager[Perform]]
    """Starts a server for so many operations, which has performed some already."""


@contextlib.asynccontextmanager
async def _tool_calls(contender: Contender, mode: Mode, count: int) -> AsyncIterator[Perform]:
    async with contender.serving(mode) as endpoint:
        sessions = [await endpoint.open_session() for _ in range(CLIENTS)]

        async def call(number: int) -> None:
            await endpoint.call_tool(sessions[number % CLIENTS])

        await _in_turn(call, max(CLIENTS, count // 4))
        yield call


@contextlib.asynccontextmanager
async def _handshakes(contender: Contender, mode: Mode, _: int) -> AsyncIterator[Perform]:
    async with contender.serving(mode) as endpoint:

        async def open_next(_: int) -> None:
            await endpoint.open_session()

        await _in_turn(open_next, CLIENTS)
        yield open_next


@contextlib.asynccontextmanager
async def _first_calls(contender: Contender, mode: Mode, count: int) -> AsyncIterator[Perform]:
    sessions: list[bytes] = []
    if contender.restores:
        async with contender.serving(mode) as endpoint:
            sessions = [await endpoint.open_session() for _ in range(CLIENTS + count)]
    async with contender.serving(mode) as endpoint:

        async def call(number: int) -> None:
            await endpoint.call_tool(sessions[number] if sessions else await endpoint.open_session())

        await _in_turn(call, CLIENTS)

        async def call_next(number: int) -> None:
            await call(CLIENTS + number)

        yield call_next


async def _in_turn(perform: Perform, count: int) -> None:
    for number in range(count):
        await perform(number)
    # What the last one left to do, such as a report of activity.
    await asyncio.sleep(0)


TOOL_CALL: Final = Operation("tools/call", _tool_calls)
HANDSHAKE: Final = Operation("handshake", _handshakes)
RESTART: Final = Operation("first call after a restart", _first_calls)
OPERATIONS: Final = {"call": TOOL_CALL, "handshake": HANDSHAKE, "restart": RESTART}
