"""What a client is answered that comes back for what cannot be had: never such that it comes back for ever."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.streamable_http import EventMessage, EventStore
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import jsonrpc_message_adapter

from mcp_session_store import EventPolicy, StoreUnavailable
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.adapter.streams.followers import Followers
from mcp_session_store.adapter.streams.recorder import EventRecorder
from mcp_session_store.adapter.sweeping import sweep_events
from mcp_session_store.testing import new_session
from tests.support.asgi import Client, seen_by_a_client, until
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import instance, lone_instance, principal
from tests.support.internals import recorder_of
from tests.support.streams import OLD, one_more_turn, opened, primed
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from mcp.server.streamable_http import EventCallback
    from mcp_types import JSONRPCMessage

    from mcp_session_store.records import EventPage
    from tests.support.asgi import Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

FEW = EventPolicy(max_events_per_session=10)


class Ids:
    """Event ids of one session: of a call that was answered, and of its standalone stream."""

    def __init__(self, call: Exchange, standalone: Exchange) -> None:
        self.call = [str(event.id) for event in call.events]
        self.standalone = [str(event.id) for event in standalone.events]

    @classmethod
    async def of(cls, client: Client, talking: Talking, *texts: str) -> Ids:
        """Those of a call that said this, on both streams."""
        stream = await opened(client)
        call, exchange = await talking.call(client, request_id="seven")
        await call.say(*texts)
        await call.tell(*texts)
        call.answer()
        await exchange.end()
        await hears(stream, *texts)
        await stream.leave()
        return cls(exchange, stream)


async def ends_a_call(client: Client, last_event_id: str, reason: str, *before: str) -> Exchange:
    """Come back, and be told that the call has ended for this reason; whoever comes back after that has all of it."""
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert resumed.status == 200
    assert resumed.headers["content-type"].startswith("text/event-stream")
    assert told(resumed.messages) == [*before, reason]
    assert resumed.messages[-1]["id"] == "seven"
    assert resumed.messages[-1]["error"]["code"] == -32000
    assert (await client.open_stream(resumed.last_event_id).answer()).status == 405
    return resumed


# Where there are events


async def test_who_has_the_answer_of_a_call_is_told_so_without_a_query(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    ids = await Ids.of(client, talking, "a")
    log.calls.clear()
    answer = await client.open_stream(ids.call[-1]).answer()
    assert answer.status == 405
    assert answer.headers["allow"] == "POST, DELETE"
    assert log.calls == []


async def test_a_call_whose_next_events_are_not_kept_ends_with_an_error(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        ids = await Ids.of(client, talking, "a")
        await Ids.of(client, talking, *"bcdefgh")
        for last_event_id in ids.call[:-1]:
            await ends_a_call(client, last_event_id, "trimmed")


async def test_a_call_some_of_whose_events_are_not_kept_ends_with_an_error_for_who_has_not_seen_them(
    store: FaultyStore,
) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client, request_id="seven")
        texts = [str(n) for n in range(15)]
        await call.say(*texts)
        await hears(exchange, *texts)
        await exchange.leave()
        ids = [str(event.id) for event in exchange.events]
        kept = {event.position for event in log.stored(client.session_id)}
        assert kept == set(range(min(kept), 16))
        assert min(kept) > 2
        for position in range(16):
            if position + 1 < min(kept):
                await ends_a_call(client, ids[position], "trimmed")
            else:
                await hears(await opened(client, ids[position]), *texts[position:])


async def test_a_call_that_has_said_nothing_since_goes_on_though_the_log_was_trimmed(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        last_event_id = await exchange.leave()
        await Ids.of(client, talking, *"bcdefghijklm")
        resumed = await opened(client, last_event_id)
        await call.say("z")
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["z", "done"]


async def test_a_call_with_a_gap_in_what_is_read_ends_with_an_error(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    call, exchange = await talking.call(client, request_id="seven")
    await call.say("a", "b", "c")
    await hears(exchange, "a", "b", "c")
    last_event_id = str(exchange.events[0].id)
    await exchange.leave()
    read = log.inner.read

    async def with_gap(*args: Any, **kwargs: Any) -> EventPage | None:
        page = await read(*args, **kwargs)
        return page and replace(page, events=[event for event in page.events if event.position != 2])

    log.inner.read = with_gap  # type: ignore[method-assign]
    await ends_a_call(client, last_event_id, "trimmed", "a")
    call.answer()


async def test_a_call_that_has_said_nothing_for_long_goes_on_on_another_instance_too(
    store: FaultyStore, clock: Clock
) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_age=timedelta(minutes=5)))
    talking = Talking()
    # Longer than the time that is put forward, in which neither sends a heartbeat.
    timeout = timedelta(hours=1).total_seconds()
    async with (
        instance(store, talking.notes, events=log, instance_timeout=timeout) as one,
        instance(store, events=log, instance_timeout=timeout) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        silent, exchange = await talking.call(client, request_id="silent")
        await silent.say("a")
        await hears(exchange, "a")
        last_event_id = await exchange.leave()
        missed, exchange = await talking.call(client, request_id="missed")
        await missed.say("b")
        await hears(exchange, "b")
        missed_event_id = str(exchange.events[0].id)
        await exchange.leave()
        await Ids.of(client, talking, "c")
        recorder = recorder_of(one.manager)
        count = len(log.stored(session_id))
        # What has been said since it was last looked is not old.
        await recorder.refresh_idle_calls()
        assert len(log.stored(session_id)) == count
        clock.advance(timedelta(minutes=6))
        for refreshed in (2, 2, 4):
            await recorder.refresh_idle_calls()
            assert len(log.stored(session_id)) == count + refreshed
        await sweep_events(log)
        assert len(log.stored(session_id)) == 4
        resumed = await opened(two.client(session_id), last_event_id)
        await silent.say("z")
        silent.answer()
        await resumed.end()
        assert told(resumed.messages) == ["z", "done"]
        back = two.client(session_id).open_stream(missed_event_id)
        await back.end()
        assert told(back.messages) == ["trimmed"]
        missed.answer()


async def test_silent_calls_are_looked_at_by_age(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_age=timedelta(seconds=1)))
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await until(lambda: len(log.stored(session_id)) > 2)
        call.answer()
        await exchange.end()
        assert told(exchange.messages) == ["done"]


async def test_a_call_whose_event_is_on_its_way_is_not_silent(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_age=timedelta(minutes=5)))
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await until(lambda: exchange.last_event_id is not None)
        recorder = recorder_of(one.manager)
        held = log.hold("append")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call.say, "a")
            await held.wait_entered()
            for _ in range(3):
                await recorder.refresh_idle_calls()
            held.release()
        await hears(exchange, "a")
        assert [event.position for event in log.stored(session_id)] == [1]
        log.failing(StoreUnavailable("it is down"), "append")
        await call.say("b")
        for _ in range(3):
            await recorder.refresh_idle_calls()
        assert len(log.stored(session_id)) == 1


async def test_a_call_that_is_trimmed_while_its_client_does_not_read_ends_with_an_error(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        resumed = await opened(client, await exchange.leave())
        resumed.stop_reading()
        await call.say(*(str(n) for n in range(40)))
        resumed.read_on()
        await resumed.end()
        assert told(resumed.messages)[-1] == "trimmed"
        assert resumed.messages[-1]["id"] == client._last_id


async def test_events_that_are_too_old_are_gone(store: FaultyStore, clock: Clock) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_age=timedelta(minutes=5)))
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        ids = await Ids.of(client, talking, "a")
        clock.advance(timedelta(minutes=6))
        await sweep_events(log)
        assert log.stored(client.session_id) == []
        await ends_a_call(client, ids.call[0], "trimmed")
        await opened(client, ids.standalone[0])


async def test_a_standalone_stream_goes_on_with_what_is_kept(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        ids = await Ids.of(client, talking, "a")
        call, _ = await talking.call(client)
        texts = [str(n) for n in range(15)]
        await call.tell(*texts)
        await until(lambda: texts[-1] in log.messages(client.session_id)[-1])
        kept = [text for text in texts if any(f'"{text}"' in message for message in log.messages(client.session_id))]
        assert 0 < len(kept) < len(texts)
        stream = await opened(client, ids.standalone[0])
        await hears(stream, *kept)
        await call.tell("live")
        await hears(stream, *kept, "live")


async def test_where_the_log_is_lost_calls_end_and_the_standalone_stream_begins_anew(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, retry_interval=1234) as one:
        client = one.client()
        session_id = await client.handshake()
        ids = await Ids.of(client, talking, "a")
        for set_back in (False, True):
            log.lose(session_id)
            if set_back:
                # There is a log, which is not as far as the client is.
                await client.ping()
            await ends_a_call(client, ids.call[-2], "trimmed")
            stream = client.open_stream(ids.standalone[-1])
            await until(lambda stream=stream: stream.last_event_id is not None)  # type: ignore[misc]
            assert stream.events[0].data == ""
            assert stream.events[0].retry == "1234"
            call, exchange = await talking.call(client)
            await call.tell("b")
            call.answer()
            await exchange.end()
            await hears(stream, "b")


async def test_a_stream_that_is_read_while_its_log_is_lost_waits_for_what_comes(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, _ = await talking.call(client)
        stream = await opened(client)
        held = log.hold("read")
        await call.tell("lost")
        await held.wait_entered()
        log.lose(client.session_id)
        await call.tell("a")
        log.up()
        held.release()
        # The log ends before what was known to be there: it is not asked again and again.
        log.calls.clear()
        await one_more_turn()
        assert log.counts()["read"] <= 2
        await stream.leave()


async def test_a_session_that_is_unknown_or_ended_is_not_found(talking: Talking, one: Instance, client: Client) -> None:
    ids = await Ids.of(client, talking, "a")
    await client.delete()
    for last_event_id in (ids.call[0], ids.call[-1], ids.standalone[0], "malformed"):
        answers = [await some.open_stream(last_event_id).answer() for some in (client, one.client("0123456789abcdef"))]
        assert answers[0].status == 404
        assert seen_by_a_client(answers[0]) == seen_by_a_client(answers[1])


@pytest.mark.parametrize("error", [StoreUnavailable("it is down"), RuntimeError("a bug")], ids=["down", "bug"])
async def test_while_the_log_cannot_be_read_the_client_is_asked_to_come_again(
    log: FaultyLog, error: Exception, talking: Talking, client: Client
) -> None:
    ids = await Ids.of(client, talking, "a")
    log.failing(error, "read")
    for last_event_id in (ids.call[0], ids.standalone[0]):
        answer = await client.open_stream(last_event_id).answer()
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
    # What needs no query is answered.
    assert (await client.open_stream(ids.call[-1]).answer()).status == 405
    assert (await client.open_stream("malformed").answer()).status == 400
    assert (await client.ping()).status == 200
    log.up()
    resumed = client.open_stream(ids.call[0])
    await resumed.end()
    assert told(resumed.messages) == ["a", "done"]


async def test_a_stream_that_is_open_is_not_closed_for_a_resumption_that_fails(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    stream = await opened(client)
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    log.down("read")
    for last_event_id in (exchange.last_event_id, stream.last_event_id):
        assert (await client.open_stream(last_event_id).answer()).status == 503
    await call.say("a")
    await hears(exchange, "a")
    assert not stream.over.is_set()


async def test_while_the_store_cannot_be_reached_a_session_that_is_not_here_has_to_wait(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        ids = await Ids.of(client, talking, "a")
    async with instance(store, events=log) as one:
        store.down("load")
        answer = await one.client(session_id).open_stream(ids.call[0]).answer()
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0


# While it is followed


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
async def test_a_stream_that_is_followed_stays_open_while_the_log_is_down(
    store: FaultyStore,
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    elsewhere: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.streams.reader.RETRY", 0.02)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one, instance(other_store, events=other_log) as two:
        client = one.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await until(lambda: exchange.last_event_id is not None)
        back, its_log = (two.client(session_id), other_log) if elsewhere else (client, log)
        stream = await opened(client)
        last_event_id = await stream.leave()
        standalone, resumed = await opened(back, last_event_id), await opened(back, await exchange.leave())
        its_log.down("read")
        await call.say("a")
        await call.tell("b")
        before = its_log.counts()["read"]
        await until(lambda: its_log.counts()["read"] > before + 3)
        its_log.down("read", "heads", "follow", "last_beats", "listen")
        before = its_log.background["heads"]
        await until(lambda: not elsewhere or its_log.background["heads"] > before)
        await call.say("c")
        call.answer()
        assert resumed.messages == standalone.messages == []
        assert not resumed.over.is_set()
        its_log.up()
        await resumed.end()
        assert told(resumed.messages) == ["a", "c", "done"]
        await hears(standalone, "b")
        assert all(event.id for event in [*resumed.events, *standalone.events])


@pytest.mark.parametrize("failing", [{2}, {2, 4}, {2, 4, 6}, {3, 5}, {2, 3, 4}, {5}], ids=str)
async def test_a_long_replay_is_not_cut_by_a_log_that_fails_now_and_then(
    store: FaultyStore, log: FaultyLog, failing: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.streams.reader.RETRY", 0.01)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await until(lambda: exchange.last_event_id is not None)
        last_event_id = await exchange.leave()
        texts = [str(n) for n in range(350)]
        await call.say(*texts)
        call.answer()
        await one.at_rest()
        log.calls.clear()

        async def fail() -> None:
            if log.counts()["read"] in failing:
                raise StoreUnavailable("now and then")

        log.before("read", fail)
        resumed = client.open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == [*texts, "done"]


# Whose session it is


@pytest.mark.parametrize("resident", [False, True], ids=["elsewhere", "resident"])
async def test_somebody_elses_session_is_answered_as_one_that_does_not_exist(
    store: FaultyStore, log: FaultyLog, resident: bool
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        alice = gone.client(user=principal("alice"))
        session_id = await alice.handshake()
        ids = await Ids.of(alice, talking, "secret")
    async with instance(store, events=log) as one:
        if resident:
            await one.client(session_id, user=principal("alice")).ping()
        log.calls.clear()
        for user in (None, principal("mallory"), principal("alice", subject="bob")):
            for last_event_id in (ids.call[0], ids.call[-1], ids.standalone[0], "malformed", None):
                theirs = await one.client(session_id, user=user).open_stream(last_event_id).answer()
                nobodys = await one.client("0" * 32, user=user).open_stream(last_event_id).answer()
                assert theirs.status == 404
                assert seen_by_a_client(theirs) == seen_by_a_client(nobodys)
        assert log.calls == []
        resumed = one.client(session_id, user=principal("alice")).open_stream(ids.call[0])
        await resumed.end()
        assert told(resumed.messages) == ["secret", "done"]


async def test_who_comes_back_to_somebody_elses_session_closes_none_of_its_streams(
    talking: Talking, one: Instance
) -> None:
    client = one.client(user=principal("alice"))
    session_id = await client.handshake()
    call, exchange = await talking.call(client)
    await call.say("a")
    await hears(exchange, "a")
    for user in (principal("bob"), None):
        thief = one.client(session_id, user=user)
        for last_event_id in (exchange.events[0].id, None, "malformed"):
            assert (await thief.open_stream(last_event_id).answer()).status == 404
    await call.say("b")
    await hears(exchange, "a", "b")
    await hears(await opened(client, exchange.events[0].id), "a", "b")


@pytest.mark.parametrize("resident", [False, True], ids=["elsewhere", "resident"])
async def test_a_resumption_is_checked_as_any_request(store: FaultyStore, log: FaultyLog, resident: bool) -> None:
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=["127.0.0.1:8000"],
        allowed_origins=["http://127.0.0.1:8000"],
    )
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        ids = await Ids.of(client, talking, "a")
    async with instance(store, events=log, transport_security=security) as one:
        client = one.client(session_id)
        if resident:
            assert (await client.ping()).status == 200
        log.calls.clear()
        for last_event_id in (ids.call[0], ids.standalone[0], None):
            assert (await client.open_stream(last_event_id, host="evil.example").answer()).status == 421
            assert (await client.open_stream(last_event_id, origin="http://evil.example").answer()).status == 403
        assert log.calls == []
        assert one.residents == int(resident)
        for last_event_id in (ids.call[0], ids.call[-1], ids.standalone[0], None):
            assert (await client.open_stream(last_event_id, accept="application/json").answer()).status == 406
        assert log.calls == []
        resumed = client.open_stream(ids.call[0], accept="text/*", origin="http://127.0.0.1:8000")
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]


# Where there are none


@pytest.mark.parametrize("resident", [False, True], ids=["elsewhere", "resident"])
@pytest.mark.parametrize("version", [None, OLD], ids=["newer", "older"])
async def test_where_events_are_off_a_resumption_is_answered(
    store: FaultyStore, log: FaultyLog, resident: bool, version: str | None, json_response: bool
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        ids = await Ids.of(client, talking, "a")
        other = gone.client()
        await other.handshake()
        theirs = await Ids.of(other, talking, "b")
    talking = Talking()
    async with instance(store, talking.notes, json_response=json_response) as one:
        client = one.client(session_id, headers={"mcp-protocol-version": version} if version else {})
        if resident:
            await client.ping()
        await ends_a_call(client, ids.call[0], "lost")
        assert (await client.open_stream(ids.call[-1]).answer()).status == 405
        for bad in ("malformed", theirs.call[0], theirs.standalone[0], "x" * 10_000):
            assert (await client.open_stream(bad).answer()).status == 400
        for last_event_id in (ids.standalone[0], "", None):
            stream = client.open_stream(last_event_id)
            await stream.start()
            assert stream.status == 200
            call, exchange = await talking.call(client)
            await call.tell("live")
            call.answer()
            await exchange.end()
            await hears(stream, "live")
            assert {event.id for event in stream.events} == {None}
            await stream.leave()
        assert (await client.ping()).status == 200


class Theirs(EventStore):
    """An event store as the SDK's documentation has it."""

    def __init__(self) -> None:
        self.stored: list[tuple[str, JSONRPCMessage | None]] = []
        self.asked: list[str] = []

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self.stored.append((stream_id, message))
        return str(len(self.stored))

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        self.asked.append(last_event_id)
        if not last_event_id.isdecimal():
            return None
        stream_id, _ = self.stored[int(last_event_id) - 1]
        for number, (its_stream, message) in enumerate(self.stored, 1):
            if number > int(last_event_id) and its_stream == stream_id and message is not None:
                copy = jsonrpc_message_adapter.validate_json(message.model_dump_json(by_alias=True, exclude_unset=True))
                await send_callback(EventMessage(copy, str(number)))
        return stream_id


