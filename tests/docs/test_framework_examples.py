"""The examples for frameworks: sessions survive a restart, and belong to their users as each example says."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store import SqlSessionStore, session_key
from tests.support.asgi import Client, seen_by_a_client
from tests.support.http import RawClient
from tests.support.instances import running
from tests.support.ports import free_port
from tests.support.servers import ROOT, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starlette.applications import Starlette

    Started = Callable[..., Starlette]

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A function that imports an example anew, as a process does that starts, and returns its app."""

    def start(name: str, app: str, url: str = f"sqlite:///{tmp_path}/sessions.db") -> Starlette:
        monkeypatch.setenv("MCP_SESSION_STORE_URL", url)
        sys.modules.pop(f"examples.{name}", None)
        found: Any = getattr(importlib.import_module(f"examples.{name}"), app)
        made: Starlette = found() if app == "make_app" else found
        return made

    return start


async def test_fastmcp_keeps_its_state_over_a_restart_of_the_program(tmp_path: Path, sqlite_url: str) -> None:
    port = free_port()
    program = ServerProcess(
        [sys.executable, str(ROOT / "examples" / "fastmcp_app.py")],
        log=tmp_path / "log",
        environment={"PORT": str(port), "MCP_SESSION_STORE_URL": sqlite_url},
        port=port,
    )
    with program as server:
        async with RawClient(server.mcp_url) as client:
            await client.handshake()
            assert '"a"' in (await client.call_tool("remember", {"note": "a"})).text
            server.restart()
            again = (await client.call_tool("remember", {"note": "b"})).text
            assert '"a"' in again
            assert '"b"' in again


async def test_fastmcp_app_is_made_in_each_worker(started: Started) -> None:
    async with running(app := started("fastmcp_app", "make_app")) as tasks:
        client = Client(app, tasks)
        await client.handshake()
        await client.call("remember", {"note": "a"})
    async with running(app := started("fastmcp_app", "make_app")) as tasks:
        assert '"a"' in (await Client(app, tasks, session_id=client.session_id).call("remember", {"note": "b"})).text


async def test_fastapi_serves_its_own_routes_and_a_durable_server_beside_them(started: Started) -> None:
    async with running(app := started("fastapi_app", "api")) as tasks:
        client = Client(app, tasks, path="/notes/mcp", headers={"host": "mcp.example.com"})
        await client.handshake()
        assert (await client.call("add_note", {"text": "x"})).text == "2"
    async with running(app := started("fastapi_app", "api")) as tasks:
        again = Client(app, tasks, path="/notes/mcp", session_id=client.session_id)
        assert (await again.call("add_note", {"text": "y"})).text == "2"
        notes = await Client(app, tasks, path="/notes/all").open("GET", None).answer()
        assert notes.body == b'["what the application itself sets up","y"]'
        stranger = Client(app, tasks, path="/notes/mcp", headers={"host": "evil.example"})
        assert (await stranger.initialize()).status == 421


async def test_two_servers_share_an_engine_and_no_sessions(started: Started, sqlite_url: str) -> None:
    ids: dict[str, str] = {}
    async with running(app := started("two_servers", "make_app", sqlite_url)) as tasks:
        for name in ("notes", "tasks"):
            ids[name] = await Client(app, tasks, path=f"/{name}/mcp").handshake()
    async with running(app := started("two_servers", "make_app", sqlite_url)) as tasks:
        for name, other in (("notes", "tasks"), ("tasks", "notes")):
            client = Client(app, tasks, path=f"/{name}/mcp", session_id=ids[name])
            assert (await client.call(f"name_of_{name}")).text == name
            assert (await Client(app, tasks, path=f"/{other}/mcp", session_id=ids[name]).ping()).status == 404


async def test_a_session_belongs_to_the_user_of_the_applications_own_auth(started: Started) -> None:
    def client_of(app: Starlette, tasks: Any, user: str, session_id: str | None = None) -> Client:
        return Client(app, tasks, session_id=session_id, headers={"x-api-key": f"key-of-{user}"})

    async with running(app := started("own_auth", "app")) as tasks:
        alice = client_of(app, tasks, "alice")
        session_id = await alice.handshake()
        assert (await alice.call("whoami")).text == "alice"
        await refused(client_of(app, tasks, "bob", session_id), client_of(app, tasks, "bob", "0" * 32))
        assert (await client_of(app, tasks, "mallory", session_id).ping()).status == 401
    async with running(app := started("own_auth", "app")) as tasks:
        await refused(client_of(app, tasks, "bob", session_id), client_of(app, tasks, "bob", "0" * 32))
        assert (await client_of(app, tasks, "alice", session_id).call("whoami")).text == "alice"


async def refused(stranger: Client, unknown: Client) -> None:
    """Another user's session is to a stranger as one that does not exist, whatever is asked of it."""
    for method in ("GET", "DELETE"):
        found = await stranger.open(method, None).answer()
        assert found.status == 404
        assert seen_by_a_client(found) == seen_by_a_client(await unknown.open(method, None).answer())
    assert seen_by_a_client(await stranger.ping()) == seen_by_a_client(await unknown.ping())


async def test_a_hook_refuses_a_restore_to_other_users_and_ends_the_sessions_of_closed_accounts(
    started: Started, tmp_path: Path
) -> None:
    def client_of(app: Starlette, tasks: Any, user: str, session_id: str | None = None) -> Client:
        return Client(app, tasks, session_id=session_id, headers={"x-user": user})

    async with running(app := started("refuse_restores", "app")) as tasks:
        ids = {user: await client_of(app, tasks, user).handshake() for user in ("alice", "carol")}
        # A second handshake makes nobody the owner.
        taken = await client_of(app, tasks, "bob", ids["alice"]).initialize()
        assert taken.error["message"] == "The session belongs to another user"
    async with running(app := started("refuse_restores", "app")) as tasks:
        unknown = await client_of(app, tasks, "bob", "0" * 32).ping()
        assert seen_by_a_client(await client_of(app, tasks, "bob", ids["alice"]).ping()) == seen_by_a_client(unknown)
        assert (await client_of(app, tasks, "alice", ids["alice"]).ping()).status == 200
        # A copy that is resident asks no hook, as the example says.
        assert (await client_of(app, tasks, "bob", ids["alice"]).ping()).status == 200
        assert (await client_of(app, tasks, "carol", ids["carol"]).ping()).status == 404
    async with SqlSessionStore(f"sqlite:///{tmp_path}/sessions.db") as store:
        assert await store.load(session_key(ids["alice"])) is not None
        assert await store.load(session_key(ids["carol"])) is None
