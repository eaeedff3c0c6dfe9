"""The stop of a uvicorn server, as its signal is seen in the process: what ends at once, and what goes on."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.mcpserver import MCPServer
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus

from mcp_session_store import durable_app
from tests.support.asgi import Client, Exchange, until
from tests.support.instances import Notes, instance, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.faulty_stores import FaultyLog, FaultyStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The uvicorn server that runs all apps of a test."""
    server = SimpleNamespace(
        should_exit=False,
        started=True,
        servers=[SimpleNamespace(is_serving=lambda: True)],
        config=SimpleNamespace(timeout_graceful_shutdown=None),
    )
    monkeypatch.setattr("mcp_session_store.adapter.draining.stopping_server", lambda: server)
    yield server
    assert AppStatus.enable_automatic_graceful_drain
    assert not AppStatus.should_exit


async def _own_stream(scope: Any, receive: Any, send: Any) -> None:
    async def for_ever() -> AsyncIterator[str]:
        await anyio.sleep_forever()
        yield ""

    await EventSourceResponse(for_ever())(scope, receive, send)


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25"])
async def test_streams_end_at_once_and_calls_first(
    server: Any, store: FaultyStore, log: FaultyLog, events: bool, version: str
) -> None:
    notes = Notes()
    async with instance(store, notes, events=log if events else False) as one:
        client = one.client()
        await client.handshake()
        stream, call = client.open("GET", mcp_protocol_version=version), client.open_call("wait")
        await stream.start()
        await until(lambda: notes.waiting == 1)
        server.should_exit = True
        assert (await stream.answer()).status == 200
        assert stream.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert not call.over.is_set()
        notes.proceed.set()
        assert (await call.answer()).text == "waited"


async def test_a_server_that_has_served_as_many_requests_as_it_may_ends_streams_too(
    server: Any, store: FaultyStore
) -> None:
    async with instance(store, Notes()) as one:
        client = one.client()
        await client.handshake()
        stream = client.open("GET")
        await stream.start()
        # uvicorn does not set `should_exit` then.
        server.servers = [SimpleNamespace(is_serving=lambda: False)]
        assert (await stream.answer()).status == 200


async def test_calls_that_do_not_end_in_time_are_lost(server: Any, store: FaultyStore, log: FaultyLog) -> None:
    server.config.timeout_graceful_shutdown = 1
    notes = Notes()
    async with instance(store, notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call = client.open_call("wait")
        await until(lambda: notes.waiting == 1)
        server.should_exit = True
        assert (await call.answer()).error["data"] == {"reason": "lost"}
        assert notes.waited == 0


async def test_a_stream_of_the_application_ends_when_the_calls_of_all_apps_are_over(
    server: Any, store: FaultyStore, other_store: FaultyStore
) -> None:
    first, second = Notes(), Notes()
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        calls = []
        for notes, its_store in ((first, store), (second, other_store)):
            one = await stack.enter_async_context(instance(its_store, notes))
            client = one.client()
            await client.handshake()
            calls.append(client.open_call("wait"))
        await until(lambda: first.waiting == second.waiting == 1)
        own = Exchange(_own_stream, {"type": "http", "method": "GET", "headers": []}, b"")
        tasks.start_soon(own.run)
        await own.start()
        server.should_exit = True
        for notes, call in ((first, calls[0]), (second, calls[1])):
            assert not own.over.is_set()
            notes.proceed.set()
            assert (await call.answer()).text == "waited"
        await own.end()


async def test_a_program_that_ends_its_streams_itself_is_left_to_do_so(server: Any, store: FaultyStore) -> None:
    AppStatus.enable_automatic_graceful_drain = False
    try:
        async with instance(store, Notes()) as one:
            await one.client().handshake()
            server.should_exit = True
            await anyio.sleep(0.5)
            assert not AppStatus.should_exit
        assert not AppStatus.enable_automatic_graceful_drain
    finally:
        AppStatus.enable_automatic_graceful_drain = True


async def test_subscriptions_of_clients_without_sessions_end_at_once(server: Any, store: FaultyStore) -> None:
    app = durable_app(MCPServer("notes", log_level="WARNING"), store)
    async with running(app) as tasks:
        client = Client(app, tasks, headers={"mcp-protocol-version": "2026-07-28"})
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "modern", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params = {"notifications": {"toolsListChanged": True}, "_meta": meta}
        stream = client.open_request("subscriptions/listen", params, mcp_method="subscriptions/listen")
        await stream.next()
        server.should_exit = True
        answer = await stream.answer()
        assert "result" in answer.messages[-1]
