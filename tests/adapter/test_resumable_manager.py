"""The SDK's own session manager with an event log: each session resumes its own streams, and nobody else's."""

from __future__ import annotations

import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.streamable_http_manager import StreamableHTTPASGIApp
from sqlalchemy.engine import make_url
from starlette.applications import Starlette
from starlette.routing import Route

from mcp_session_store import (
    ConfigurationError,
    MemoryEventLog,
    MemorySessionStore,
    ResumableSessionManager,
    SqlEventLog,
    StoreUnavailable,
    session_key,
)
from mcp_session_store.records import EventKind, instance_name
from mcp_session_store.sql.schema import migrate
from tests.adapter.asgi import Client, seen_by_a_client, until
from tests.adapter.instances import Notes, principal, running
from tests.adapter.talking import Talking, hears, told
from tests.adapter.test_event_ids import bad_ids, refusal
from tests.adapter.test_event_outages import away
from tests.adapter.test_resumption import one_more_turn, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import TaskGroup

    from mcp_session_store.adapter.streams.recorder import EventRecorder

pytestmark = pytest.mark.anyio

TEXTS = [str(n) for n in range(8)]


@pytest.fixture
async def log(database_url: str) -> SqlEventLog:
    """A log without records of sessions, on each database; who serves opens and closes it."""
    if make_url(database_url).get_backend_name() == "postgresql":
        await migrate.upgrade(database_url)
    return SqlEventLog(database_url, standalone=True)


@dataclass
class Process:
    """One that serves, with its sessions in memory."""

    app: Starlette
    manager: ResumableSessionManager
    tasks: TaskGroup

    def client(self, session_id: str | None = None, **settings: Any) -> Client:
        """A client of it."""
        return Client(self.app, self.tasks, session_id=session_id, **settings)

    @property
    def recorder(self) -> EventRecorder:
        return self.manager._recorder


@asynccontextmanager
async def process(log: SqlEventLog, notes: Notes, **options: Any) -> AsyncIterator[Process]:
    """Start a process; at the end its requests are cancelled, and it is shut down.

    Args:
        log: Its log.
        notes: Its server.
        options: For the manager.
    """
    manager = ResumableSessionManager(notes.server, log, **options)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with log, manager.run():
            yield

    app = Starlette(routes=[Route("/mcp", StreamableHTTPASGIApp(manager))], lifespan=lifespan)
    async with running(app) as tasks:
        yield Process(app, manager, tasks)


# Each event once, in its order


async def test_a_call_is_resumed_from_each_of_its_events(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes, retry_interval=50) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client, request_id="seven")
        for text in TEXTS:
            await call.say(text)
            # What is said on other streams is none of this one.
            await call.tell(f"to all {text}")
        await hears(exchange, *TEXTS)
        ids = [str(event.id) for event in exchange.events]
        assert exchange.events[0].retry == "50"
        await exchange.leave()
        for position in range(len(ids)):
            resumed = await opened(client, ids[position])
            await hears(resumed, *TEXTS[position:])
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["done"]
        ids.append(str(resumed.last_event_id))
        for position in range(len(ids) - 1):
            answered = client.open_stream(ids[position])
            await answered.end()
            assert told(answered.messages) == [*TEXTS, "done"][position:]
            assert answered.messages[-1]["id"] == "seven"
            assert [event.id for event in answered.events if event.data] == ids[position + 1 :]
        assert (await client.open_stream(ids[-1]).answer()).status == 405
        assert one.recorder.unfinished == {}


async def test_an_answer_that_comes_while_the_log_is_read_is_not_lost(
    log: SqlEventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        read, go_on = log.read, anyio.Event()

        async def read_and_wait(*args: Any, **options: Any) -> Any:
            page = await read(*args, **options)
            await go_on.wait()
            return page

        monkeypatch.setattr(log, "read", read_and_wait)
        resumed = client.open_stream(last_event_id)
        await one_more_turn()
        await call.say("a")
        call.answer()
        await until(lambda: one.recorder.unfinished == {})
        go_on.set()
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]
        assert (await log.heads([session_key(session_id)])).keys() == {session_key(session_id)}


