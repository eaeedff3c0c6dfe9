"""The servers that are compared, which serve the same tool, and the operations that clients ask of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer

from benchmarks.endpoint import Endpoint
from mcp_session_store import durable_app
from mcp_session_store.memory import MemoryEventLog, MemorySessionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from starlette.applications import Starlette

CLIENTS: Final = 16
"""Number of requests at once where rates are measured, and of operations that precede the measured ones."""

SETTLED: Final = 0.2
"""Seconds after the operations that precede the measured ones, so that no report of theirs is measured."""


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
    stores_events: bool = True
    """Whether it stores events in the mode that has them."""
    path: str = "/mcp"
    residents: int = 0
    """Number of idle sessions in memory beside those that are used."""

    @contextlib.asynccontextmanager
    async def serving(self, mode: Mode) -> AsyncIterator[Endpoint]:
        """Start a server."""
        app = self.make_app(mode)
        async with app.router.lifespan_context(app):
            endpoint = Endpoint(app, self.path, resumable=mode.events and self.stores_events)
            for _ in range(self.residents):
                await endpoint.open_session()
            yield endpoint


def make_server() -> MCPServer[Any]:
    server = MCPServer("benchmark")

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    return server


def stock(name: str) -> Contender:
    """Return the SDK, without events in every mode."""
    return Contender(
        name,
        lambda mode: make_server().streamable_http_app(json_response=mode.json_response),
        restores=False,
        stores_events=False,
    )


def ours(name: str, url: str | None, *, schema: str | None = None, relay: bool = True) -> Contender:
    """Return this package on a database, or in memory: then only the cost of its own code is left."""
    store = MemorySessionStore()

    def make_app(mode: Mode) -> Starlette:
        if url is not None:
            return durable_app(
                make_server(),
                url,
                schema=schema,
                relay=relay,
                events=mode.events,
                json_response=mode.json_response,
            )
        events = MemoryEventLog(store) if mode.events else False
        return durable_app(make_server(), store, events=events, json_response=mode.json_response)

    return Contender(name, make_app)


def peer(name: str, url: str) -> Contender:
    """Return mcp-persist with durable sessions, as it comes.

    Its app always stores events and answers with SSE. For the other modes both are switched off in its session
    manager, which is what its users would do.
    """
    from mcp_persist import with_persistence

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
        return app

    # Its endpoint is mounted, and a mount answers a path without the slash with a redirect.
    return Contender(name, make_app, path="/mcp/")


def has_peer() -> bool:
    """Return whether mcp-persist is installed."""
    return importlib.util.find_spec("mcp_persist") is not None


Perform: TypeAlias = Callable[[int], Awaitable[object]]
"""Performs the operation of a number, from 0. Each number is performed once."""


@dataclass(frozen=True)
class Operation:
    """Something that clients ask of a server."""

    name: str
    option: str
    """Name on the command line."""
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
async def _calls_beside_streams(contender: Contender, mode: Mode, count: int) -> AsyncIterator[Perform]:
    async with contender.serving(mode) as endpoint, contextlib.AsyncExitStack() as streams:
        sessions = [await endpoint.open_session() for _ in range(CLIENTS)]
        for session_id in sessions:
            await streams.enter_async_context(endpoint.stream(session_id))

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
    sessions = await _sessions_of_another_process(contender, mode, CLIENTS + count)
    async with contender.serving(mode) as endpoint:

        async def call(number: int) -> None:
            await endpoint.call_tool(sessions[number] if contender.restores else await endpoint.open_session())

        await _in_turn(call, CLIENTS)
        yield lambda number: call(CLIENTS + number)


@contextlib.asynccontextmanager
async def _restores(contender: Contender, mode: Mode, count: int) -> AsyncIterator[Perform]:
    sessions = await _sessions_of_another_process(contender, mode, CLIENTS + count)
    async with contender.serving(mode) as endpoint:

        async def restore(number: int) -> None:
            await (endpoint.ping(sessions[number]) if contender.restores else endpoint.open_session())

        await _in_turn(restore, CLIENTS)
        yield lambda number: restore(CLIENTS + number)


async def _sessions_of_another_process(contender: Contender, mode: Mode, count: int) -> list[bytes]:
    """Return the ids of new sessions that no server has in memory."""
    if not contender.restores:
        return []
    async with replace(contender, residents=0).serving(mode) as endpoint:
        return [await endpoint.open_session() for _ in range(count)]


async def _in_turn(perform: Perform, count: int) -> None:
    for number in range(count):
        await perform(number)
    # What the last one left to do, such as a report of activity, which leaves within 0.1 s.
    await asyncio.sleep(SETTLED)


TOOL_CALL: Final = Operation("tools/call", "call", _tool_calls)
STREAMED_CALL: Final = Operation("tools/call beside an open stream", "streamed", _calls_beside_streams)
HANDSHAKE: Final = Operation("handshake", "handshake", _handshakes)
RESTART: Final = Operation("first call after a restart", "restart", _first_calls)
"""The session is restored with it. Clients of the stock SDK initialize anew and call; the 404 that makes them do so is
not counted against it."""
RESTORE: Final = Operation("restore", "restore", _restores)
"""The first `ping` of a session after a restart; for the stock SDK a handshake."""
OPERATIONS: Final = {operation.option: operation for operation in (TOOL_CALL, HANDSHAKE, RESTART, RESTORE)}
