"""The stop of a uvicorn server, as its signal is seen in the process: what ends at once, and what goes on."""

from __future__ import annotations

import signal
import threading
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus

from mcp_session_store import durable_app
from mcp_session_store.adapter.draining import stopping_server
from mcp_session_store.adapter.readiness import State
from mcp_session_store.records import EventKind
from tests.support.asgi import Client, Exchange, until
from tests.support.http import RawClient
from tests.support.instances import Notes, instance, running
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio


class _Server:
    """A uvicorn server that runs all apps of a test, as far as anything of it is read."""

    def __init__(self) -> None:
        self.should_exit = self.force_exit = False
        self.started = True
        self.servers = [SimpleNamespace(is_serving=lambda: True)]
        self.config = SimpleNamespace(timeout_graceful_shutdown=None)

    def handle_exit(self, *_: Any) -> None:
        self.should_exit = True


@pytest.fixture
def server() -> Iterator[Any]:
    """The uvicorn server that runs all apps of a test."""
    server = _Server()
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    yield server
    signal.signal(signal.SIGTERM, before)
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


async def _stop_while_a_client_is_away(
    server: Any, store: FaultyStore, log: FaultyLog, notes: Notes, *, ends: bool
) -> str:
    """Stop an instance that runs a call whose client has left, and let the call end soon after, or never."""

    async def proceed(one: Instance) -> None:
        await until(lambda: one.manager.readiness.state is State.STOPPING)
        await anyio.sleep(0.4)
        notes.proceed.set()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as beside, instance(store, notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            call = client.open_call("wait")
            await until(lambda: notes.waiting == 1)
            await call.leave()
            server.should_exit = True
            # No request is open, so that the server stops the application at once.
            if ends:
                beside.start_soon(proceed, one)
    return session_id


@pytest.mark.parametrize("timeout", [60, None])
async def test_a_call_whose_client_is_away_goes_on_although_no_request_is_open(
    server: Any, store: FaultyStore, log: FaultyLog, timeout: int | None
) -> None:
    server.config.timeout_graceful_shutdown = timeout
    notes = Notes()
    session_id = await _stop_while_a_client_is_away(server, store, log, notes, ends=True)
    assert notes.waited == 1
    assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE]


@pytest.mark.parametrize("why", ["the time is over", "no time is set", "it is forced"])
async def test_a_call_whose_client_is_away_does_not_go_on_for_ever(
    server: Any, store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    server.config.timeout_graceful_shutdown = {"the time is over": 2, "no time is set": None, "it is forced": 60}[why]
    server.force_exit = why == "it is forced"
    monkeypatch.setattr("mcp_session_store.adapter.draining.FOR_AWAY", 0.1)
    notes = Notes()
    session_id = await _stop_while_a_client_is_away(server, store, log, notes, ends=False)
    assert notes.waited == 0
    assert [event.kind for event in log.stored(session_id)] == [EventKind.ERROR]


MODERN_META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "modern", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Modern:
    """A server whose clients have no session, and its calls."""

    def __init__(self) -> None:
        self.running = 0
        self.proceed = threading.Event()
        self.server = MCPServer("notes", log_level="WARNING")
        for tool in (self.wait, self.wait_after_progress, self.block):
            self.server.tool()(tool)

    async def wait(self) -> str:
        self.running += 1
        while not self.proceed.is_set():
            await anyio.sleep(0.01)
        return "waited"

    async def wait_after_progress(self, ctx: Context) -> str:
        await ctx.report_progress(1)
        return await self.wait()

    def block(self) -> str:
        self.running += 1
        self.proceed.wait(10)
        return "waited"

    def open_call(self, client: Client, tool: str) -> Exchange:
        """Call a tool, with an id of another type than sessions use."""
        params = {"name": tool, "arguments": {}, "_meta": {**MODERN_META, "progressToken": 1}}
        headers = {"mcp_method": "tools/call", "mcp_name": tool, "mcp_protocol_version": "2026-07-28"}
        return client.open_request("tools/call", params, request_id=f"call of {tool}", **headers)


@pytest.mark.parametrize("timeout", [60, 1])
@pytest.mark.parametrize("json_response", [False, True])
async def test_calls_without_a_session_end_first_or_are_lost(
    server: Any, store: FaultyStore, json_response: bool, timeout: int
) -> None:
    tools = ["wait", "block"] if json_response else ["wait", "wait_after_progress", "block"]
    server.config.timeout_graceful_shutdown = timeout
    modern = Modern()
    app = durable_app(modern.server, store, json_response=json_response)
    async with running(app) as tasks:
        client = Client(app, tasks)
        calls = {tool: modern.open_call(client, tool) for tool in tools}
        await until(lambda: modern.running == len(tools))
        server.should_exit = True
        if timeout == 60:
            await anyio.sleep(0.3)
            modern.proceed.set()
            for call in calls.values():
                assert (await call.answer()).messages[-1]["result"]["content"][0]["text"] == "waited"
            return
        await until(lambda: all(call.sent and not call.sent[-1].get("more_body", False) for call in calls.values()))
        # Its thread, which cannot be cancelled, goes on, and its client has an answer all the same.
        assert not calls["block"].over.is_set()
        for tool, call in calls.items():
            (error,) = (message for message in call.messages if "error" in message)
            assert (error["id"], error["error"]["data"]) == (f"call of {tool}", {"reason": "lost"})
            assert call.status == 200
        calls["block"].cancel()
        modern.proceed.set()


class _WithoutSignals(uvicorn.Server):
    """A server as programs run it that handle signals themselves."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("thread", [False, True])
async def test_streams_end_at_once_where_uvicorn_handles_no_signals(store: FaultyStore, thread: bool) -> None:
    found: list[Any] = []
    app = durable_app(Notes().server, store)
    serve_app = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(of: Any) -> AsyncIterator[Any]:
        found.append(stopping_server())
        async with serve_app(of) as state:
            yield state

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(app, port=free_port(), log_config=None, timeout_graceful_shutdown=30)
    server = uvicorn.Server(config) if thread else _WithoutSignals(config)
    async with anyio.create_task_group() as tasks:
        if thread:
            tasks.start_soon(partial(anyio.to_thread.run_sync, server.run))
        else:
            tasks.start_soon(server.serve)
        await until(lambda: server.started)
        async with RawClient(f"http://127.0.0.1:{config.port}/mcp") as client:
            await client.handshake()
            async with client.get_stream() as stream:
                server.should_exit = True
                with anyio.fail_after(10):
                    await stream.read()
    assert found == [server]
    # Other servers of this process go on.
    assert AppStatus.enable_automatic_graceful_drain
    assert not AppStatus.should_exit


async def test_no_server_is_found_where_none_runs() -> None:
    assert stopping_server() is None


async def test_subscriptions_of_clients_without_sessions_end_at_once(server: Any, store: FaultyStore) -> None:
    app = durable_app(MCPServer("notes", log_level="WARNING"), store)
    async with running(app) as tasks:
        client = Client(app, tasks, headers={"mcp-protocol-version": "2026-07-28"})
        params = {"notifications": {"toolsListChanged": True}, "_meta": MODERN_META}
        stream = client.open_request("subscriptions/listen", params, mcp_method="subscriptions/listen")
        await stream.next()
        server.should_exit = True
        answer = await stream.answer()
        assert "result" in answer.messages[-1]
