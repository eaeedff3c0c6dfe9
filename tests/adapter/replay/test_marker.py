"""The restore marker: visible in every context of a restored session, and in none of another."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
from mcp.server.lowlevel.server import Server
from mcp.server.mcpserver import Context, MCPServer

from mcp_session_store import SessionRestoreMarker, durable_app, get_restore_marker
from tests.support.asgi import Client
from tests.support.instances import instance, running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp
    from fastmcp.server.middleware import Middleware, MiddlewareContext

if TYPE_CHECKING:
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext

    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio

Told = list[tuple[str, SessionRestoreMarker | None]]


def mcp_server(told: Told) -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("notes")

    @server.tool()
    async def add(a: int, b: int, ctx: Context[Any]) -> int:
        told.append(("tool", get_restore_marker(ctx)))
        told.append(("request context", get_restore_marker(ctx.request_context)))
        told.append(("request", get_restore_marker(ctx.request_context.request)))
        return a + b

    async def middleware(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        told.append((ctx.method, get_restore_marker(ctx)))
        return await call_next(ctx)

    server.middleware.append(middleware)
    return server


def fastmcp_server(told: Told) -> fastmcp.FastMCP[Any]:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP("notes")

    @server.tool
    async def add(a: int, b: int, ctx: fastmcp.Context) -> int:
        told.append(("tool", get_restore_marker(ctx)))
        told.append(("request context", get_restore_marker(ctx.request_context)))
        return a + b

    class Tell(Middleware):
        async def on_message(self, context: MiddlewareContext[Any], call_next: Any) -> Any:
            told.append((str(context.method), get_restore_marker(context)))
            return await call_next(context)

    server.add_middleware(Tell())
    return server


@pytest.mark.parametrize("make", [mcp_server, fastmcp_server], ids=["MCPServer", "FastMCP"])
async def test_the_marker_is_seen_in_every_context_of_a_restored_session(
    store: FaultyStore, json_response: bool, make: Any
) -> None:
    genuine: Told = []
    app = durable_app(make(genuine), store, json_response=json_response)
    async with running(app) as tasks:
        client = Client(app, tasks)
        session_id = await client.handshake()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
    assert {"initialize", "tools/call", "tool"} <= {kind for kind, _ in genuine}
    assert {marker for _, marker in genuine} == {None}

    restored: Told = []
    app = durable_app(make(restored), store, json_response=json_response)
    async with running(app) as tasks:
        client = Client(app, tasks, session_id=session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
    assert {kind for kind, _ in genuine} == {kind for kind, _ in restored}
    for kind, marker in restored:
        assert marker is not None, kind
        assert marker.session_id == session_id
        assert marker.restores == 1
        assert marker.replaying == (kind in ("initialize", "notifications/initialized")), kind


async def test_the_marker_tells_about_the_restore(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store) as one, instance(other_store) as two:
        session_id = await one.client().handshake()
        record = await store.record(session_id)
        await two.client(session_id).ping()
        await store.restored(session_id)
        marker = two.notes.seen[-1].marker
        assert record is not None
        assert marker is not None
        assert marker.created_at == record.created_at
        assert marker.restored_at >= record.created_at
        assert marker.previous_instance == one.manager.instance
        assert session_id not in repr(marker)
        assert session_id not in str(marker)
        # The first instance still has its copy, which was never restored.
        await one.client(session_id).ping()
        assert one.notes.seen[-1].marker is None
        await one.terminate(session_id)
        await one.client(session_id).ping()
        marker = one.notes.seen[-1].marker
        assert marker is not None
        assert marker.restores == 2
        assert marker.previous_instance == two.manager.instance


async def test_a_handler_that_runs_on_after_the_replay_still_sees_that_it_is_replayed(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store) as one:
        await one.client(session_id).ping()
        assert [seen.replayed for seen in one.notes.seen] == [True, True, False]
        assert [marker is not None and marker.replaying for marker in one.notes.initialized] == [True]


async def test_a_second_initialize_of_a_restored_session_is_not_replayed(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store) as one:
        assert (await one.client(session_id).initialize()).status == 200
        marker = one.notes.seen[-1].marker
        assert marker is not None
        assert not marker.replaying


class NoRequest:
    request = None


class Outside:
    @property
    def request_context(self) -> Any:
        raise ValueError("Context is not available outside of a request")


@pytest.mark.parametrize("context", [None, object(), NoRequest(), Outside(), 1, "text", MCPServer("x"), Server("x")])
def test_there_is_no_marker_outside_of_a_request(context: object) -> None:
    assert get_restore_marker(context) is None


def test_a_context_that_refers_to_itself_has_no_marker() -> None:
    class Circle:
        @property
        def request(self) -> Any:
            return self

    assert get_restore_marker(Circle()) is None


def test_the_contexts_of_the_frameworks_have_no_marker_outside_of_a_request() -> None:
    assert get_restore_marker(Context()) is None
    assert get_restore_marker(fastmcp.Context(fastmcp.FastMCP("x"))) is None
    assert get_restore_marker(MiddlewareContext(message=None)) is None


async def test_a_client_cannot_forge_a_marker(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client(headers={"mcp_session_store.restore_marker": "x", "mcp-session-store.restore-marker": "x"})
        await client.handshake()
        assert {seen.marker for seen in one.notes.seen} == {None}
