"""It looks durable and is not: what is told where, and how often."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from mcp_session_store import DurableSessionManager
from mcp_session_store.errors import NotRunning
from tests.support.asgi import Client
from tests.support.frameworks import Made
from tests.support.instances import Notes, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio

KINDS = ["MCPServer", "Server", "FastMCP"]


def stock_app(made: Made, **options: Any) -> Starlette:
    """The app that the server's own `run()` builds."""
    build = made.server.http_app if made.kind == "FastMCP" else made.server.streamable_http_app
    app: Starlette = build(**options)
    return app


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of this package."""
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records if record.name.startswith("mcp_session_store")]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_session_of_an_app_that_the_server_built_beside_the_durable_one_is_warned_of_once(
    store: FaultyStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made(kind)
    made.app(store)
    for _ in range(2):
        stock = stock_app(made)
        async with running(stock) as tasks:
            await Client(stock, tasks).handshake()
            await Client(stock, tasks).handshake()
    (warning,) = warnings_in(caplog)
    for named in ("'notes'", "durable_app", "run_durable(server, url)", "server.run()"):
        assert named in warning


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_said_where_nothing_looks_durable(
    store: FaultyStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Made(kind)
    app = stock_app(alone)
    async with running(app) as tasks:
        await Client(app, tasks).handshake()
    made = Made(kind)
    app = made.app(store)
    async with running(app) as tasks:
        session_id = await Client(app, tasks).handshake()
    app = made.app(store)
    async with running(app) as tasks:
        assert (await Client(app, tasks, session_id=session_id).ping()).status == 200
    app = stock_app(made, stateless_http=True)
    async with running(app) as tasks:
        assert (await Client(app, tasks).open_initialize().answer()).status == 200
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_an_app_whose_lifespan_is_not_entered_says_so_once(store: FaultyStore, kind: str) -> None:
    app = Starlette(routes=[Mount("/", Made(kind).app(store))])
    async with running(app) as tasks:
        client = Client(app, tasks)
        first = client.open_initialize()
        with pytest.raises(RuntimeError, match="lifespan") as failure:
            await first.answer()
        assert isinstance(failure.value, NotRunning)
        for named in ("durable_app", "app.router.lifespan_context(app)", "--lifespan off", "manager.run()"):
            assert named in str(failure.value)
        assert "\n" not in str(failure.value)
        # One line, as uvicorn logs it.
        logged = logging.Formatter().formatException((NotRunning, failure.value, failure.value.__traceback__))
        assert logged == f"mcp_session_store.errors.NotRunning: {failure.value}"
        # The client is told, too, and the log no more than once.
        for exchange in (first, client.open_initialize(), client.open("GET")):
            await exchange.end()
            assert exchange.status == 503
            assert b"Server is not running" in exchange.body
        assert (await client.open("GET").answer()).status == 503


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {}),
        ("GET", {"mcp_session_id": "0" * 32, "last_event_id": "1"}),
        ("DELETE", {"mcp_session_id": "0" * 32}),
        ("POST", {"mcp_session_id": "0" * 32}),
        ("POST", {"mcp_protocol_version": "2026-07-28"}),
    ],
)
async def test_whichever_request_comes_first_says_that_no_lifespan_was_entered(
    store: FaultyStore, method: str, headers: dict[str, str]
) -> None:
    # A lifespan of the outer app's own, which forgets the inner one's, and two mounts.
    inner = Starlette(routes=[Mount("/b", Made("MCPServer").app(store))])
    app = Starlette(routes=[Mount("/a", inner)], lifespan=lambda _app: nullcontext())
    async with running(app) as tasks:
        client = Client(app, tasks, path="/a/b/mcp")
        first = client.open(
            method, {"jsonrpc": "2.0", "id": 1, "method": "ping"} if method == "POST" else None, **headers
        )
        with pytest.raises(NotRunning, match="lifespan"):
            await first.answer()
        assert first.status == 503
    assert store.calls == []


@pytest.mark.parametrize("how", ["built before", "json", "another path", "by hand"])
async def test_each_way_to_an_app_that_is_not_durable_is_warned_of(
    store: FaultyStore, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    made = Made("Server")
    stock = stock_app(made) if how == "built before" else None
    made.app(store)
    if how == "by hand":
        manager = StreamableHTTPSessionManager(made.lowlevel)

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            async with manager.run():
                yield

        stock = Starlette(routes=[Route("/mcp", endpoint=manager.asgi_app)], lifespan=lifespan)
    elif how == "json":
        stock = stock_app(made, json_response=True)
    elif how == "another path":
        inner = stock_app(made)
        stock = Starlette(routes=[Mount("/tools", inner)])
        stock.router.lifespan_context = inner.router.lifespan_context
    assert stock is not None
    async with running(stock) as tasks:
        await Client(stock, tasks, path="/tools/mcp" if how == "another path" else "/mcp").handshake()
    (warning,) = warnings_in(caplog)
    assert "run_durable(server, url)" in warning


async def test_a_manager_that_does_not_run_says_so_until_it_runs(store: FaultyStore) -> None:
    manager = DurableSessionManager(Notes().server, store)
    app = Starlette(routes=[Route("/mcp", endpoint=manager.asgi_app)])
    async with running(app) as tasks:
        client = Client(app, tasks)
        with pytest.raises(NotRunning, match=r"async with manager\.run\(\)"):
            await client.open_initialize().answer()
        async with manager.run():
            await client.handshake()
            assert (await client.ping()).status == 200
        answer = await client.ping()
        assert (answer.status, answer.error["message"]) == (503, "Server is shutting down; try again later")