async def test_the_sdks_own_event_store_goes_on_to_work(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        ids = await Ids.of(client, talking, "a")
    theirs = Theirs()
    talking = Talking()
    async with instance(store, talking.notes, event_store=theirs, retry_interval=1234) as one:
        client = one.client(session_id)
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        assert [event.id for event in exchange.events] == ["1", "2"]
        assert exchange.events[0].retry == "1234"
        await call.close()
        await exchange.end()
        await call.say("b")
        resumed = client.open_stream("2")
        await hears(resumed, "b")
        call.answer()
        await until(lambda: told(resumed.messages) == ["b", "done"])
        await resumed.leave()
        # What is no id of that store's is for that store to tell.
        for last_event_id in (ids.call[0], "malformed"):
            answer = await client.open_stream(last_event_id).answer()
            assert (answer.status, answer.messages) == (200, [])
        assert theirs.asked == ["2", ids.call[0], "malformed"]
        stream = client.open_stream()
        await stream.start()
        call, _ = await talking.call(client)
        await call.tell("c")
        await hears(stream, "c")
        assert stream.events[0].id is not None


async def test_a_server_with_neither_gives_no_event_ids(store: FaultyStore, json_response: bool) -> None:
    talking = Talking()
    async with instance(store, talking.notes, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        assert call.ctx.close_sse_stream is None
        call.answer()
        await exchange.end()
        assert told(exchange.messages) == ["done"]
        stream = client.open_stream()
        await stream.start()
        await call.tell("a")
        await hears(stream, "a")
        assert stream.events[0].id is None


# A view alone


async def view(store: FaultyStore, log: FaultyLog) -> SessionEvents:
    """That of a session on a log, with nothing around it."""
    record = await store.inner.create(new_session())
    instances = lone_instance(log.mailbox)
    recorder = EventRecorder(log, Followers(log, instances), instances)
    await recorder.recover()
    events = SessionEvents(record.key, recorder)
    events.begin(0, known_at=clock.now())
    return events


async def test_the_view_of_a_session_replays_nothing_to_the_sdk(store: FaultyStore, log: FaultyLog) -> None:
    events = await view(store, log)
    priming = await primed(events, "5")
    assert priming is not None
    sent: list[EventMessage] = []

    async def send(event: EventMessage) -> None:
        sent.append(event)

    log.calls.clear()
    with pytest.raises(NotImplementedError, match="serve_stream"):
        await events.replay_events_after(priming, send)
    assert sent == []
    assert log.calls == []


async def test_a_call_whose_id_is_used_again_before_its_answer_is_stored_keeps_nobody(
    store: FaultyStore, log: FaultyLog
) -> None:
    events = await view(store, log)
    await primed(events, "1")
    events.returned(1)
    assert events.busy
    await primed(events, "1")
    assert not events.busy
    # Neither does one whose copy leaves.
    events.returned(1)
    assert events.busy
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(events.recorded)
        await one_more_turn()
        await events.abandon()
    assert not events.busy
