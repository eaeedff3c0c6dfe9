"""Session state: values of the application's that every instance has, and that live as long as their session."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError

from mcp_session_store import (
    EndReason,
    InvalidValue,
    MemorySessionStore,
    NoSession,
    SessionState,
    StateFull,
    StatePolicy,
    durable_app,
    get_restore_marker,
    get_session_state,
    session_key,
)
from mcp_session_store.testing import new_state
from tests.support.asgi import Client, until
from tests.support.faulty_stores import FaultyState
from tests.support.instances import Notes, instance, running
from tests.support.internals import gate_of, waiting_at

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp_session_store import SessionStore
    from tests.support.asgi import Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import RequestContext

pytestmark = pytest.mark.anyio


@pytest.fixture
def state(store: FaultyStore) -> FaultyState:
    return FaultyState(store)


def using(notes: Notes, **uses: Callable[[SessionState], Awaitable[Any]]) -> Notes:
    """Give a server tools that use the state of their session, and answer in JSON."""

    def tool(use: Callable[[SessionState], Awaitable[Any]]) -> Callable[[RequestContext], Awaitable[str]]:
        async def call(ctx: RequestContext) -> str:
            try:
                return json.dumps(await use(get_session_state(ctx)))
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return call

    notes.tools |= {name: tool(use) for name, use in uses.items()}
    return notes


async def result(exchange: Exchange) -> Any:
    """The JSON that a tool has answered."""
    return json.loads((await exchange.answer()).text)


def mcp_server() -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("notes")

    @server.tool()
    async def note(name: str, text: str, ctx: Context[Any]) -> str:
        await get_session_state(ctx).set(name, text)
        return "noted"

    @server.tool()
    async def notes(ctx: Context[Any]) -> str:
        return json.dumps(await get_session_state(ctx).items())

    return server


def fastmcp_server() -> fastmcp.FastMCP[Any]:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP("notes")

    @server.tool
    async def note(name: str, text: str, ctx: fastmcp.Context) -> str:
        await get_session_state(ctx).set(name, text)
        return "noted"

    @server.tool
    async def notes(ctx: fastmcp.Context) -> str:
        return json.dumps(await get_session_state(ctx).items())

    return server


@pytest.mark.parametrize("make", [mcp_server, fastmcp_server], ids=["MCPServer", "FastMCP"])
async def test_state_is_the_same_on_every_instance_and_after_a_restart(make: Any) -> None:
    store = MemorySessionStore()
    async with running(one := durable_app(make(), store)) as tasks, running(two := durable_app(make(), store)) as more:
        here = Client(one, tasks)
        session_id = await here.handshake()
        there = Client(two, more, session_id=session_id)
        other = Client(two, more)
        await other.handshake()
        for number, client in enumerate((here, there, here)):
            assert (await client.call("note", {"name": str(number), "text": "é"})).text == "noted"
        expected = {"0": "é", "1": "é", "2": "é"}
        for client in (here, there):
            assert json.loads((await client.call("notes")).text) == expected
        assert json.loads((await other.call("notes")).text) == {}
    async with running(app := durable_app(make(), store)) as tasks:
        assert json.loads((await Client(app, tasks, session_id=session_id).call("notes")).text) == expected


async def test_values_are_set_read_updated_and_removed(store: FaultyStore, state: FaultyState) -> None:
    async def use(of: SessionState) -> Any:
        assert await of.get("a") is None
        assert await of.get("a", 5) == 5
        await of.set("a", {"x": [1, None, "\0"]})
        await of.set("short", 1, ttl=60)
        await of.set("long", 1, ttl=timedelta(hours=1))
        assert await of.update("sum", lambda value: value + 2, default=1) == 3
        assert await of.update("sum", lambda value: value + 2, default=1) == 5
        assert await of.items() == {"a": {"x": [1, None, "\0"]}, "short": 1, "long": 1, "sum": 5}
        store.inner.data.ahead += timedelta(seconds=61)
        await of.delete("a")
        await of.delete("a")
        for wrong in (object(), float("nan"), {1, 2}, [{1: 2}], {"x": {None: 1}}):
            with pytest.raises(InvalidValue, match="'a' is no JSON"):
                await of.set("a", wrong)
        for name in (1, None, "a\0", "x" * 1025, "fastmcp:x", "fastmcp/a:x"):
            for call in (of.set(name, 1), of.update(name, str), of.delete(name)):  # type: ignore[arg-type]
                with pytest.raises(InvalidValue, match="name"):
                    await call
        with pytest.raises(InvalidValue, match="the name 1 of a value is no text"):
            await of.get(1)  # type: ignore[arg-type]
        # These are not FastMCP's.
        await of.set("fastmcp", 1)
        await of.delete("fastmcp")
        return await of.items()

    async with instance(store, using(Notes(), use=use), state=state) as one:
        client = one.client()
        await client.handshake()
        assert await result(client.open_call("use")) == {"long": 1, "sum": 5}
        # Other sessions have state of their own.
        assert (await one.client().handshake()) != client.session_id
    assert len(store.inner.data.states) == 1


async def test_a_request_that_uses_no_state_asks_for_none_and_each_use_asks_once(
    store: FaultyStore, state: FaultyState
) -> None:
    notes = using(Notes(), get=lambda of: of.get("a"), set=lambda of: of.set("a", 1), items=lambda of: of.items())
    async with instance(store, notes, state=state) as one, instance(store, Notes(), state=state) as two:
        client = one.client()
        session_id = await client.begin()
        await client.call("add", {"a": 1, "b": 2})
        await two.client(session_id).call("add", {"a": 1, "b": 2})
        assert state.calls == []
        for tool, call in {"set": "put", "get": "get", "items": "get"}.items():
            state.calls.clear()
            await client.call(tool)
            assert state.calls == [call]


async def test_what_a_handshake_sets_is_stored_with_its_record(store: FaultyStore, state: FaultyState) -> None:
    seen: list[Any] = []

    async def begin(ctx: RequestContext) -> None:
        of = get_session_state(ctx)
        if get_restore_marker(ctx) is None:
            await of.set("a", 1)
            await of.set("b", 2, ttl=60)
            await of.set("dropped", 3)
            await of.delete("dropped")
            assert await of.update("a", lambda value: value + 10) == 11
            assert await of.get("a") == 11
            # Kept in memory until then, also in the eyes of another context of the handshake.
            assert await get_session_state(ctx).items() == {"a": 11, "b": 2}
            with pytest.raises(StateFull):
                await of.set("c", "x" * 100_000)
        else:
            # What came after the handshake is not undone.
            await of.set("a", 1)
            assert await of.update("a", lambda value: value + 10) == 12
            await of.delete("b")
        seen.append(await of.items())

    def serving() -> Notes:
        notes = using(Notes(), items=lambda of: of.items(), change=lambda of: of.set("a", 12))
        notes.on_initialize = begin
        return notes

    async with instance(store, serving(), state=state) as one:
        client = one.client()
        session_id = await client.handshake()
        assert state.calls == []
        assert await result(client.open_call("items")) == {"a": 11, "b": 2}
        await result(client.open_call("change"))
    # A replay finds what is stored, and changes nothing.
    async with instance(store, serving(), state=state) as one:
        await result(one.client(session_id).open_call("items"))
    assert seen == [{"a": 11, "b": 2}, {"a": 12, "b": 2}]


@pytest.mark.parametrize("fault", ["handler", "store"])
async def test_what_a_failed_handshake_sets_is_dropped(store: FaultyStore, state: FaultyState, fault: str) -> None:
    notes = Notes()

    async def begin(ctx: RequestContext) -> None:
        await get_session_state(ctx).set("a", 1)
        if fault == "handler":
            raise MCPError(code=-32000, message="no")

    notes.on_initialize = begin
    if fault == "store":
        store.down("create")
    async with instance(store, notes, state=state) as one:
        assert (await one.client().initialize()).session_id is None
    assert store.inner.data.states == {}
    assert state.calls == []


async def test_what_a_task_changes_while_the_record_is_stored_counts(store: FaultyStore, state: FaultyState) -> None:
    notes = using(Notes(), items=lambda of: of.items())
    held = store.hold("create", after=True)

    async with instance(store, notes, state=state) as one:

        async def begin(ctx: RequestContext) -> None:
            of = get_session_state(ctx)
            await of.set("early", 1)
            await of.set("dropped", 3)

            async def late() -> None:
                await held.wait_entered()
                await of.set("late", 2)
                assert await of.update("early", lambda value: value + 1, default=0) == 2
                await of.delete("dropped")
                assert await of.items() == {"early": 2, "late": 2}
                held.release()

            one.tasks.start_soon(late)

        notes.on_initialize = begin
        client = one.client()
        await client.handshake()
        assert await result(client.open_call("items")) == {"early": 2, "late": 2}


async def test_an_update_that_another_write_overtakes_is_made_again(store: FaultyStore, state: FaultyState) -> None:
    runs: list[int] = []
    rivals = 3

    async def overtake() -> None:
        nonlocal rivals
        if rivals:
            rivals -= 1
            assert await state.inner.put(session_key(session_id), new_state("sum", str(100 * rivals))) is not None

    def add(value: int) -> int:
        runs.append(value)
        return value + 1

    notes = using(Notes(), add=lambda of: of.update("sum", add, default=0))
    async with instance(store, notes, state=state) as one:
        client = one.client()
        session_id = await client.handshake()
        state.before("put", overtake)
        assert await result(client.open_call("add")) == 1
        assert runs == [0, 200, 100, 0]
        rivals = 10
        runs.clear()
        assert "StateConflict: other writes of the value were faster 10 times" in (await client.call("add")).text
        assert len(runs) == 10


async def test_no_update_of_calls_at_once_is_lost(store: FaultyStore, state: FaultyState) -> None:
    def serving() -> Notes:
        return using(
            Notes(), add=lambda of: of.update("sum", lambda value: value + 1, default=0), get=lambda of: of.get("sum")
        )

    async def turn() -> None:
        await anyio.lowlevel.checkpoint()

    async with instance(store, serving(), state=state) as one, instance(store, serving(), state=state) as two:
        client = one.client()
        session_id = await client.handshake()
        state.before("put", turn)
        others = [client, two.client(session_id)]
        # Many more than there are tries.
        calls = [others[number % 2].open_call("add") for number in range(40)]
        assert sorted([await result(call) for call in calls]) == list(range(1, 41))
        assert await result(client.open_call("get")) == 40


@pytest.mark.parametrize("operation", ["get", "put"])
async def test_a_call_waits_for_a_store_that_is_away_and_takes_effect_once(
    store: FaultyStore, state: FaultyState, operation: str
) -> None:
    runs: list[int] = []

    def add(value: int) -> int:
        runs.append(value)
        return value + 1

    notes = using(Notes(), add=lambda of: of.update("sum", add, default=0))
    async with instance(store, notes, state=state, outage_patience=20.0) as one:
        client = one.client()
        await client.handshake()
        # Also where it has taken effect, and the answer is lost.
        state.lose_the_answer_of(operation)
        call = client.open_call("add")
        await until(lambda: waiting_at(gate_of(one.manager))[0] == 1)
        store.up()
        assert await result(call) == 1
        assert runs == [0]


async def test_a_call_fails_when_the_store_stays_away_and_the_session_goes_on(
    store: FaultyStore, state: FaultyState
) -> None:
    notes = using(Notes(), get=lambda of: of.get("a"), set=lambda of: of.set("a", 1))
    async with instance(store, notes, state=state, outage_patience=0.2) as one:
        client = one.client()
        await client.handshake()
        state.down()
        for tool in ("get", "set"):
            assert (await client.call(tool)).text.startswith("StoreUnavailable")
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        state.up()
        await until(lambda: gate_of(one.manager).is_open)
        assert await result(client.open_call("set")) is None
        assert await result(client.open_call("get")) == 1


async def test_a_session_that_ended_meanwhile_has_no_state(store: FaultyStore, state: FaultyState) -> None:
    said: list[str] = []

    async def use(of: SessionState) -> None:
        await of.set("a", 1)
        await store.inner.end(session_key(session_id), reason=EndReason.OPERATOR)
        for call in (of.get("a"), of.items(), of.set("a", 1), of.delete("a"), of.update("a", str)):
            with pytest.raises(NoSession) as raised:
                await call
            said.append(str(raised.value))

    async with instance(store, using(Notes(), use=use), state=state) as one:
        client = one.client()
        session_id = await client.handshake()
        await client.call("use")
    assert said == ["the session has ended"] * 5
    assert store.inner.data.states == {}


async def test_the_bounds_are_those_of_the_policy(store: SessionStore) -> None:
    memory = MemorySessionStore()
    notes = using(Notes(), set=lambda of: of.set("a", "x" * 100))
    async with instance(memory, notes, state=StatePolicy(max_value_bytes=101)) as one:
        client = one.client()
        await client.handshake()
        assert "StateFull: a value has 102 bytes" in (await client.call("set")).text


async def test_without_a_session_the_error_says_why(store: FaultyStore) -> None:
    with pytest.raises(NoSession, match="no HTTP request"):
        get_session_state(None)
    with pytest.raises(NoSession, match="no HTTP request"):
        get_session_state(object())
    why: list[str] = []

    def note(ctx: RequestContext) -> None:
        with pytest.raises(NoSession) as raised:
            get_session_state(ctx)
        why.append(str(raised.value))

    notes = Notes()
    notes.on_message = note
    # A store that is not ours, without a store of state.
    async with instance(store, notes) as one:
        await one.client().initialize()
        # And a client without sessions, of the app whose other clients have some.
        answer = await one.client(headers={"mcp-protocol-version": "2026-07-28"}).request(
            "tools/list", modern(), mcp_method="tools/list"
        )
        assert answer.status == 200, answer
    notes = Notes()
    notes.on_message = note
    app = notes.server.streamable_http_app(stateless_http=True, json_response=True)
    async with running(app) as tasks:
        assert (await Client(app, tasks).initialize()).status == 200
    assert [text.split(";")[0] for text in why] == [
        "the sessions' store has no StateStore beside it",
        "protocol 2026-07-28 and later has no sessions",
        "the server is stateless, or the request did not come through the app that durable_app returned",
    ]


def modern() -> dict[str, Any]:
    """Params of a request at 2026-07-28."""
    return {
        "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
    }
