"""`durable_app`: the app that each framework builds itself, with our session manager in it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.routing import Mount

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    MemorySessionStore,
    RetentionPolicy,
    durable_app,
)
from tests.support.asgi import Client
from tests.support.faulty_stores import FaultyStore
from tests.support.frameworks import Events, Made
from tests.support.http import assert_not_handled, assert_unavailable
from tests.support.instances import Notes, instance, running
from tests.support.internals import max_initialize_params_of, rows_of, transports_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


pytestmark = pytest.mark.anyio


@pytest.fixture(params=["MCPServer", "Server", "FastMCP"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


async def test_a_session_outlives_its_server(store: FaultyStore, kind: str, json_response: bool) -> None:
    app = Made(kind).app(store, json_response=json_response)
    async with running(app) as tasks:
        session_id = await Client(app, tasks).handshake()
    app = Made(kind).app(store, json_response=json_response)
    async with running(app) as tasks:
        client = Client(app, tasks, session_id=session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert (await client.get_stream()).status == 200
        assert (await client.delete()).status == 200
        assert (await client.ping()).status == 404


async def test_the_session_manager_of_the_app_and_of_the_server_is_ours(store: FaultyStore, kind: str) -> None:
    made = Made(kind)
    app = made.app(store)
    manager = made.lowlevel.session_manager
    assert isinstance(manager, DurableSessionManager)
    if kind == "MCPServer":
        assert made.server.session_manager is manager
    async with running(app) as tasks:
        assert made.lowlevel.session_manager is manager
        await Client(app, tasks).handshake()
        assert len(transports_in(manager)) == 1


async def test_an_app_can_be_started_again(kind: str, store: FaultyStore, json_response: bool) -> None:
    made = Made(kind)
    app = made.app(store, json_response=json_response)
    session_id: str | None = None
    managers = set()
    for start in range(3):
        async with running(app) as tasks:
            client = Client(app, tasks, session_id=session_id)
            if session_id is None:
                session_id = await client.handshake()
            assert (await client.call("add", {"a": start, "b": 0})).text == str(start)
            managers.add(made.lowlevel.session_manager)
            assert sum(1 for entry in made.lowlevel.middleware if "SessionMiddleware" in repr(entry)) == 1
    assert len(managers) == 3
    assert store.counts()["open"] == 3
    assert store.closed == 0
    if kind != "Server":
        assert made.entered == 3


async def test_an_app_on_a_database_url_can_be_started_again(kind: str, sqlite_url: str) -> None:
    app = Made(kind).app(sqlite_url)
    session_id: str | None = None
    for start in range(2):
        async with running(app) as tasks:
            client = Client(app, tasks, session_id=session_id)
            if session_id is None:
                session_id = await client.handshake()
            assert (await client.call("add", {"a": start, "b": 0})).text == str(start)


async def test_custom_routes_are_served(store: FaultyStore, kind: str) -> None:
    app = Made(kind).app(store)
    async with running(app) as tasks:
        answer = await Client(app, tasks, path="/health").open("GET").answer()
        assert (answer.status, answer.body) == (200, b"well")


async def test_the_frameworks_host_guard_is_in_the_app(store: FaultyStore, kind: str) -> None:
    options: dict[str, Any] = {"host_origin_protection": True} if kind == "FastMCP" else {}
    app = Made(kind).app(store, **options)
    async with running(app) as tasks:
        client = Client(app, tasks)
        assert (await client.open_initialize(host="evil.example").answer()).status == 421
        session_id = await client.handshake()
        store.calls.clear()
        stranger = Client(app, tasks, session_id="0" * 32)
        for exchange in (
            stranger.open_request("ping", host="evil.example"),
            stranger.open("DELETE", host="evil.example"),
        ):
            assert (await exchange.answer()).status == 421
        assert "load" not in store.calls
        assert (await Client(app, tasks, session_id=session_id).ping()).status == 200


async def test_the_frameworks_auth_decides_who_may_restore(store: FaultyStore, kind: str) -> None:
    app = Made(kind, auth=True).app(store)
    async with running(app) as tasks:
        assert (await Client(app, tasks).initialize()).status == 401
        session_id = await Client(app, tasks, headers={"authorization": "Bearer alice"}).handshake()
    app = Made(kind, auth=True).app(store)
    async with running(app) as tasks:
        store.calls.clear()
        assert (await Client(app, tasks, session_id=session_id).ping()).status == 401
        assert (
            await Client(app, tasks, session_id=session_id, headers={"authorization": "Bearer x"}).ping()
        ).status == 401
        assert "load" not in store.calls
        bob = Client(app, tasks, session_id=session_id, headers={"authorization": "Bearer bob"})
        assert (await bob.ping()).status == 404
        assert (await bob.delete()).status == 404
        alice = Client(app, tasks, session_id=session_id, headers={"authorization": "Bearer alice"})
        assert (await alice.call("add", {"a": 1, "b": 2})).text == "3"
        assert (await bob.ping()).status == 404
        if kind != "FastMCP":
            metadata = Client(app, tasks, path="/.well-known/oauth-protected-resource/mcp")
            assert (await metadata.open("GET").answer()).status == 200


async def test_the_path_is_the_frameworks_option(store: FaultyStore, kind: str) -> None:
    app = Made(kind).app(store, **{"path" if kind == "FastMCP" else "streamable_http_path": "/there"})
    async with running(app) as tasks:
        assert (await Client(app, tasks).initialize()).status == 404
        assert (await Client(app, tasks, path="/there").initialize()).status == 200


async def test_the_app_is_mounted_in_another_app(store: FaultyStore, kind: str) -> None:
    inner = Made(kind).app(store)
    outer = Starlette(routes=[Mount("/inner", app=inner)], lifespan=inner.router.lifespan_context)
    async with running(outer) as tasks:
        session_id = await Client(outer, tasks, path="/inner/mcp").handshake()
    async with running(outer) as tasks:
        client = Client(outer, tasks, path="/inner/mcp", session_id=session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_the_servers_session_manager_can_be_run_by_who_mounts_the_app(store: FaultyStore, kind: str) -> None:
    made = Made(kind)
    inner = made.app(store)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with made.lowlevel.session_manager.run():
            yield

    outer = Starlette(routes=[Mount("/", app=inner)], lifespan=lifespan)
    async with running(outer) as tasks:
        client = Client(outer, tasks)
        await client.handshake()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_a_manager_serves_in_an_app_that_the_user_wires(store: FaultyStore) -> None:
    notes = Notes()
    manager = DurableSessionManager(notes.server, store)
    assert isinstance(manager, StreamableHTTPSessionManager)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with manager.run():
            yield

    app = Starlette(routes=[Mount("/mcp", app=manager.handle_request)], lifespan=lifespan)
    async with running(app) as tasks:
        client = Client(app, tasks, path="/mcp/")
        await client.handshake()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_a_request_outside_of_the_lifespan_is_an_error_as_with_the_sdk(store: FaultyStore) -> None:
    app = durable_app(Notes().server, store)
    async with anyio.create_task_group() as tasks:
        with pytest.raises(RuntimeError, match="run\\(\\)"):
            await Client(app, tasks).initialize()


async def test_an_event_store_is_passed_on(store: FaultyStore, kind: str) -> None:
    events = Events()
    app = Made(kind).app(store, event_store=events)
    async with running(app) as tasks:
        client = Client(app, tasks)
        session_id = await client.handshake()
        await client.call("add", {"a": 1, "b": 2})
        assert events.streams
    if kind == "FastMCP":
        # Under the session's own id, so that another instance finds them.
        assert all(session_id in stream for stream in events.streams)


async def test_options_reach_the_manager(store: FaultyStore, kind: str) -> None:
    made = Made(kind)
    made.app(
        store,
        json_response=True,
        retry_interval=5,
        session_idle_timeout=7.5,
        max_sessions=3,
        max_request_body_size=1000,
        replay_timeout=2,
        max_initialize_params=500,
    )
    manager = made.lowlevel.session_manager
    assert isinstance(manager, DurableSessionManager)
    assert manager.json_response is True
    assert manager.retry_interval == 5
    # The SDK is given none: copies are evicted, and sessions expire in the store.
    assert manager.session_idle_timeout is None
    assert store.retention.idle == timedelta(seconds=7.5)
    assert manager.max_sessions == 3
    assert manager.max_request_body_size == 1000
    assert max_initialize_params_of(manager) == 500
    assert manager.store is store


async def test_without_options_the_frameworks_defaults_hold(store: FaultyStore, kind: str) -> None:
    made = Made(kind)
    made.app(store)
    manager = made.lowlevel.session_manager
    stock = StreamableHTTPSessionManager(made.lowlevel)
    for name in ("json_response", "max_sessions", "max_request_body_size", "event_store"):
        assert getattr(manager, name) == getattr(stock, name), name
    assert manager.session_idle_timeout is None
    assert store.retention == RetentionPolicy()
    assert not manager.stateless


async def test_a_fastmcp_settings_default_holds(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmcp.settings, "json_response", True)
    monkeypatch.setattr(fastmcp.settings, "http_session_idle_timeout", 12.0)
    made = Made("FastMCP")
    made.app(store)
    assert made.lowlevel.session_manager.json_response is True
    assert store.retention.idle == timedelta(seconds=12)


# Refusals


def test_a_stateless_server_is_refused(store: FaultyStore, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(kind)
    with pytest.raises(ConfigurationError, match="stateless"):
        made.app(store, stateless_http=True)
    with pytest.raises(ConfigurationError, match="stateless"):
        DurableSessionManager(made.lowlevel, store, stateless=True)
    if kind == "FastMCP":
        monkeypatch.setattr(fastmcp.settings, "stateless_http", True)
        with pytest.raises(ConfigurationError, match="FASTMCP_STATELESS_HTTP"):
            made.app(store)
        assert made.app(store, stateless_http=False)


@pytest.mark.parametrize(
    "server", [None, "notes:server", object(), Starlette(), FaultyStore()], ids=lambda server: type(server).__name__
)
def test_what_is_no_server_is_refused_by_its_type(store: FaultyStore, server: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(server).__qualname__}.*MCPServer"):
        durable_app(server, store)


def test_sse_has_no_sessions(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="transport"):
        Made("FastMCP").app(store, transport="sse")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay_timeout", 0),
        ("replay_timeout", -1.0),
        ("replay_timeout", float("inf")),
        ("replay_timeout", float("nan")),
        ("max_initialize_params", 0),
        ("max_initialize_params", -1),
        ("session_idle_timeout", 0),
        ("session_idle_timeout", float("nan")),
        ("max_sessions", 0),
        ("max_request_body_size", 0),
    ],
)
def test_a_setting_that_cannot_work_is_named(store: FaultyStore, kind: str, name: str, value: Any) -> None:
    made = Made(kind)
    # ConfigurationError is a ValueError, which is what the SDK raises for its own settings.
    with pytest.raises(ValueError, match=name):
        made.app(store, **{name: value})
    with pytest.raises(ConfigurationError, match=name):
        DurableSessionManager(made.lowlevel, store, **{name: value})


def test_an_option_that_the_framework_does_not_know_is_named(store: FaultyStore, kind: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        Made(kind).app(store, no_such_option=1)


@pytest.mark.parametrize(
    "setting", [{"namespace": "x"}, {"schema": "x"}, {"auto_upgrade": True}, {"pool_size": 2}], ids=str
)
def test_settings_of_a_url_do_not_go_with_a_store(store: FaultyStore, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        durable_app(Notes().server, store, **setting)


# Who opens and closes the store


async def test_a_store_that_is_given_is_not_closed(store: FaultyStore) -> None:
    async with instance(store):
        pass
    assert store.closed == 0


@pytest.mark.parametrize("way", ["ends", "does not start"])
async def test_a_store_of_the_managers_own_is_closed_when_it_stops(way: str) -> None:
    store = FaultyStore()
    manager = DurableSessionManager(Notes().server, store, close_store=True)
    if way == "does not start":
        store.broken("open")
        with pytest.raises(RuntimeError):
            async with manager.run():
                pass
    else:
        async with manager.run():
            assert store.closed == 0
    assert store.closed == 1


async def test_a_store_that_is_down_at_the_start_stops_nothing(
    store: FaultyStore, json_response: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store.down()
    async with instance(store, json_response=json_response) as one:
        assert "the session store is away" in caplog.text
        client = one.client()
        assert_unavailable(await client.initialize())
        assert_not_handled(await one.client("0" * 32).ping())
        assert_unavailable(await one.client("0" * 32).delete())
        store.up()
        await client.handshake()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_two_apps_of_one_server_keep_their_sessions_apart() -> None:
    notes = Notes()
    stores = [MemorySessionStore(), MemorySessionStore()]
    apps = [durable_app(notes.server, store) for store in stores]
    async with running(apps[0]) as first, running(apps[1]) as second:
        one, two = Client(apps[0], first), Client(apps[1], second)
        await one.handshake()
        await two.handshake()
        assert one.session_id != two.session_id
        assert (await Client(apps[1], second, session_id=one.session_id).ping()).status == 404
        assert [len(rows_of(store)) for store in stores] == [1, 1]


# What is imported


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=150)


def test_fastmcp_is_not_imported_unless_used() -> None:
    code = """
