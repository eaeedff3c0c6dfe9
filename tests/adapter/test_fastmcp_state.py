"""FastMCP's own state behind `durable_app`: what `ctx.set_state` stores, and which components a session sees."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import pytest
from key_value.aio.stores.memory import MemoryStore

from mcp_session_store import (
    MemorySessionStore,
    MemoryStateStore,
    SqlKeyValue,
    SqlSessionStore,
    durable_app,
    session_key,
)
from mcp_session_store import app as app_module
from mcp_session_store.adapter.fastmcp_state import FastMCPState, state_names
from mcp_session_store.adapter.sessions.middleware import CURRENT_SCOPE, OUTSIDE
from mcp_session_store.errors import KeyValueFull
from mcp_session_store.testing import new_state
from tests.support.asgi import Client
from tests.support.databases import execute, migrated
from tests.support.faulty_stores import FaultyState, FaultyStore
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import running
from tests.support.internals import exit_stack_of, state_storage_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp
    from fastmcp.server.middleware import Middleware

if TYPE_CHECKING:
    from fastmcp import FastMCP

pytestmark = pytest.mark.anyio

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "modern", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


def state_tools(server: FastMCP[Any]) -> FastMCP[Any]:
    @server.tool
    async def put(name: str, value: str, ctx: fastmcp.Context) -> str:
        await ctx.set_state(name, value)
        return "stored"

    @server.tool
    async def get(name: str, ctx: fastmcp.Context) -> str:
        return json.dumps(await ctx.get_state(name))

    @server.tool
    async def drop(name: str, ctx: fastmcp.Context) -> str:
        await ctx.delete_state(name)
        return "dropped"

    @server.tool
    async def hide(names: list[str], ctx: fastmcp.Context) -> str:
        await ctx.disable_components(names=set(names))
        return "hidden"

    @server.tool
    async def show(ctx: fastmcp.Context) -> str:
        await ctx.reset_visibility()
        return "shown"

    @server.tool
    async def secret() -> str:
        return "secret"

    return server


def server(*, given: Any = None) -> FastMCP[Any]:
    """A server with two servers mounted below it, one of which was given a store of its own."""
    root: FastMCP[Any] = state_tools(fastmcp.FastMCP("root"))
    root.mount(state_tools(fastmcp.FastMCP()), namespace="a")
    nested: FastMCP[Any] = state_tools(fastmcp.FastMCP("b"))
    nested.mount(state_tools(fastmcp.FastMCP("nested")))
    root.mount(nested, namespace="b")
    root.mount(state_tools(fastmcp.FastMCP("given", session_state_store=given or MemoryStore())), namespace="given")
    return root


class Greeter(Middleware):
    """Stores a value and hides a tool in the handshake, and greets by the value in each listing."""

    async def on_initialize(self, context: Any, call_next: Any) -> Any:
        result = await call_next(context)
        ctx = context.fastmcp_context
        self.found = await ctx.get_state("count")
        await ctx.set_state("count", 1)
        await ctx.disable_components(names={"secret"})
        assert await ctx.get_state("count") == 1 or self.found is not None
        return result


async def call(client: Client, tool: str, **arguments: Any) -> str:
    return (await client.call(tool, arguments)).text


async def tools(client: Client) -> set[str]:
    listed = await client.request("tools/list")
    return {tool["name"] for tool in listed.result["tools"]}


async def test_state_is_the_same_on_every_instance_and_after_a_restart(database_url: str) -> None:
    await migrated(database_url)
    given = MemoryStore()
    async with (
        running(one := durable_app(server(given=given), database_url)) as tasks,
        running(two := durable_app(server(given=given), database_url)) as more,
    ):
        here = Client(one, tasks)
        session_id = await here.handshake()
        there = Client(two, more, session_id=session_id)
        other = Client(two, more)
        await other.handshake()
        for prefix in ("", "a_", "b_", "given_"):
            assert await call(here, f"{prefix}put", name="x", value=f"of {prefix}") == "stored"
        for client in (here, there) * 2:
            for prefix in ("", "a_", "b_", "given_"):
                assert json.loads(await call(client, f"{prefix}get", name="x")) == f"of {prefix}"
        assert json.loads(await call(other, "get", name="x")) is None
        assert await call(there, "put", name="x", value="new") == "stored"
        assert json.loads(await call(here, "get", name="x")) == "new"
        assert await call(there, "drop", name="x") == "dropped"
        assert json.loads(await call(here, "get", name="x")) is None
        # What was given a store stays with it.
        assert await given.get(f"{session_id}:x", collection="fastmcp_state") == {"value": "of given_"}
    rows = await execute(database_url, "SELECT * FROM mcp_session_state")
    assert session_id not in str(rows)
    assert {row.name for row in rows} == {"fastmcp/a:x", "fastmcp/b:x"}
    async with running(app := durable_app(server(), database_url)) as tasks:
        client = Client(app, tasks, session_id=session_id)
        assert json.loads(await call(client, "a_get", name="x")) == "of a_"
        await client.delete()
    assert await execute(database_url, "SELECT * FROM mcp_session_state") == []


async def test_a_hidden_tool_stays_hidden_everywhere(database_url: str) -> None:
    await migrated(database_url)
    async with (
        running(one := durable_app(server(), database_url, end_within=0.5)) as tasks,
        running(two := durable_app(server(), database_url, end_within=0.5)) as more,
    ):
        here = Client(one, tasks)
        session_id = await here.handshake()
        there = Client(two, more, session_id=session_id)
        # The copy there is in use by an open stream, and does not leave memory.
        stream = await there.get_stream()
        assert {"secret", "a_secret"} <= await tools(there)
        await call(here, "hide", names=["secret", "a_secret"])
        assert not {"secret", "a_secret"} & await tools(here)

        with anyio.fail_after(10):
            while {"secret", "a_secret"} & await tools(there):
                await anyio.sleep(0.05)
        await call(there, "a_hide", names=["put"])
        assert "a_put" not in await tools(there)
        assert "put" in await tools(there)
        await stream.leave()
    async with running(app := durable_app(server(), database_url)) as tasks:
        client = Client(app, tasks, session_id=session_id)
        assert not {"secret", "a_secret", "a_put"} & await tools(client)
        await call(client, "show")
        assert {"secret", "a_secret"} <= await tools(client)
        assert "a_put" not in await tools(client)


async def test_no_rule_is_lost_that_another_call_adds_at_once() -> None:
    store = MemorySessionStore()
    state = SlowState(store)
    async with (
        running(one := durable_app(server(), store, state=state, end_within=3600)) as tasks,
        running(two := durable_app(server(), store, state=state, end_within=3600)) as more,
    ):
        here = Client(one, tasks)
        session_id = await here.handshake()
        there = Client(two, more, session_id=session_id)
        await tools(there)
        # In one copy at once, and in another that may not have learned of it.
        async with anyio.create_task_group() as group:
            for name in ("put", "get", "drop"):
                group.start_soon(partial(call, here, "hide", names=[name]))
            group.start_soon(partial(call, there, "hide", names=["secret"]))
        stored = (await state.get(session_key(session_id)) or {})["fastmcp:_visibility_rules"]
        rules = json.loads(stored.value)["value"]
        assert sorted(rule["names"][0] for rule in rules) == ["drop", "get", "put", "secret"]
        await call(here, "show")
        assert {"put", "get", "drop", "secret"} <= await tools(here)


class OvertakenState(MemoryStateStore):
    """State in memory, in which another instance hides a tool of one server just before one of another is hidden."""

    async def put(self, key: Any, state: Any, **kwargs: Any) -> Any:
        if state.name == "fastmcp/a:_visibility_rules":
            rule = {"enabled": False, "names": ["secret"]}
            text = json.dumps({"value": [rule]})
            await super().put(key, new_state("fastmcp:_visibility_rules", text, watched=True))
        return await super().put(key, state, **kwargs)


async def test_a_change_of_one_servers_rules_hides_none_of_anothers() -> None:
    store = MemorySessionStore()
    async with running(app := durable_app(server(), store, state=OvertakenState(store), end_within=3600)) as tasks:
        client = Client(app, tasks)
        await client.handshake()
        # A copy in use is brought up to date, and does not leave memory.
        stream = await client.get_stream()
        await call(client, "a_hide", names=["put"])
        with anyio.fail_after(10):
            while "secret" in await tools(client):
                await anyio.sleep(0.01)
        assert "a_put" not in await tools(client)
        await stream.leave()


class Welcomer(Middleware):
    """Stores a value when the client has notified that it is initialized."""

    welcomed = 0

    async def on_notification(self, context: Any, call_next: Any) -> Any:
        if context.method == "notifications/initialized":
            await context.fastmcp_context.set_state("count", 1)
            self.welcomed += 1
        return await call_next(context)


async def test_an_initialize_that_is_repeated_elsewhere_sets_nothing_again() -> None:
    store = MemorySessionStore()
    here_welcomed = Welcomer()
    apps = []
    for middleware in (here_welcomed, Welcomer()):
        root = server()
        root.add_middleware(middleware)
        apps.append(durable_app(root, store, end_within=0.2))
    async with running(apps[0]) as tasks, running(apps[1]) as more:
        here = Client(apps[0], tasks)
        session_id = await here.handshake()
        with anyio.fail_after(10):
            while not here_welcomed.welcomed:
                await anyio.sleep(0.01)
        stream = await here.get_stream()
        await call(here, "put", name="count", value="2")
        there = Client(apps[1], more, session_id=session_id)
        await there.initialize({**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}})
        with anyio.fail_after(10):
            while here_welcomed.welcomed < 2:
                await anyio.sleep(0.01)
        assert json.loads(await call(here, "get", name="count")) == "2"
        await stream.leave()


class HeldValues(MemoryStore):
    """Values in memory, of which a read returns late."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = anyio.Event(), anyio.Event()

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        found = await super().get(*args, **kwargs)
        self.entered.set()
        await self.released.wait()
        return found


