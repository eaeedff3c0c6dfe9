"""How a server is told to keep events: by a policy, by a log, by the environment, in each framework."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.mcpserver import Context, MCPServer

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    EventPolicy,
    MemoryEventLog,
    MemorySessionStore,
    SqlEventLog,
    SqlSessionStore,
    durable_app,
)
from mcp_session_store.environment import ENVIRONMENT_PREFIX
from tests.support.asgi import Client, until
from tests.support.faulty_stores import FaultyLog
from tests.support.frameworks import Events, Made
from tests.support.instances import Notes, instance, running
from tests.support.streams import away, opened
from tests.support.talking import Talking, told

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["MCPServer", "Server", "FastMCP"])
def kind(request: pytest.FixtureRequest) -> str:
    """A framework."""
    kind: str = request.param
    return kind


def log_of(made: Made) -> Any:
    """The event log that the app of a server uses; `None`: none."""
    manager = made.lowlevel.session_manager
    assert isinstance(manager, DurableSessionManager)
    return manager.event_log


# What `events` may be


async def test_events_are_off_unless_they_are_asked_for(kind: str, sqlite_url: str) -> None:
    for options in ({}, {"events": False}):
        made = Made(kind)
        made.app(sqlite_url, **options)
        assert log_of(made) is None


async def test_events_are_kept_in_the_database_of_the_sessions(kind: str, sqlite_url: str) -> None:
    made = Made(kind)
    app = made.app(sqlite_url, events=True, namespace="notes")
    log = log_of(made)
    assert isinstance(log, SqlEventLog)
    assert log.namespace == "notes"
    assert log.policy == EventPolicy()
    await resumes(app)


async def test_events_are_kept_in_the_database_of_a_store_that_is_given(kind: str, sqlite_url: str) -> None:
    async with SqlSessionStore(sqlite_url) as store:
        for _ in range(2):
            made = Made(kind)
            await resumes(made.app(store, events=True))
            # The store is not closed with the log.
            assert await store.changes(None)


async def test_events_are_kept_by_the_policy_that_is_given(kind: str, sqlite_url: str) -> None:
    made = Made(kind)
    policy = EventPolicy(max_age=timedelta(minutes=3), max_events_per_session=10, max_bytes_per_session=2000)
    made.app(sqlite_url, events=policy)
    assert log_of(made).policy is policy


async def test_events_are_kept_by_the_log_that_is_given_and_it_is_not_closed(
    kind: str, store: FaultyStore, log: FaultyLog
) -> None:
    made = Made(kind)
    app = made.app(store, events=log, relay=log.mailbox)
    assert log_of(made) is log
    await resumes(app)
    assert log.closed == 0


async def test_a_log_goes_with_a_url_too(sqlite_url: str) -> None:
    async with SqlEventLog(sqlite_url) as log:
        made = Made("Server")
        await resumes(made.app(sqlite_url, events=log))
        # It is open still.
        assert await log.heads([]) == {}


async def test_an_app_with_events_can_be_started_again(kind: str, sqlite_url: str) -> None:
    made = Made(kind)
    app = made.app(sqlite_url, events=True)
    for _ in range(2):
        await resumes(app)


async def test_a_manager_closes_the_log_if_it_is_told_to(store: FaultyStore, log: FaultyLog) -> None:
    for close in (False, True):
        manager = DurableSessionManager(
            Notes().server, store, event_log=log, mailbox=log.mailbox, close_event_log=close
        )
        async with manager.run():
            assert log.closed == 0
        assert log.closed == int(close)


async def resumes(app: Starlette) -> None:
    """A call has ids, and can be resumed."""
    async with running(app) as tasks:
        client = Client(app, tasks)
        await client.handshake()
        call = client.open_call("add", {"a": 1, "b": 2})
        answer = await call.answer()
        assert answer.text == "3"
        resumed = await client.open_stream(call.events[0].id).answer()
        assert resumed.text == "3"


@pytest.mark.parametrize("events", [None, 1, "yes", "1h", {"max_age": "1h"}, EventPolicy], ids=str)
async def test_what_cannot_be_is_refused(kind: str, sqlite_url: str, events: Any) -> None:
    with pytest.raises(ConfigurationError, match="events must be"):
        Made(kind).app(sqlite_url, events=events)


async def test_a_store_that_is_not_ours_has_to_bring_its_log(kind: str) -> None:
    for events in (True, EventPolicy()):
        with pytest.raises(ConfigurationError, match=r"MemorySessionStore.*give its EventLog"):
            Made(kind).app(MemorySessionStore(), events=events)
    store = MemorySessionStore()
    await resumes(Made(kind).app(store, events=MemoryEventLog(store)))


async def test_events_go_to_one_place(kind: str, store: FaultyStore, log: FaultyLog) -> None:
    with pytest.raises(ConfigurationError, match="event_log and event_store"):
        Made(kind).app(store, events=log, event_store=Events())


async def test_a_log_of_another_namespace_is_refused(store: FaultyStore) -> None:
    other = MemorySessionStore(namespace="other")
    with pytest.raises(ConfigurationError, match=r"'other'.*'default'"):
        Made("Server").app(store, events=MemoryEventLog(other))


async def test_an_event_store_is_no_event_log(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match=r"event_log must be an EventLog.*event_store"):
        DurableSessionManager(Notes().server, store, event_log=Events())  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), True, "30", None])
async def test_a_timeout_that_cannot_work_is_named(kind: str, store: FaultyStore, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="instance_timeout"):
        Made(kind).app(store, instance_timeout=value)


# The policy


async def test_a_policy_comes_from_the_environment(kind: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}EVENTS_MAX_AGE", " 90m ")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}EVENTS_MAX_EVENTS_PER_SESSION", "500")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}EVENTS_MAX_BYTES_PER_SESSION", "")
    made = Made(kind)
    made.app(sqlite_url, events=True)
    assert log_of(made).policy == EventPolicy(max_age=timedelta(minutes=90), max_events_per_session=500)
    # What is given in code is what counts.
    made = Made(kind)
    made.app(sqlite_url, events=EventPolicy(max_events_per_session=20))
    assert log_of(made).policy == EventPolicy(max_events_per_session=20)


async def test_an_environment_that_makes_no_sense_is_refused_only_where_it_is_asked(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}EVENTS_MAX_AGE", "soon")
    with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT_PREFIX}EVENTS_MAX_AGE"):
        Made("Server").app(sqlite_url, events=True)
    Made("Server").app(sqlite_url, events=EventPolicy())
    Made("Server").app(sqlite_url)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_age", "none", None),
        ("max_age", "NONE", None),
        ("max_age", "10ms", timedelta(milliseconds=10)),
        ("max_age", "7d", timedelta(days=7)),
        ("max_events_per_session", "10", 10),
        ("max_events_per_session", "1000000", 1_000_000),
        ("max_bytes_per_session", "1024", 1024),
        ("max_bytes_per_session", str(1024**3), 1024**3),
    ],
)
def test_a_variable_is_read(name: str, text: str, value: Any) -> None:
    variable = f"MCP_SESSION_STORE_EVENTS_{name.upper()}"
    assert getattr(EventPolicy.from_environment({variable: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_age", "3600"),
        ("max_age", "0s"),
        ("max_age", "-1h"),
        ("max_age", "1 year"),
        ("max_events_per_session", "9"),
        ("max_events_per_session", "1000001"),
        ("max_events_per_session", "none"),
        ("max_events_per_session", "1.5"),
        ("max_bytes_per_session", "1023"),
        ("max_bytes_per_session", "16MB"),
        ("max_bytes_per_session", str(1024**3 + 1)),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(name: str, text: str) -> None:
    variable = f"MCP_SESSION_STORE_EVENTS_{name.upper()}"
    with pytest.raises(ConfigurationError, match=variable):
        EventPolicy.from_environment({variable: text})


def test_variables_of_the_retention_policy_are_none_of_the_event_policys() -> None:
    assert EventPolicy.from_environment({"MCP_SESSION_STORE_IDLE": "nonsense"}) == EventPolicy()


@pytest.mark.parametrize("age", [3600, 3600.0, "soon", timedelta(0)])
def test_a_policy_that_makes_no_sense_is_refused(age: Any) -> None:
    with pytest.raises(ValueError, match="max_age"):
        EventPolicy(max_age=age)


# A server of each framework


async def test_a_tool_of_each_framework_reports_progress_and_has_its_client_come_back(
    kind: str, store: FaultyStore, log: FaultyLog
) -> None:
    proceed = anyio.Event()
    app: Starlette
    if kind == "Server":
        talking = Talking()
        app = durable_app(talking.notes.server, store, events=log, relay=log.mailbox, retry_interval=50)
    else:
        server: Any = MCPServer("notes") if kind == "MCPServer" else fastmcp.FastMCP("notes")
        context: Any = Context if kind == "MCPServer" else fastmcp.Context

        async def talk(ctx: Any) -> str:
            await ctx.report_progress(1, 2, "a")
            await ctx.close_sse_stream()
            await proceed.wait()
            await ctx.report_progress(2, 2, "b")
            return "done"

        talk.__annotations__["ctx"] = context
        server.tool()(talk) if kind == "MCPServer" else server.tool(talk)
        app = durable_app(server, store, events=log, relay=log.mailbox, retry_interval=50)
    async with running(app) as tasks:
        client = Client(app, tasks)
        await client.handshake()
        params = {"name": "talk", "arguments": {}, "_meta": {"progressToken": "t"}}
        exchange = client.open_request("tools/call", params)
        if kind == "Server":
            call = await talking.begun()
            await call.say("a")
            await call.close()
        await exchange.end()
        assert len(exchange.messages) <= 1
        assert exchange.events[0].retry == "50"
        resumed = await opened(client, exchange.last_event_id)
        proceed.set()
        if kind == "Server":
            await call.say("b")
            call.answer()
        await resumed.end()
        # What was on its way when the stream was closed is on the next one.
        assert len(exchange.messages) + len(resumed.messages) == 3
        assert resumed.messages[-1]["result"]["content"][0]["text"] == "done"


async def test_without_a_sweeper_of_its_own_an_instance_sweeps_events(store: FaultyStore, log: FaultyLog) -> None:
    async with instance(store, events=log, sweep_interval=0.05):
        await until(lambda: log.background["sweep"] >= 2)
    log.background.clear()
    async with instance(store, events=log, sweep_interval=None):
        await until(lambda: log.mailbox.background["beat"] >= 1)
    assert log.background["sweep"] == 0


async def test_an_instance_that_nobody_waits_in_asks_the_log_for_nothing(store: FaultyStore, log: FaultyLog) -> None:
    async with instance(store, events=log, sweep_interval=None) as one:
        await one.client().handshake()
        await anyio.sleep(0.6)
        assert log.calls == []
        assert set(log.background) <= {"open", "beat", "heads", "listen"}
        assert log.background["heads"] == 0


async def test_hosts_of_the_log_are_told_by_hints_before_they_look(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody looks by himself within a test.
    monkeypatch.setattr("mcp_session_store.adapter.streams.recorder.POLL_INTERVAL", 3600.0)
    talking = Talking()
    other_log = FaultyLog(other_store)
    async with instance(store, talking.notes, events=log) as one, instance(other_store, events=other_log) as two:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        resumed = await opened(two.client(session_id), last_event_id)
        await until(lambda: other_log.background["listen"] == 1)
        await call.say("a")
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]
