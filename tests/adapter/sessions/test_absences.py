"""Copies at work whose clients are away from this instance: in use while they are active anywhere, and not for good."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.exceptions import MCPError, NoBackChannelError
from mcp.shared.message import ServerMessageMetadata

from mcp_session_store import StoreUnavailable
from mcp_session_store.adapter import clock as adapter_clock
from mcp_session_store.adapter.sessions import absences
from tests.support.asgi import until
from tests.support.asking import Asking, roots, text_of
from tests.support.instances import Notes, instance, open_session
from tests.support.internals import (
    changes_of,
    evict_unused,
    instances_of,
    registry_of,
    report_activity,
    resident_of,
    stopping_in,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from anyio.abc import TaskGroup

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Clock, Instance, RequestContext

pytestmark = pytest.mark.anyio

LONG = 3600.0
AWAY = timedelta(seconds=31)
EVICTED = timedelta(minutes=5, seconds=1)
GONE = timedelta(minutes=8)
"""Beyond `evict_after`, and the time within which other instances report that a session is in use."""


class Background(Notes):
    """A server that asks its clients outside of calls: in a task that the tool `start` begins; `ping` sends a ping."""

    def __init__(self) -> None:
        super().__init__()
        self.tools["start"] = partial(self._start, types.ListRootsRequest(), types.ListRootsResult)
        self.tools["ping"] = partial(self._start, types.PingRequest(), types.EmptyResult)
        self.tools["ask"] = self._ask
        self.tasks: TaskGroup | None = None
        self.outcomes: list[Any] = []
        """What the tasks got, answers and errors alike."""
        self.scope = anyio.CancelScope()
        """Of the latest task."""

    async def _start(self, request: Any, result: Any, ctx: RequestContext) -> str:
        assert self.tasks is not None
        self.tasks.start_soon(self._note, ctx.session.send_request(request, result))
        return "started"

    async def _ask(self, ctx: RequestContext) -> str:
        related = ServerMessageMetadata(related_request_id=ctx.request_id)
        await self._note(ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult, metadata=related))
        return "asked"

    async def _note(self, answer: Awaitable[Any]) -> None:
        with anyio.CancelScope() as self.scope:
            try:
                self.outcomes.append(await answer)
            except MCPError as error:
                self.outcomes.append(error)


def errors(outcomes: list[Any]) -> list[int]:
    """Return the codes of the errors that there are in place of answers."""
    return [outcome.code if isinstance(outcome, MCPError) else 0 for outcome in outcomes]


async def asked_outside(one: Instance, client: Client, tool: str = "start") -> Exchange:
    """Have a task of the session ask the client; return the stream on which the question came."""
    assert isinstance(one.notes, Background)
    one.notes.tasks = one.tasks
    stream = await client.get_stream()
    assert (await client.call(tool)).text == "started"
    await stream.next()
    return stream


async def leave(*exchanges: Exchange) -> None:
    """Have a client go away."""
    for exchange in exchanges:
        exchange.disconnect()
        await exchange.end()


async def pass_by(clock: Clock, passed: timedelta, *instances: Instance) -> None:
    """Let time pass, at whose end the instances report activity, and look which copies are in use."""
    clock.advance(passed)
    for one in instances:
        await report_activity(one.manager)
    for one in instances:
        await evict_unused(one.manager)


def question_of(one: Instance, client: Client) -> Any:
    """Return the id of the one question that a copy asks."""
    (question_id,) = resident_of(one.manager, str(client.session_id)).loop.asked
    return question_id


# In use


@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
async def test_a_copy_that_asks_outside_of_calls_stays_while_its_client_is_active_on_another_instance(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog, clock: Clock, events: bool
) -> None:
    notes = Background()
    async with (
        instance(store, notes, events=log if events else False, end_within=LONG, instance_timeout=LONG) as one,
        instance(other_store, events=other_log if events else False, end_within=LONG, instance_timeout=LONG) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        await leave(await asked_outside(one, client))
        elsewhere = two.client(session_id)
        for _ in range(12):
            assert (await elsewhere.call("add", {"a": 1, "b": 2})).text == "3"
            await pass_by(clock, timedelta(minutes=1.5), one, two)
        assert one.residents == 1
        assert notes.outcomes == []
        for _ in range(2):
            # After a pause an instance sends nothing before others had the time to come back, too.
            clock.advance(timedelta(seconds=15))
            for manager in (one.manager, two.manager):
                await instances_of(manager).beat()
        assert (await elsewhere.respond(question_of(one, client), roots("x"))).status == 202
        await until(lambda: len(notes.outcomes) == 1)
        assert str(notes.outcomes[0].roots[0].uri) == "file:///x"
        # Nothing keeps it any more.
        assert one.residents == 1
        await pass_by(clock, EVICTED, one)
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))


async def test_a_copy_that_asks_outside_of_calls_makes_no_room_while_its_client_is_here(
    store: FaultyStore, other_store: FaultyStore, clock: Clock
) -> None:
    notes = Background()
    async with (
        instance(store, notes, max_sessions=2, end_within=LONG, instance_timeout=LONG) as one,
        instance(other_store, end_within=LONG, instance_timeout=LONG) as two,
    ):
        first, second = one.client(), one.client()
        for client in (first, second):
            await client.handshake()
        streams = [await asked_outside(one, client) for client in (first, second)]
        await pass_by(clock, GONE, one, two)
        assert (await one.client().initialize()).status == 503
        await leave(*streams)
        assert (await one.client().initialize()).status == 503
        clock.advance(timedelta(seconds=5))
        assert (await two.client(first.session_id).call("add", {"a": 1, "b": 2})).text == "3"
        await pass_by(clock, AWAY, two, one)
        # The one whose client has not been heard of elsewhere.
        assert (await one.client().initialize()).status == 200
        assert {session.session_id for session in registry_of(one.manager)} >= {first.session_id}
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
        one.assert_seats_match()


async def test_a_call_makes_no_room_while_its_client_is_active_on_another_instance(
    store: FaultyStore, other_store: FaultyStore, clock: Clock
) -> None:
    async with (
        instance(store, max_sessions=1, end_within=LONG, instance_timeout=LONG) as one,
        instance(other_store, end_within=LONG, instance_timeout=LONG) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        await leave(call)
        clock.advance(timedelta(seconds=5))
        for _ in range(8):
            assert (await two.client(session_id).call("add", {"a": 1, "b": 2})).text == "3"
            await pass_by(clock, timedelta(seconds=100), two, one)
            assert (await one.client().initialize()).status == 503
        await pass_by(clock, GONE, two, one)
        assert (await one.client().initialize()).status == 200
        await until(lambda: one.notes.waiting == 0)


# Not for good


@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
@pytest.mark.parametrize("asks", ["outside", "in a call"])
async def test_a_question_to_a_client_that_is_away_for_good_ends_with_an_error_and_the_copy_leaves(
    store: FaultyStore, log: FaultyLog, clock: Clock, asks: str, events: bool
) -> None:
    notes = Background()
    async with instance(store, notes, events=log if events else False, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        if asks == "outside":
            await leave(await asked_outside(one, client))
        else:
            call = client.open_call("ask")
            session = resident_of(one.manager, str(client.session_id))
            await until(lambda: session.loop.asked != {})
            await leave(call)
        await pass_by(clock, EVICTED, one)
        assert notes.outcomes == []
        assert one.residents == 1
        await pass_by(clock, GONE - EVICTED, one)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
        if asks == "in a call":
            assert "has not been active for 480 seconds" in str(notes.outcomes[0])
        await one.at_rest()
        await until(lambda: not registry_of(one.manager).busy)
        await evict_unused(one.manager)
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))
        # The session lives on.
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_a_call_that_asks_nothing_runs_on_when_a_question_beside_it_ends(
    store: FaultyStore, log: FaultyLog, clock: Clock
) -> None:
    notes = Background()
    async with instance(store, notes, events=log, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        stream = await asked_outside(one, client)
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1 and call.last_event_id is not None)
        last_event_id = await call.leave()
        await leave(stream)
        await pass_by(clock, GONE, one)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
        await pass_by(clock, GONE, one)
        assert one.residents == 1
        notes.proceed.set()
        assert (await client.open_stream(last_event_id).answer()).text == "waited"


async def test_a_task_that_asks_again_and_again_keeps_no_copy(store: FaultyStore, log: FaultyLog, clock: Clock) -> None:
    notes = Background()

    async def ask_again(ctx: RequestContext) -> str:
        async def ask() -> None:
            while notes.outcomes.count("asked") < 5:
                notes.outcomes.append("asked")
                with contextlib.suppress(MCPError):
                    await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)

        one.tasks.start_soon(ask)
        return "started"

    notes.tools["start"] = ask_again
    async with instance(store, notes, events=log, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        await pass_by(clock, GONE, one)
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))


@pytest.mark.parametrize("why", ["outage", "pause"])
async def test_after_an_outage_or_a_pause_other_instances_have_time_to_report(
    store: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    # It has its own name of the clock, which each request asks.
    monkeypatch.setattr("mcp_session_store.adapter.sessions.changes.now", adapter_clock.now)
    notes = Background()
    async with instance(store, notes, end_within=10) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        changes = changes_of(one.manager)
        await changes.poll()
        if why == "outage":
            store.down("changes", "load", "touch")
            for _ in range(30):
                clock.advance(timedelta(seconds=16))
                await changes.tick()
                with contextlib.suppress(StoreUnavailable):
                    await changes.poll()
            store.up()
        else:
            clock.advance(GONE)
        await changes.poll()
        await evict_unused(one.manager)
        assert one.residents == 1
        for _ in range(9):
            clock.advance(timedelta(seconds=20))
            await changes.poll()
            await evict_unused(one.manager)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])


async def test_with_evict_after_none_questions_wait_as_long_as_their_session_lives(
    store: FaultyStore, clock: Clock
) -> None:
    notes = Background()
    async with instance(store, notes, end_within=LONG, evict_after=None) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        for _ in range(3):
            await pass_by(clock, timedelta(hours=7), one)
        assert notes.outcomes == []
        assert (await client.delete()).status == 200
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])


async def test_a_question_ends_with_its_session_when_that_expires(store: FaultyStore, clock: Clock) -> None:
    notes = Background()
    async with instance(store, notes, end_within=LONG, evict_after=None) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        await report_activity(one.manager)
        clock.advance(timedelta(days=1, minutes=1))
        await evict_unused(one.manager)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))


async def test_a_client_that_comes_back_can_still_answer(store: FaultyStore, clock: Clock) -> None:
    notes = Background()
    async with instance(store, notes, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        clock.advance(GONE)
        stream = await client.get_stream()
        await evict_unused(one.manager)
        assert (await client.respond(question_of(one, client), roots("x"))).status == 202
        await until(lambda: len(notes.outcomes) == 1)
        assert errors(notes.outcomes) == [0]
        await leave(stream)


@pytest.mark.parametrize("restored", [False, True], ids=["opened", "restored"])
async def test_a_question_that_is_asked_before_a_stream_is_open_ends_with_an_error(
    store: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.sessions.server_loop.STANDALONE_STREAM_WAIT", 0.05)
    session_id = await open_session(store) if restored else None
    notes = Notes()
    outcomes: list[Any] = []

    async def ask(ctx: RequestContext) -> None:
        try:
            await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
        except NoBackChannelError as error:
            outcomes.append(error.method)

    notes.on_initialized = ask
    async with instance(store, notes, end_within=LONG, relay=False) as one:
        client = one.client(session_id)
        await (client.ping() if restored else client.handshake())
        await until(lambda: outcomes == ["roots/list"])
        await one.at_rest()
        await pass_by(clock, EVICTED, one)
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))


async def test_a_question_of_a_call_whose_client_has_gone_without_a_way_back_ends_with_an_error(
    store: FaultyStore,
) -> None:
    notes = Asking()
    asks = anyio.Event()
    ask = notes.tools["ask"]

    async def ask_later(ctx: RequestContext) -> str:
        notes.waiting += 1
        await asks.wait()
        try:
            return await ask(ctx)
        except NoBackChannelError:
            notes.heard.append("no way")
            raise

    notes.tools["ask"] = ask_later
    async with instance(store, notes) as one:
        client = one.client()
        await client.begin()
        call = client.open_call("ask")
        await until(lambda: notes.waiting == 1)
        await leave(call)
        asks.set()
        await until(lambda: notes.heard == ["no way"])
        # Not where its client listens.
        call = client.open_call("ask")
        question = await call.next()
        assert (await client.respond(question["id"], roots("y"))).status == 202
        assert text_of(await call.next()) == "file:///y"


async def test_a_ping_keeps_no_copy(store: FaultyStore, clock: Clock) -> None:
    notes = Background()
    async with instance(store, notes, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client, "ping"))
        await pass_by(clock, EVICTED, one)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
        assert one.residents == 0


async def test_a_question_that_was_given_up_keeps_no_copy(store: FaultyStore, clock: Clock) -> None:
    notes = Background()
    async with instance(store, notes, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        stream = await asked_outside(one, client)
        session = resident_of(one.manager, str(client.session_id))
        assert session.at_work
        # The SDK withdraws it.
        notes.scope.cancel()
        await until(lambda: not session.at_work and session.loop.asked == {})
        await leave(stream)
        assert registry_of(one.manager).busy == 0
        await pass_by(clock, EVICTED, one)
        await until(lambda: one.residents == 0)


# What it costs, and what the store may do meanwhile


async def waiting(one: Instance, count: int) -> list[Client]:
    """Open sessions whose clients leave a question unanswered."""
    clients = []
    for _ in range(count):
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        clients.append(client)
    return clients


async def test_the_store_is_asked_once_a_minute_about_each_and_not_by_requests(
    store: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absences, "LOADS", 3)
    async with instance(store, Background(), max_sessions=8, end_within=LONG) as one:
        await waiting(one, 8)
        await pass_by(clock, AWAY - timedelta(seconds=5), one)
        assert store.counts()["load"] == 0
        await pass_by(clock, timedelta(seconds=5), one)
        assert store.counts()["load"] == 8
        await pass_by(clock, AWAY, one)
        for _ in range(3):
            assert (await one.client().initialize()).status == 200
        assert store.counts()["load"] == 8
        await pass_by(clock, AWAY, one)
        # One has left.
        assert store.counts()["load"] == 8 + 7


async def test_while_the_store_is_away_contact_here_counts_alone(
    store: FaultyStore, other_store: FaultyStore, clock: Clock
) -> None:
    notes = Background()
    async with (
        instance(store, notes, max_sessions=1, end_within=LONG, instance_timeout=LONG) as one,
        instance(other_store, end_within=LONG, instance_timeout=LONG) as two,
    ):
        (client,) = await waiting(one, 1)
        store.down("load")
        await pass_by(clock, AWAY - timedelta(seconds=5), two)
        assert (await two.client(client.session_id).call("add", {"a": 1, "b": 2})).text == "3"
        await pass_by(clock, timedelta(seconds=10), two)
        for passed in (timedelta(seconds=10), GONE):
            clock.advance(passed)
            with pytest.raises(Exception, match="the test says it is down"):
                await evict_unused(one.manager)
        # Nobody knows that the client has gone for good.
        assert notes.outcomes == []
        assert (await one.client().initialize()).status == 200
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])


async def test_a_store_that_is_slow_holds_nothing_up(
    store: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absences, "LOOK_TIMEOUT", 0.05)
    async with instance(store, Background(), max_sessions=2, end_within=LONG) as one:
        await waiting(one, 2)
        held = store.hold("load")
        clock.advance(AWAY)
        with pytest.raises(Exception, match=r"did not say within 0\.05 s which of 2 clients"):
            await evict_unused(one.manager)
        assert held.calls == 2
        assert (await one.client().initialize()).status == 200
        held.release()


async def test_a_copy_that_reads_nothing_gets_its_errors_when_it_reads_again(
    store: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Background()
    proceed = anyio.Event()

    async def hang(_ctx: RequestContext) -> None:
        await proceed.wait()

    async with instance(store, notes, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        await leave(await asked_outside(one, client))
        notes.on_initialize = hang
        parked = client.open_initialize()
        session = resident_of(one.manager, str(client.session_id))
        await until(lambda: session.in_flight == 1)
        await leave(parked)
        with monkeypatch.context() as patch:
            patch.setattr(absences, "READ_TIMEOUT", 0.05)
            await pass_by(clock, GONE, one)
            await anyio.sleep(0.1)
        assert notes.outcomes == []
        proceed.set()
        await until(lambda: session.in_flight == 0)
        await pass_by(clock, AWAY * 2, one)
        await until(lambda: errors(notes.outcomes) == [types.CONNECTION_CLOSED])
