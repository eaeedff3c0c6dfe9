"""Health over HTTP: what a load balancer, a supervisor and a stranger see of a process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from mcp_session_store import ConfigurationError, DurableSessionManager, durable_app
from mcp_session_store.errors import SchemaBehind, StoreMisconfigured, StoreUnavailable
from tests.support.asgi import PATIENCE
from tests.support.frameworks import Made
from tests.support.instances import Notes, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio

FRAMEWORKS = ["MCPServer", "Server", "FastMCP"]
QUICK: dict[str, Any] = {"health_path": "/health", "end_within": 0.1}
"""Options of an app that looks at its store all the time."""


async def ask(
    app: Starlette, path: str, method: str = "GET", *, host: str = "evil.example", root_path: str = ""
) -> httpx2.Response:
    """Send one request, to a host that no guard lets pass."""
    transport = httpx2.ASGITransport(app=app, root_path=root_path)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.request(method, path, headers={"host": host, "content-type": "application/json"})


async def state(app: Starlette, path: str = "/health/ready") -> tuple[int, str]:
    """Return the status and the state, and check that the answer holds no more."""
    answer = await ask(app, path)
    (only,) = answer.json().items()
    assert only[0] == "status"
    assert answer.headers["cache-control"] == "no-store"
    return answer.status_code, only[1]


async def becomes(app: Starlette, expected: tuple[int, str]) -> None:
    """Wait until the app is in a state; no other request comes meanwhile."""
    with anyio.fail_after(PATIENCE):
        while await state(app) != expected:
            await anyio.sleep(0.01)


@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize("auth", [False, True], ids=["open", "auth"])
async def test_it_stands_outside_of_auth_and_host_guard(store: FaultyStore, kind: str, auth: bool) -> None:
    options: dict[str, Any] = {"host_origin_protection": True} if kind == "FastMCP" else {}
    app = Made(kind, auth=auth).app(store, health_path="/health", **options)
    async with running(app):
        store.calls.clear()
        assert (await ask(app, "/mcp", "POST")).status_code in (401, 421)
        assert await state(app) == (200, "ready")
        assert await state(app, "/health/live") == (200, "live")
        head = await ask(app, "/health/ready", "HEAD")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(b'{"status":"ready"}'))
        for path in ("/health/live", "/health/ready"):
            refused = await ask(app, path, "POST")
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        # The application's own route beside them.
        assert (await ask(app, "/health", host="127.0.0.1:8000")).text == "well"
    assert not store.calls


async def test_it_is_off_unless_asked_for(store: FaultyStore) -> None:
    app = Made("MCPServer").app(store)
    async with running(app):
        assert (await ask(app, "/health/live")).status_code == 404


async def test_a_start_without_a_database_is_live_and_not_ready(store: FaultyStore) -> None:
    app = durable_app(Notes().server, store, **QUICK)
    # As where the lifespan of a mounted app is left out.
    assert await state(app) == (503, "starting")
    store.down()
    async with running(app):
        assert await state(app) == (503, "starting")
        assert await state(app, "/health/live") == (200, "live")
        store.up()
        await becomes(app, (200, "ready"))


async def test_an_outage_is_seen_and_its_end_although_no_request_comes(store: FaultyStore) -> None:
    app = durable_app(Notes().server, store, **QUICK)
    async with running(app):
        store.failing(StoreUnavailable("postgresql://secret@host is away"))
        await becomes(app, (200, "degraded"))
        assert (await ask(app, "/health/ready?strict")).status_code == 503
        assert (await ask(app, "/health/ready?strict=1")).json() == {"status": "degraded"}
        assert (await ask(app, "/health/ready?strict=0")).status_code == 200
        assert await state(app, "/health/live") == (200, "live")
        store.up()
        await becomes(app, (200, "ready"))
        assert (await ask(app, "/health/ready?strict")).status_code == 200


@pytest.mark.parametrize("cause", [SchemaBehind("0001 of secret"), StoreMisconfigured("the password of secret")])
async def test_a_final_cause_that_appears_later_makes_it_not_ready(store: FaultyStore, cause: Exception) -> None:
    app = durable_app(Notes().server, store, **QUICK)
    async with running(app):
        store.failing(cause)
        await becomes(app, (503, "not_ready"))
        assert await state(app, "/health/live") == (200, "live")
        store.up()
        await becomes(app, (200, "ready"))


@pytest.mark.parametrize("kind", FRAMEWORKS)
async def test_a_stop_makes_it_not_ready_and_a_new_start_ready(store: FaultyStore, kind: str) -> None:
    made = Made(kind)
    app = made.app(store, health_path="/health")
    for _ in range(2):
        async with running(app):
            assert await state(app) == (200, "ready")
            manager = made.lowlevel.session_manager
            assert isinstance(manager, DurableSessionManager)
            # As `serve` does at the signal, while calls go on.
            manager.answer_waiting()
            assert await state(app) == (503, "stopping")
            assert await state(app, "/health/live") == (200, "live")
        assert await state(app) == (503, "stopping")


async def own(_request: object) -> PlainTextResponse:
    return PlainTextResponse("own")


@pytest.mark.parametrize(
    ("route", "is_own"),
    [
        (Route("/health/ready", own, methods=["POST"]), {"/health/ready": 405}),
        (Route("/health/{probe}", own), {"/health/ready": 200, "/health/live": 200}),
        (Mount("/health", routes=[Route("/ready", own)]), {"/health/ready": 200, "/health/live": 404}),
        # These stand for no path of their own.
        (Mount("/", routes=[Route("/{path:path}", own)]), {}),
        (Route("/{path:path}", own), {}),
        (Route("/{one}/{other}", own), {}),
    ],
    ids=["route", "parameter", "mount", "mount of all", "all paths", "all of this length"],
)
async def test_it_gives_way_to_routes_of_the_application(
    store: FaultyStore, route: Route | Mount, is_own: dict[str, int]
) -> None:
    app = durable_app(Notes().server, store, custom_starlette_routes=[route], health_path="/health/")
    async with running(app):
        for path in ("/health/ready", "/health/live"):
            answer = await ask(app, path)
            assert answer.status_code == is_own.get(path, 200)
            assert answer.text.startswith("{") is (path not in is_own)


async def test_it_works_below_a_root_path_and_in_an_app_that_mounts_it(store: FaultyStore) -> None:
    app = durable_app(Notes().server, store, health_path="/health")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    parent = Starlette(routes=[Mount("/notes", app=app)], lifespan=lifespan)
    async with running(parent):
        assert await state(parent, "/notes/health/ready") == (200, "ready")
        assert (await ask(parent, "/health/ready")).status_code == 404
        below = await ask(app, "/api/health/ready", root_path="/api")
        assert (below.status_code, below.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("path", ["health", "", 1, True, "/health?x", "/{x}", "/a\nb"], ids=repr)
def test_a_path_that_cannot_be_one_is_refused(store: FaultyStore, path: Any) -> None:
    with pytest.raises(ConfigurationError, match="health_path="):
        durable_app(Notes().server, store, health_path=path)