async def test_rules_of_a_user_that_are_stored_during_a_read_count() -> None:
    values = HeldValues()
    storage = FastMCPState("", lambda: None, values, lambda: None)
    key = "user:aa:_visibility_rules"
    async with anyio.create_task_group() as group:
        group.start_soon(storage.get, key)
        await values.entered.wait()
        await storage.put(key, {"value": ["new"]})
        values.released.set()
    assert await storage.get(key) == {"value": ["new"]}


async def test_what_a_handshake_sets_is_committed_with_it_and_not_set_again_by_a_restore() -> None:
    store = MemorySessionStore()
    greeter = Greeter()

    def app() -> Any:
        root = server()
        root.add_middleware(greeter)
        return durable_app(root, store)

    async with running(first := app()) as tasks:
        client = Client(first, tasks)
        session_id = await client.handshake()
        assert greeter.found is None
        assert json.loads(await call(client, "get", name="count")) == 1
        assert "secret" not in await tools(client)
        await call(client, "put", name="count", value="2")
        await call(client, "show")
    async with running(second := app()) as tasks:
        client = Client(second, tasks, session_id=session_id)
        assert json.loads(await call(client, "get", name="count")) == "2"
        assert greeter.found == "2"
        assert "secret" in await tools(client)


class SlowState(MemoryStateStore):
    """State in memory whose calls let others go first."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        found = await super().get(*args, **kwargs)
        await anyio.sleep(0.001)
        return found

    async def put(self, *args: Any, **kwargs: Any) -> Any:
        await anyio.sleep(0.001)
        return await super().put(*args, **kwargs)


class CountedState(MemoryStateStore):
    """State in memory that counts its calls."""

    calls = 0

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return await super().get(*args, **kwargs)

    async def put(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return await super().put(*args, **kwargs)


async def test_rules_cost_no_query_and_what_the_application_reads_costs_one() -> None:
    store = MemorySessionStore()
    state = CountedState(store)
    async with running(app := durable_app(server(), store, state=state)) as tasks:
        client = Client(app, tasks)
        session_id = await client.handshake()
        for _ in range(2):
            await tools(client)
            await call(client, "secret")
            await call(client, "a_secret")
        assert state.calls == 0
        await call(client, "a_hide", names=["secret"])
        assert state.calls == 2
        assert "a_secret" not in await tools(client)
        await call(client, "get", name="x")
        await call(client, "a_put", name="x", value="1")
        assert state.calls == 4
        calls = state.calls
    async with running(app := durable_app(server(), store, state=state)) as tasks:
        client = Client(app, tasks, session_id=session_id)
        assert "a_secret" not in await tools(client)
        assert state.calls == calls
        # The last ones count while the database is away, as far as a read goes.
        assert (await state.get(session_key(session_id))) is not None


async def test_with_the_database_away_the_last_rules_count_and_state_is_refused_for_now() -> None:
    store = FaultyStore()
    state = FaultyState(store)
    options: dict[str, Any] = {"state": state, "relay": store.mailbox, "outage_patience": 0.2}
    async with running(app := durable_app(server(), store, **options)) as tasks:
        client = Client(app, tasks)
        await client.handshake()
        await call(client, "hide", names=["secret"])
        await call(client, "put", name="x", value="1")
        store.down()
        state.down()
        for _ in range(2):
            assert "secret" not in await tools(client)
            for tool, arguments in (
                ("get", {"name": "x"}),
                ("put", {"name": "x", "value": "2"}),
                ("drop", {"name": "x"}),
                ("hide", {"names": ["get"]}),
            ):
                answer = await client.call(tool, arguments)
                assert answer.result["isError"]
                assert "the request waited for as long as it may" in answer.text
        store.up()
        with anyio.fail_after(10):
            while (await client.call("get", {"name": "x"})).result.get("isError"):
                await anyio.sleep(0.05)
        # Nothing of it is lost, and nothing that was refused took effect.
        assert json.loads(await call(client, "get", name="x")) == "1"
        assert "secret" not in await tools(client)
        await call(client, "hide", names=["put"])
        assert not {"secret", "put"} & await tools(client)


class Leaver(Middleware):
    """Notes, when the session leaves memory, which message is being handled by then."""

    def __init__(self) -> None:
        self.found: list[object] = []

    async def on_initialize(self, context: Any, call_next: Any) -> Any:
        assert CURRENT_SCOPE.get()["type"] == "http"
        exit_stack_of(context.fastmcp_context.request_context).callback(self.leave)
        return await call_next(context)

    def leave(self) -> None:
        self.found.append(CURRENT_SCOPE.get(OUTSIDE))


async def test_the_context_of_a_session_keeps_no_request() -> None:
    store = MemorySessionStore()
    session_id = None
    for _ in range(2):
        root, leaver = server(), Leaver()
        root.add_middleware(leaver)
        async with running(app := durable_app(root, store)) as tasks:
            client = Client(app, tasks, session_id=session_id)
            if session_id is None:
                session_id = await client.handshake()
            assert json.loads(await call(client, "get", name="x")) is None
        assert leaver.found == [OUTSIDE]


async def test_state_of_no_session_stays_in_memory_or_is_kept_until_it_is_swept(database_url: str) -> None:
    await migrated(database_url)
    root = server()
    async with running(durable_app(root, database_url)), SqlSessionStore(database_url) as other:
        storage: Any = state_storage_of(root)
        # As FastMCP names them in tasks outside of all messages, and with 2026-07-28.
        for key in ("session:aa:1", "user:bb:x", "user:bb:_visibility_rules"):
            assert await storage.get(key) is None
            await storage.put(key, {"value": [key]})
            assert await storage.get(key) == {"value": [key]}
            found = await storage.get(key)
            found["value"].append("changed by FastMCP")
            assert await storage.get(key) == {"value": [key]}
        values = SqlKeyValue(other)
        found, left = await values.ttl("session:aa:1", collection="fastmcp:")
        assert found == {"value": ["session:aa:1"]}
        assert left is not None
        assert timedelta(days=29) < timedelta(seconds=left) <= timedelta(days=30)
        rows = await execute(database_url, "SELECT * FROM mcp_session_value")
        assert len(rows) == 3
        assert await storage.delete("session:aa:1")
        for key in ("process:x", "process:_visibility_rules", f"{uuid4()}:x", f"{uuid4()}:_visibility_rules"):
            await storage.put(key, {"value": 1}, ttl=86_400)
            assert await storage.get(key) == {"value": 1}
            assert await storage.delete(key)
        assert len(await execute(database_url, "SELECT * FROM mcp_session_value")) == 2
        assert await execute(database_url, "SELECT * FROM mcp_session_state") == []
        await values.aclose()


async def test_state_of_no_session_leaves_room_for_logins(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any client of protocol 2026-07-28 can make such state.
    monkeypatch.setattr(app_module, "MAX_UNBOUND_BYTES", 100)
    await migrated(sqlite_url)
    root = server()
    async with (
        running(durable_app(root, sqlite_url)),
        SqlSessionStore(sqlite_url) as other,
        SqlKeyValue(other) as logins,
    ):
        storage: Any = state_storage_of(root)
        await storage.put("session:1:x", {"value": 60 * "x"})
        with pytest.raises(KeyValueFull):
            await storage.put("session:2:x", {"value": 60 * "x"})
        await logins.put("client", {"token": "x"}, collection="mcp-oauth")


async def test_the_id_of_a_session_opens_its_state_to_no_request_of_another_kind() -> None:
    store = MemorySessionStore()
    async with running(app := durable_app(server(), store)) as tasks:
        client = Client(app, tasks)
        session_id = await client.handshake()
        await call(client, "put", name="x", value="mine")
        stranger = Client(app, tasks, session_id=session_id, headers={"mcp-protocol-version": "2026-07-28"})
        answer = await stranger.request(
            "tools/call",
            {"name": "get", "arguments": {"name": "x"}, "_meta": META},
            mcp_method="tools/call",
            mcp_name="get",
        )
        assert json.loads(answer.text) is None
        assert json.loads(await call(client, "get", name="x")) == "mine"


async def test_servers_of_a_tree_have_names_of_their_own() -> None:
    root: FastMCP[Any] = fastmcp.FastMCP("root")
    for namespace, name in (("a", "x"), ("a", "y"), (None, "x/1"), (None, None), (None, None)):
        below: FastMCP[Any] = fastmcp.FastMCP(name)
        below.mount(fastmcp.FastMCP("x"))
        root.mount(below, namespace=namespace)
    twice: FastMCP[Any] = fastmcp.FastMCP("twice")
    root.mount(twice, namespace="one")
    root.mount(twice, namespace="two")
    names = [name for name, _ in state_names(root)]
    assert len(names) == len(set(names))
    assert names[:5] == ["", "/a", "/a/x", "/a~2", "/a~2/x"]
    assert "/x%2F1/x" in names
    assert {"/", "/~2", "/one"} <= set(names)
    assert "/two" not in names
