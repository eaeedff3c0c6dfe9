"""Streams that resume: what a client gets that comes back, here or elsewhere, now or later."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest

from benchmarks.endpoint import Endpoint
from mcp_session_store.records import EventKind
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance
from tests.support.streams import APART, old_client, one_more_turn, opened
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Clock, Instance, RequestContext

pytestmark = pytest.mark.anyio


async def resumed_from(client: Client, position: int, ids: list[str], *texts: str) -> Exchange:
    """Come back with one of the ids of a stream, and hear what follows it of these texts, once each."""
    stream = await opened(client, ids[position])
    await hears(stream, *texts[position:])
    assert [event.id for event in stream.events] == ids[position + 1 :]
    return stream


# Each event once, in its order


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
async def test_a_call_is_resumed_from_each_of_its_events(
    elsewhere: bool, talking: Talking, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client, request_id="seven")
    texts = [str(n) for n in range(8)]
    for text in texts:
        await call.say(text)
        # What is said on other streams is none of this one.
        await call.tell(f"to all {text}")
    await hears(exchange, *texts)
    ids = [str(event.id) for event in exchange.events]
    await exchange.leave()
    back = two.client(session_id) if elsewhere else client
    for position in range(len(ids)):
        running = await resumed_from(back, position, ids, *texts)
    call.answer()
    await running.end()
    ids.append(str(running.last_event_id))
    for position in range(len(ids) - 1):
        answered = await resumed_from(back, position, ids, *texts, "done")
        await answered.end()
        assert answered.messages[-1]["id"] == "seven"
    # The client has all of it.
    assert (await back.open_stream(ids[-1]).answer()).status == 405


async def test_a_client_that_loses_each_connection_after_one_event_gets_each_event_once(
    talking: Talking, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client)
    texts = [str(n) for n in range(40)]
    clients = itertools.cycle([two.client(session_id), client])
    heard: list[Any] = []
    async with anyio.create_task_group() as server:

        async def run() -> None:
            await call.say(*texts)
            call.answer()

        server.start_soon(run)
        # A client that leaves before it has an id has no stream to come back for.
        await until(lambda: exchange.last_event_id is not None)
        last_event_id = await exchange.leave()
        heard += told(exchange.messages)
        while "done" not in heard:
            stream = next(clients).open_stream(last_event_id)
            await until(lambda stream=stream: len(stream.sent) > 1)  # type: ignore[misc]
            last_event_id = await stream.leave() or last_event_id
            heard += told(stream.messages)
    assert heard == [*texts, "done"]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
async def test_a_call_that_was_not_answered_before_is_followed_to_its_answer(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog, elsewhere: bool
) -> None:
    other_log.hints = not elsewhere
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one, instance(other_store, events=other_log) as two:
        client = one.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await until(lambda: exchange.last_event_id is not None)
        resumed = await opened(two.client(session_id) if elsewhere else client, await exchange.leave())
        for n in range(3):
            await call.say(str(n))
            await hears(resumed, *(str(m) for m in range(n + 1)))
        call.answer()
        await hears(resumed, "0", "1", "2", "done")
        await resumed.end()
        assert all(event.id for event in resumed.events)


async def test_what_was_said_while_nobody_listened_is_there(talking: Talking, one: Instance, client: Client) -> None:
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    last_event_id = await exchange.leave()
    await call.say("a", "b")
    call.answer("c")
    await one.at_rest()
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "c"]


async def test_an_answer_that_comes_while_the_log_is_read_is_not_lost(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    last_event_id = await exchange.leave()
    held = log.hold("read", after=True)
    resumed = client.open_stream(last_event_id)
    await held.wait_entered()
    await call.say("a")
    call.answer()
    await one.at_rest()
    log.up()
    held.release()
    await resumed.end()
    assert told(resumed.messages) == ["a", "done"]


async def test_the_benchmark_of_a_replay_times_what_a_client_gets(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = (await client.handshake()).encode()
        (first,) = (await Endpoint(one.app).get_events(session_id, None, count=1)).ids
        call, _ = await talking.call(client)
        texts = [str(n) for n in range(20)]
        await call.tell(*texts)
        log.calls.clear()
        replayed = await Endpoint(one.app).get_events(session_id, first, count=len(texts))
        # Each event as SSE, with an id, read from the log while it was timed.
        assert [
            text for text, event in zip(texts, replayed.events, strict=True) if f'"{text}"'.encode() in event
        ] == texts
        assert len({first, *replayed.ids}) == 1 + len(texts)
        assert "read" in log.calls
        assert replayed.seconds > 0
        with pytest.raises(RuntimeError, match="400"):
            await Endpoint(one.app).get_events(session_id, b"malformed", count=1)


async def test_a_call_is_resumed_after_a_restart(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a", "b")
        await hears(exchange, "a", "b")
        call.answer()
        await exchange.end()
        ids = [str(event.id) for event in exchange.events]
    async with instance(store, events=log) as one:
        # The first request that the instance sees of this session.
        resumed = one.client(session_id).open_stream(ids[1])
        await resumed.end()
        assert told(resumed.messages) == ["b", "done"]
        assert [event.id for event in resumed.events] == ids[2:]


async def test_what_a_server_asks_is_asked_again_of_a_client_that_has_not_heard_it(
    store: FaultyStore, log: FaultyLog
) -> None:
    notes = Notes()
    asks = anyio.Event()

    async def roots(ctx: RequestContext) -> str:
        await asks.wait()
        answer = await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
        return str(answer.roots[0].uri)

    notes.tools["roots"] = roots
    async with instance(store, notes, events=log) as one:
        client = one.client()
        await client.handshake({**INITIALIZE_PARAMS, "capabilities": {"roots": {}}})
        stream = await opened(client)
        exchange = client.open_call("roots")
        await until(lambda: exchange.last_event_id is not None)
        last_event_ids = await exchange.leave(), await stream.leave()
        asks.set()
        await until(lambda: any(e.kind is EventKind.REQUEST for e in log.stored(client.session_id)))
        streams = [await opened(client, last_event_id) for last_event_id in last_event_ids]
        await until(lambda: any(stream.messages for stream in streams))
        (question,) = [message for stream in streams for message in stream.messages]
        assert question["method"] == "roots/list"
        await client.respond(question["id"], {"roots": [{"uri": "file:///home"}]})
        await streams[0].end()
        assert streams[0].messages[-1]["result"]["content"][0]["text"] == "file:///home"


# An id is given only for what is stored


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_nothing_is_sent_before_it_is_stored(
    log: FaultyLog, after: bool, talking: Talking, client: Client
) -> None:
    call, exchange = await talking.call(client)
    held = log.hold("append", after=after)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.say, "a")
        await held.wait_entered()
        await one_more_turn()
        assert exchange.messages == []
        held.release()
    await hears(exchange, "a")
    assert log.stored(client.session_id)[0].message in {event.data for event in exchange.events}


async def test_a_handshake_leaves_no_events(store: FaultyStore, log: FaultyLog, json_response: bool) -> None:
    notes = Notes()

    async def speak(ctx: RequestContext) -> None:
        for related in (None, ctx.request_id):
            await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=related)

    notes.on_initialize = speak
    async with instance(store, notes, events=log, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        # Again, within the session.
        assert (await client.initialize()).status == 200
        await client.notify("notifications/initialized")
        await one.at_rest()
        assert len(notes.genuine("initialize")) == 2
        # What is told to nobody in particular the second time is said in a session.
        assert [stream for stream, _ in log.streams(client.session_id)] == ["*"]


async def test_a_replay_leaves_no_events(store: FaultyStore, log: FaultyLog) -> None:
    async def speak(ctx: RequestContext) -> None:
        await ctx.session.send_notification(types.ToolListChangedNotification())

    async with instance(store, events=log) as gone:
        session_id = await gone.client().handshake()
    notes = Notes()
    notes.on_initialize = notes.on_initialized = speak
    async with instance(store, notes, events=log) as one:
        assert (await one.client(session_id).ping()).status == 200
        await one.at_rest()
        assert len(notes.replayed("notifications/initialized")) == 1
    assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE]


async def test_a_request_leaves_its_own_events_and_no_others(store: FaultyStore, log: FaultyLog) -> None:
    async with instance(store, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        await client.notify("notifications/cancelled", {"requestId": 99})
        assert log.stored(session_id) == []
        await client.ping()
        assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE]
        assert (await client.post({"jsonrpc": "2.0", "id": 5, "method": "no/such/method"})).error
        assert [event.kind for event in log.stored(session_id)[1:]] == [EventKind.ERROR]


async def test_where_answers_are_json_they_are_not_stored(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, json_response=True) as one:
        client = one.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("to nobody")
        assert call.ctx.close_sse_stream is None
        call.answer()
        assert (await exchange.answer()).text == "done"
        assert log.appended == []
        # The standalone stream is there, and resumes.
        stream = await opened(client)
        call, exchange = await talking.call(client)
        await call.tell("a")
        await hears(stream, "a")
        last_event_id = await stream.leave()
        await call.tell("b")
        call.answer()
        await exchange.end()
        await hears(await opened(client, last_event_id), "b")
        assert [(stream, event.kind) for stream, event in log.streams(session_id)] == [
            ("*", EventKind.PRIMING),
            ("*", EventKind.NOTIFICATION),
            ("*", EventKind.NOTIFICATION),
        ]


# The standalone stream


async def test_the_standalone_stream_carries_what_every_instance_says_once_and_in_order(
    store: FaultyStore,
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    json_response: bool,
    clock: Clock,
) -> None:
    mine, others = Talking(), Talking()
    async with (
        instance(store, mine.notes, events=log, json_response=json_response) as one,
        instance(other_store, others.notes, events=other_log, json_response=json_response) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        stream = await opened(client)
        calls = [(await mine.call(client))[0], (await others.call(two.client(session_id)))[0]]
        texts = [str(n) for n in range(10)]
        for text, call in zip(texts, itertools.cycle(calls), strict=False):
            await call.tell(text)
        await hears(stream, *texts)
        ids = [str(event.id) for event in stream.events]
        await stream.leave()
        for position in range(len(ids)):
            for back in (one, two):
                clock.advance(APART)
                resumed = await resumed_from(back.client(session_id), position, ids, *texts)
                await resumed.leave()
        clock.advance(APART)
        resumed = await opened(two.client(session_id), ids[-1])
        for call in calls:
            await call.tell("later")
        await hears(resumed, "later", "later")


async def test_no_message_goes_to_two_standalone_streams_that_are_opened_at_once(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    call, _ = await talking.call(client)
    held = log.hold("append")
    streams = [client.open_stream() for _ in range(3)]
    await held.wait_entered()
    await one_more_turn()
    log.up()
    held.release()
    for stream in streams:
        await stream.start()
    await until(lambda: sum(not stream.over.is_set() for stream in streams) == 1)
    await call.tell("a")
    await until(lambda: any(stream.messages for stream in streams))
    await one_more_turn()
    assert sum(len(stream.messages) for stream in streams) == 1


# Coming back, and being told to


async def test_a_client_that_comes_back_takes_the_stream_over(talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client)
    await call.say("a")
    await hears(exchange, "a")
    # Its old connections are open as far as the server knows: that of the call, and one that was resumed.
    first = await opened(client, exchange.last_event_id)
    await exchange.end()
    second = await opened(client, exchange.last_event_id)
    await first.end()
    call.answer()
    await second.end()
    assert told(second.messages) == ["done"]
    assert told(exchange.messages) == ["a"]
    assert first.messages == []


async def test_a_client_that_comes_back_takes_the_standalone_stream_over(talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client)
    streams = [await opened(client)]
    for _ in range(2):
        streams.append(await opened(client, streams[0].last_event_id))
        await streams[-2].end()
    await call.tell("a")
    await hears(streams[-1], "a")
    # The call's own stream is another one.
    await call.say("b")
    await hears(exchange, "b")


async def test_a_server_has_a_client_come_back_again_and_again(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, retry_interval=1234) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        assert exchange.events[0].retry == "1234"
        assert exchange.events[0].data == ""
        await call.close()
        await exchange.end()
        assert told(exchange.messages) == ["a"]
        last_event_id = exchange.last_event_id
        for n in range(3):
            await call.say(f"away {n}")
            stream = await opened(client, last_event_id)
            await hears(stream, f"away {n}")
            assert stream.events[0].retry == "1234"
            await call.say(f"back {n}")
            await hears(stream, f"away {n}", f"back {n}")
            await call.close()
            await stream.end()
            last_event_id = stream.last_event_id
        call.answer()
        stream = client.open_stream(last_event_id)
        await stream.end()
        assert told(stream.messages) == ["done"]


async def test_a_server_has_a_client_come_back_for_the_standalone_stream(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, retry_interval=1234) as one:
        client = one.client()
        session_id = await client.handshake()
        call, _ = await talking.call(client)
        stream = await opened(client)
        assert stream.events[0].retry == "1234"
        for n in range(2):
            await call.tell(str(n))
            await hears(stream, str(n))
            await call.close_standalone()
            await stream.end()
            last_event_id = stream.last_event_id
            stream = await opened(client, last_event_id)
    # A copy that has said nothing yet on that stream.
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client(session_id)
        stream = await opened(client, last_event_id)
        call, _ = await talking.call(client)
        await call.close_standalone()
        await stream.end()


async def test_no_retry_is_sent_unless_it_is_configured(talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client)
    await call.say("a")
    await hears(exchange, "a")
    stream = await opened(client, await exchange.leave())
    call.answer()
    await stream.end()
    assert {event.retry for event in [*exchange.events, *stream.events]} == {None}


# Clients that know no priming events


async def test_an_older_client_gets_no_priming_events_and_resumes_by_the_ids_of_messages(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, retry_interval=1234) as one,
        instance(other_store, events=other_log, retry_interval=1234) as two,
    ):
        client = await old_client(one)
        call, exchange = await talking.call(client)
        assert call.ctx.close_sse_stream is None
        await call.say("a", "b")
        await hears(exchange, "a", "b")
        assert len(exchange.events) == 2
        ids = [str(event.id) for event in exchange.events]
        await exchange.leave()
        await call.say("c")
        for back in (client, two.client(client.session_id, headers=client.headers)):
            resumed = await opened(back, ids[0])
            await hears(resumed, "b", "c")
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["b", "c", "done"]
        assert {event.retry for event in resumed.events} == {None}
        assert all(event.data for event in resumed.events)


async def test_an_older_client_hears_what_every_instance_says_and_resumes_it(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    talking, others = Talking(), Talking()
    async with (
        instance(store, talking.notes, events=log, retry_interval=1234) as one,
        instance(other_store, others.notes, events=other_log) as two,
    ):
        client = await old_client(one)
        stream = client.open_stream()
        await stream.start()
        assert stream.status == 200
        call, _ = await talking.call(client)
        elsewhere, _ = await others.call(two.client(client.session_id, headers=client.headers))
        await call.tell("a")
        await hears(stream, "a")
        await elsewhere.tell("b")
        await hears(stream, "a", "b")
        assert len(stream.events) == 2
        assert {event.retry for event in stream.events} == {None}
        # While the old connection still seems to be open.
        resumed = await opened(client, stream.events[0].id)
        await hears(resumed, "b")
        await stream.end()
        await call.tell("c")
        await hears(resumed, "b", "c")
        assert told(stream.messages) == ["a", "b"]
        # No event was stored for it alone.
        assert [event.kind for event in log.stored(client.session_id)] == [EventKind.NOTIFICATION] * 3