import sys
import mcp_session_store
from mcp.server.mcpserver import MCPServer
mcp_session_store.durable_app(MCPServer("notes"), mcp_session_store.MemorySessionStore())
mcp_session_store.get_restore_marker(object())
try:
    mcp_session_store.durable_app(object(), mcp_session_store.MemorySessionStore())
except mcp_session_store.ConfigurationError:
    pass
sys.exit("fastmcp" in sys.modules)
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr


NEEDED = [
    "manager.StreamableHTTPSessionManager._discard_session",
    "manager.StreamableHTTPSessionManager._handle_stateful_request",
    "http.StreamableHTTPServerTransport._mint_priming_event",
    "http.StreamableHTTPServerTransport.close_sse_stream",
    "manager.serve_loop",
    "runner.aclose_shielded",
    "runner.ServerRunner.on_notify",
    "connection.Connection.for_loop",
    "jsonrpc_dispatcher.JSONRPCDispatcher",
    "manager.StreamableHTTPServerTransport",
    "manager.DEFAULT_MAX_REQUEST_BODY_SIZE",
    "bearer_auth.authorization_context",
]


def test_an_sdk_that_does_not_fit_is_refused_at_import_with_the_versions_that_work() -> None:
    # The SDK is imported once, and a fork of that process for each name imports the package.
    code = f"""
import json, os
from mcp.server import connection, runner, streamable_http as http, streamable_http_manager as manager
from mcp.shared import jsonrpc_dispatcher
from mcp.server.auth.middleware import bearer_auth
from mcp.server import lowlevel
for name in {NEEDED}:
    if os.fork() == 0:
        exec(f"del {{name}}")
        try:
            from mcp_session_store import durable_app
        except ImportError as error:
            print(json.dumps([name, str(error)]), flush=True)
        os._exit(0)
    os.wait()
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    refused = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [name for name, _ in refused] == NEEDED
    for name, message in refused:
        assert "mcp>=2.3,<3" in message
        assert name.rpartition(".")[2] in message


def test_an_sdk_whose_dispatch_context_has_more_than_ours_is_refused_at_import() -> None:
    code = """
from typing import Protocol
from mcp.shared import dispatcher
class DispatchContext(dispatcher.DispatchContext, Protocol):
    def acknowledge(self) -> None: ...
dispatcher.DispatchContext = DispatchContext
from mcp_session_store import durable_app
"""
    last = run_python(code).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "acknowledge" in last
    assert "mcp>=2.3,<3" in last
