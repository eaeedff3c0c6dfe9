"""Clients that do not read: they hold up nobody, cost little memory, and get all of it when they come back."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EventPolicy, session_key
from mcp_session_store.adapter.streams.reader import NOTHING_YET, Event
from mcp_session_store.adapter.streams.resumption import PART_BYTES
from mcp_session_store.event_log import EVENT_PAGE
from mcp_session_store.records import EventKind, EventPage, NewEvent
from tests.support.asgi import PATIENCE, until
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import instance
from tests.support.internals import recorder_of
from tests.support.streams import away, old_client, one_more_turn, opened, place_of
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

MANY = 100_000
TEXTS = [str(n) for n in range(100)]
"""More than any buffer holds."""


async def say_on(log: FaultyLog, session_id: str | None, stream: str, count: int) -> None:
    """Have this many more events on a stream, at once."""
    assert session_id is not None
    key = session_key(session_id)
    last = max([event.position for name, event in log.streams(session_id) if name == stream], default=0)
    said = '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"%d"}}'
    events = [
        NewEvent(
            stream=stream,
            position=last + 1 + n,
            previous=last + n,
            kind=EventKind.NOTIFICATION,
            message=said % n,
        )
        for n in range(count)
    ]
    await log.inner.append(key, events)


async def test_a_call_whose_client_does_not_read_is_cut_and_all_else_goes_on(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    stream = await opened(client)
    call, exchange = await talking.call(client)
    other, other_exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    exchange.stop_reading()
    with anyio.fail_after(PATIENCE):
        await call.say(*TEXTS)
    await other.say("a")
    await hears(other_exchange, "a")
    await other.tell("b")
    await hears(stream, "b")
    assert (await client.ping()).status == 200
    call.answer()
    await until(lambda: "done" in log.messages(client.session_id)[-1])
    exchange.read_on()
    await exchange.end()
    heard = told(exchange.messages)
    assert len(heard) < len(TEXTS)
    resumed = client.open_stream(exchange.last_event_id)
    await resumed.end()
    assert heard + told(resumed.messages) == [*TEXTS, "done"]


async def test_a_standalone_stream_whose_client_does_not_read_holds_nobody_up(talking: Talking, one: Instance) -> None:
    for client in (await old_client(one), one.client()):
        if client.session_id is None:
            await client.handshake()
        stream = client.open_stream()
        await stream.start()
        call, exchange = await talking.call(client)
        await call.tell("first")
        await hears(stream, "first")
        stream.stop_reading()
        with anyio.fail_after(PATIENCE):
            await call.tell(*TEXTS)
        await call.say("a")
        await hears(exchange, "a")
        resumed = await opened(client, stream.last_event_id)
        await hears(resumed, *TEXTS)
        stream.read_on()
        await stream.end()
        assert told(stream.messages) == ["first", *TEXTS[: len(stream.messages) - 1]]
        assert len(stream.messages) < len(TEXTS)


async def test_a_call_of_an_older_client_is_not_cut(talking: Talking, one: Instance) -> None:
    client = await old_client(one)
    call, exchange = await talking.call(client)
    exchange.stop_reading()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.say, *TEXTS)
        await one_more_turn()
        exchange.read_on()
        await hears(exchange, *TEXTS)
    call.answer()
    await exchange.end()
    assert told(exchange.messages) == [*TEXTS, "done"]


@pytest.mark.parametrize("standalone", [False, True], ids=["call", "standalone"])
async def test_what_a_client_does_not_read_is_not_read_for_it(store: FaultyStore, standalone: bool) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_events_per_session=2 * MANY, max_bytes_per_session=1024**3))
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        if standalone:
            stream = await opened(client)
            last_event_id = str(await stream.leave())
        await say_on(log, session_id, place_of(client, last_event_id).stream, MANY)
        gc.collect()
        log.calls.clear()
        tracemalloc.start()
        try:
            resumed = client.open_stream(last_event_id)
            resumed.stop_reading()
            await until(lambda: log.counts()["read"] > 0)
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(3):
                # What goes on makes no difference.
                await call.say("later")
                await call.tell("later")
                await one_more_turn()
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert log.counts()["read"] <= 2
        # A hundredth of what there is to read.
        assert after - before < MANY * 100 / 100
        assert len(resumed.sent) == 0
        assert (await client.ping()).status == 200
        await read_some(resumed, 3)
        taken = len(resumed.events)
        assert log.counts()["read"] <= 2 + taken // EVENT_PAGE
        await resumed.leave()
        await one_more_turn()
        assert log.counts()["read"] <= 3 + taken // EVENT_PAGE
        assert recorder_of(one.manager).followers.of(session_key(session_id)) == []


async def read_some(exchange: Exchange, count: int) -> None:
    """Take this many parts off a stream, more or less, and no more."""
    sent = exchange.sent

    class Counted(list):  # type: ignore[type-arg]
        def append(self, message: object) -> None:
            super().append(message)
            if len(self) > count:
                exchange.stop_reading()

    exchange.sent = Counted(sent)
    exchange.read_on()
    await until(lambda: len(exchange.sent) > count)
    await one_more_turn()
    assert len(exchange.sent) == count + 1


async def test_a_long_stream_is_read_page_by_page(log: FaultyLog, talking: Talking, client: Client) -> None:
    session_id = str(client.session_id)
    _, last_event_id = await away(talking, client)
    await say_on(log, session_id, place_of(client, last_event_id).stream, 5 * EVENT_PAGE)
    log.calls.clear()
    resumed = await opened(client, last_event_id)
    await hears(resumed, *(str(n) for n in range(5 * EVENT_PAGE)))
    assert 5 <= log.counts()["read"] <= 7
    assert len({event.id for event in resumed.events}) == 5 * EVENT_PAGE


async def test_a_response_that_waits_holds_no_event_that_is_sent(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    def held() -> list[Event | EventPage]:
        gc.collect()
        return [one for one in gc.get_objects() if isinstance(one, Event | EventPage) and one is not NOTHING_YET]

    call, last_event_id = await away(talking, client)
    texts = [str(n) for n in range(EVENT_PAGE + 1)]
    await say_on(log, str(client.session_id), place_of(client, last_event_id).stream, len(texts))
    assert held() == []
    resumed = await opened(client, last_event_id)
    await hears(resumed, *texts)
    await one_more_turn()
    assert held() == []
    standalone = await opened(client)
    await call.tell("live")
    await hears(standalone, "live")
    await one_more_turn()
    assert held() == []


async def test_of_many_responses_to_one_stream_only_the_latest_holds_events_that_its_client_does_not_take(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    def held() -> int:
        gc.collect()
        return sum(isinstance(one, Event) for one in gc.get_objects())

    _, last_event_id = await away(talking, client)
    texts = [str(n) for n in range(2 * EVENT_PAGE)]
    await say_on(log, str(client.session_id), place_of(client, last_event_id).stream, len(texts))
    blocked = []
    for _ in range(5):
        resumed = client.open_stream(last_event_id)
        await read_some(resumed, 1)
        blocked.append(resumed)
        # And the one that is being sent.
        assert EVENT_PAGE <= held() <= EVENT_PAGE + len(blocked)
    for resumed in blocked:
        resumed.sent = list(resumed.sent)
        resumed.read_on()
    for resumed in blocked[:-1]:
        await resumed.end()
        heard = told(resumed.messages)
        assert heard == texts[: len(heard)]
    await hears(blocked[-1], *texts)


async def test_events_that_wait_are_sent_together_in_parts_of_a_bounded_size(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    session_id = str(client.session_id)
    _, last_event_id = await away(talking, client)
    await say_on(log, session_id, place_of(client, last_event_id).stream, 2 * EVENT_PAGE)
    resumed = await opened(client, last_event_id)
    await hears(resumed, *(str(n) for n in range(2 * EVENT_PAGE)))
    parts = [len(message["body"]) for message in resumed.sent[1:]]
    largest_event = max(map(len, resumed.body.split(b"\r\n\r\n"))) + len(b"\r\n\r\n")
    assert max(parts) < PART_BYTES + largest_event
    assert len(parts) <= sum(parts) // PART_BYTES + 4


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
async def test_a_message_of_several_lines_stays_one_message(
    log: FaultyLog, talking: Talking, client: Client, line_end: str
) -> None:
    session_id = str(client.session_id)
    _, last_event_id = await away(talking, client)
    stream = place_of(client, last_event_id).stream
    params = '"params": {"level": "info", "data": "é\u2028"}}'
    event = NewEvent(
        stream=stream,
        position=1,
        previous=0,
        kind=EventKind.NOTIFICATION,
        message=line_end.join(['{"jsonrpc": "2.0",', '"method": "notifications/message",', params]),
    )
    await log.inner.append(session_key(session_id), [event])
    await hears(await opened(client, last_event_id), "é\u2028")


async def test_who_follows_reads_for_its_own_streams_events_only(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    calls = []
    for _ in range(5):
        call, last_event_id = await away(talking, client)
        calls.append((call, await opened(client, last_event_id)))
    await one_more_turn()
    log.calls.clear()
    for n in range(20):
        await calls[0][0].say(str(n))
        await hears(calls[0][1], *(str(m) for m in range(n + 1)))
    # One for each event, and what the looks at the calls cost that say nothing.
    assert log.counts()["append"] == 20
    assert log.counts()["read"] < 2 * 20