async def test_a_server_that_closes_a_stream_has_its_client_come_back(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        await call.close()
        await exchange.end()
        await call.say("b")
        resumed = await opened(client, exchange.last_event_id)
        await hears(resumed, "b")
        await call.close()
        await resumed.end()
        await call.say("c")
        call.answer()
        last = await client.open_stream(resumed.last_event_id).answer()
        assert told(last.messages) == ["c", "done"]


async def test_the_standalone_stream_goes_on_after_a_cut(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        stream = await opened(client)
        await call.tell("a")
        await hears(stream, "a")
        assert (await client.open_stream().answer()).status == 409
        last_event_id = await stream.leave()
        await call.tell("b", "c")
        await call.say("on its own stream")
        resumed = await opened(client, last_event_id)
        await hears(resumed, "b", "c")
        await call.tell("d")
        await hears(resumed, "b", "c", "d")
        await hears(exchange, "on its own stream")


async def test_while_events_cannot_be_stored_streams_go_on_without_ids(
    log: SqlEventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client()
        await client.handshake()
        gone, last_event_id = await away(talking, client)
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")

        async def fail(*_args: Any, **_options: Any) -> Any:
            raise StoreUnavailable("it is down")

        with monkeypatch.context() as down:
            for operation in ("append", "read"):
                down.setattr(log, operation, fail)
            await call.say("b")
            await hears(exchange, "a", "b")
            assert exchange.events[-1].id is None
            await gone.say("kept")
            gone.answer()
            young, young_exchange = await talking.call(client)
            await young.say("c")
            await hears(young_exchange, "c")
            assert {event.id for event in young_exchange.events} == {None}
            assert (await client.open_stream(last_event_id).answer()).status == 503
        await until(lambda: not one.recorder.down and not one.recorder._kept)
        resumed = await client.open_stream(last_event_id).answer()
        assert told(resumed.messages) == ["kept", "done"]
        for some, its in ((call, exchange), (young, young_exchange)):
            some.answer()
            await its.end()
        assert told(exchange.messages) == ["a", "b", "done"]
        assert told(young_exchange.messages) == ["c", "done"]
        assert one.recorder.unfinished == {}


# Nobody else's


async def test_sessions_that_use_the_same_ids_each_resume_their_own_streams(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        sessions = []
        for number in range(3):
            client = one.client()
            await client.handshake()
            stream = await opened(client)
            call, exchange = await talking.call(client, request_id=7)
            await until(lambda exchange=exchange: exchange.last_event_id is not None)  # type: ignore[misc]
            left = str(await stream.leave()), str(await exchange.leave())
            sessions.append((client, call, [f"{number}: {text}" for text in TEXTS], left))
        for place in range(len(TEXTS)):
            for _, call, texts, _ in sessions:
                await call.say(texts[place])
                await call.tell(f"to all: {texts[place]}")
        for client, call, texts, (standalone, own) in sessions:
            await hears(await opened(client, standalone), *(f"to all: {text}" for text in texts))
            resumed = await opened(client, own)
            await hears(resumed, *texts)
            call.answer(f"answer to {texts[0]}")
            await resumed.end()
            assert told(resumed.messages) == [*texts, f"answer to {texts[0]}"]


async def test_an_id_of_another_session_is_refused_like_one_that_nobody_gave(
    log: SqlEventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client, other = one.client(), one.client()
        await client.handshake()
        await other.handshake()
        bad = await bad_ids(client, other, talking)
        call, exchange = await talking.call(other)
        await until(lambda: exchange.last_event_id is not None)
        bad["another session's, of a call that runs"] = str(exchange.last_event_id)
        expected = seen_by_a_client(await refusal(client, bad["malformed"]))
        assert expected[0] == 400
        with monkeypatch.context() as nothing:
            nothing.delattr(SqlEventLog, "read")
            for name, last_event_id in bad.items():
                assert seen_by_a_client(await refusal(client, last_event_id)) == expected, name
        # Nothing of the other one was closed.
        await call.say("a")
        await hears(exchange, "a")
        assert (await client.ping()).status == 200


async def test_somebody_elses_session_is_answered_as_the_sdk_does(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client(user=principal("alice"))
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        expected = seen_by_a_client(await one.client("unknown", user=principal("bob")).ping())
        assert expected[0] == 404
        for user in (principal("bob"), None):
            thief = one.client(session_id, user=user)
            for last_event_id in (exchange.events[0].id, None, "malformed"):
                refused = seen_by_a_client(await thief.open_stream(last_event_id).answer())
                assert (refused[0], refused[2]) == (expected[0], expected[2])
        await call.say("b")
        await hears(exchange, "a", "b")
        await hears(await opened(client, exchange.events[0].id), "a", "b")


# The end


async def test_nothing_is_left_of_a_session_that_was_ended_while_calls_ran(log: SqlEventLog) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client, other = one.client(), one.client()
        session_id = await client.handshake()
        await other.handshake()
        _, connected = await talking.call(client)
        _, last_event_id = await away(talking, client)
        resumed = await opened(client, last_event_id)
        stream = await opened(client)
        goes_on, exchange = await talking.call(other)
        assert (await client.delete()).status == 200
        for open_response in (connected, resumed, stream):
            await open_response.end()
        await until(lambda: len(one.recorder.unfinished) == 1)
        assert one.manager._events.keys() == {other.session_id}
        assert one.recorder.following.of(session_key(session_id)) == []
        assert (await client.open_stream(last_event_id).answer()).status == 404
        goes_on.answer()
        await exchange.end()
        assert told(exchange.messages) == ["done"]
        assert one.recorder.unfinished == {}


async def test_a_session_is_unknown_after_a_restart_though_its_events_are_kept(
    log: SqlEventLog, database_url: str
) -> None:
    talking = Talking()
    async with process(log, talking.notes) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        await call.say("a")
        (name,) = one.recorder.unfinished
        assert (await log.last_beats([one.recorder.name])).keys() == {one.recorder.name}
    again = Talking()
    async with process(SqlEventLog(database_url, standalone=True), again.notes) as two:
        assert (await two.client(session_id).open_stream(last_event_id).answer()).status == 404
        there = two.recorder.log
        assert await there.last_beats([one.recorder.name]) == {}
        page = await there.read(session_key(session_id), name, after=0)
        assert page is not None
        assert [event.kind for event in page.events][:2] == [EventKind.PRIMING, EventKind.NOTIFICATION]
        # Whoever wants it begins anew.
        client = two.client()
        await client.handshake()
        await opened(client)
    assert instance_name(one.recorder.instance) != instance_name(two.recorder.instance)


# What cannot work


def test_what_cannot_work_is_refused_by_name(sqlite_url: str) -> None:
    log = SqlEventLog(sqlite_url, standalone=True)
    serve = partial(ResumableSessionManager, Notes().server)
    for useless in (SqlEventLog(sqlite_url), MemoryEventLog(MemorySessionStore()), sqlite_url, None):
        with pytest.raises(ConfigurationError, match="standalone"):
            serve(useless)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="event_store"):
        serve(log, event_store=object())
    with pytest.raises(ConfigurationError, match="stateless"):
        serve(log, stateless=True)
    # What asks for nothing is no mistake.
    serve(log, event_store=None, stateless=False)
