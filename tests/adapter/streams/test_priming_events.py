"""The event that primes the stream of a call is an id alone: what it leads to, whatever becomes of the call."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sse_starlette import ServerSentEvent

from mcp_session_store import EndReason, EventPolicy, session_key
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.streams import newest_event, reader
from mcp_session_store.adapter.streams.event_ids import TAG_SIZE, Cursor, EventIds
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.adapter.streams.followers import Follower, Followers
from mcp_session_store.adapter.streams.recorder import EventRecorder
from mcp_session_store.adapter.sweeping import sweep_events
from mcp_session_store.records import EventKind
from mcp_session_store.settings import InstanceSettings
from mcp_session_store.testing import new_session
from tests.support.asgi import until
from tests.support.faulty_stores import FaultyLog, FaultyStore
from tests.support.instances import instance, lone_instance
from tests.support.internals import instances_of, recorder_of
from tests.support.streams import away, one_more_turn, opened, place_of, primed
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from uuid import UUID

    from tests.support.asgi import Client
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

LONG = timedelta(seconds=InstanceSettings().instance_timeout + 1)
"""So long an instance says nothing that is gone."""
PATIENT = timedelta(days=1).total_seconds()
"""Seconds for which an instance may say nothing where time is put forward, and only its calls are to seem lost."""
SHORT = EventPolicy(max_age=timedelta(minutes=5))
FEW = EventPolicy(max_events_per_session=10)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Follower]:
    """The open responses, one entry each time that one waits, which is not for long."""
    monkeypatch.setattr(reader, "STAY", 0.01)
    waits: list[Follower] = []
    wait = Follower.wait

    async def counted(follower: Follower, *args: Any, **kwargs: Any) -> None:
        waits.append(follower)
        await wait(follower, *args, **kwargs)

    monkeypatch.setattr(Follower, "wait", counted)
    return waits


async def left_behind(store: FaultyStore, log: FaultyLog) -> str:
    """The id of a session with one event, whose instance has stopped."""
    async with instance(store, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        await client.ping()
    return session_id


async def running(log: FaultyLog, key: UUID) -> tuple[EventRecorder, SessionEvents]:
    """A recorder that has stored its heartbeat, and the events of a session."""
    instances = lone_instance(log.mailbox)
    recorder = EventRecorder(log, Followers(log, instances), instances)
    await recorder.recover()
    return recorder, SessionEvents(key, recorder)


async def waited(waits: list[Follower]) -> None:
    """Wait until the responses have looked at their calls again."""
    before = len(waits)
    await until(lambda: len(waits) > before + 5)


# What it is


async def test_a_call_begins_without_waiting_for_the_log_and_its_client_can_come_back(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    held = log.hold("append")
    call, last_event_id = await away(talking, client)
    assert log.appended == []
    call.answer()
    await held.wait_entered()
    log.up()
    held.release()
    resumed = await opened(client, last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["done"]
    assert [event.kind for event in log.stored(client.session_id)] == [EventKind.RESPONSE]


async def test_its_id_is_one_that_earlier_versions_read(one: Instance, talking: Talking, client: Client) -> None:
    _, last_event_id = await away(talking, client)
    stream = f"{instances_of(one.manager).name}.1"
    raw = base64.urlsafe_b64decode(last_event_id + "=" * (-len(last_event_id) % 4))
    assert raw[TAG_SIZE:].decode() == f"0/0/{stream}//{client._last_id}"
    assert place_of(client, last_event_id) == Cursor(stream, 0, 0, client._last_id)


@pytest.mark.parametrize("retry_interval", [None, 1234])
def test_it_is_written_as_the_sdk_writes_it(log: FaultyLog, retry_interval: int | None) -> None:
    instances = lone_instance(log.mailbox)
    recorder = EventRecorder(log, Followers(log, instances), instances)
    events = SessionEvents(session_key("any"), recorder, retry_interval=retry_interval)
    assert events.priming_event("id") == ServerSentEvent("", id="id", retry=retry_interval).encode()


async def test_it_comes_behind_the_header_of_a_call_that_might_be_a_handshake(talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client, request_id='"initialize"')
    await until(lambda: exchange.last_event_id is not None)
    call.answer()
    await exchange.end()
    assert [message["type"] for message in exchange.sent[:2]] == ["http.response.start", "http.response.body"]
    assert [event.data for event in exchange.events[:1]] == [""]
    assert told(exchange.messages) == ["done"]


async def test_its_id_names_the_newest_event_that_is_known_here_and_the_first_event_comes_after(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    await opened(client)
    call, exchange = await talking.call(client)
    await call.say("a", "b")
    call.answer()
    await exchange.end()
    _, last_event_id = await away(talking, client)
    assert place_of(client, last_event_id).sequence == 4
    assert [event.position for event in log.stored(client.session_id)][1:] == [1, 2, 3]


async def test_a_restored_copy_asks_the_log_for_its_place_once_and_stores_none(
    store: FaultyStore, log: FaultyLog
) -> None:
    session_id = await left_behind(store, log)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client(session_id)
        held = log.hold("heads")
        exchange = client.open_call("talk")
        await held.wait_entered()
        await one_more_turn()
        assert exchange.sent == []
        assert talking.calls == []
        log.up()
        held.release()
        call = await talking.begun()
        await until(lambda: exchange.last_event_id is not None)
        assert place_of(client, str(exchange.last_event_id))[1:3] == (1, 0)
        last_event_id = await exchange.leave()
        await client.ping()
        assert log.background["heads"] == 1
        resumed = await opened(client, last_event_id)
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["done"]
    assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE] * 3


async def test_a_restored_copy_knows_its_place_where_the_record_says_it(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await left_behind(store, log)
    monkeypatch.setattr(FaultyLog, "is_of", lambda *_: True)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client(session_id)
        call, last_event_id = await away(talking, client)
        assert place_of(client, last_event_id)[1:3] == (1, 0)
        assert log.background["heads"] == 0
        resumed = await opened(client, last_event_id)
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["done"]
    assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE] * 2


async def test_a_restored_copy_asks_the_log_where_its_record_was_loaded_long_ago(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await left_behind(store, log)
    monkeypatch.setattr(FaultyLog, "is_of", lambda *_: True)
    monkeypatch.setattr(newest_event, "KNOWN_FOR", 0.0)
    async with instance(store, events=log) as one:
        await one.client(session_id).ping()
    assert log.background["heads"] == 1


async def test_the_first_calls_of_a_restored_copy_may_begin_at_once(store: FaultyStore, log: FaultyLog) -> None:
    session_id = await left_behind(store, log)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client(session_id)
        held = log.hold("heads")
        exchanges = [client.open_call("talk") for _ in range(3)]
        await until(lambda: held.calls == 3)
        held.release()
        for exchange in exchanges:
            (await talking.begun()).answer()
            await exchange.end()
            assert told(exchange.messages) == ["done"]
            assert place_of(client, exchange.events[0].id or "")[1:3] == (1, 0)
    assert [event.kind for event in log.stored(session_id)] == [EventKind.RESPONSE] * 4


async def test_a_restored_copy_stores_one_where_the_log_does_not_say_its_place(
    store: FaultyStore, log: FaultyLog
) -> None:
    session_id = await left_behind(store, log)
    async with instance(store, Talking().notes, events=log) as one:
        log.broken("heads")
        await one.client(session_id).ping()
    kinds = [event.kind for event in log.stored(session_id)]
    assert kinds == [EventKind.RESPONSE, EventKind.PRIMING, EventKind.RESPONSE]


async def test_a_call_waits_once_where_a_restored_copy_cannot_reach_the_log(store: FaultyStore, log: FaultyLog) -> None:
    session_id = await left_behind(store, log)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client(session_id)
        log.down("append", "heads")
        before = len(log.appended)
        call, exchange = await talking.call(client)
        # That the log cannot be reached is known: storing is left to the background, and no other call asks.
        assert recorder_of(one.manager).down
        assert (await client.ping()).status == 200
        assert log.background["heads"] == 1
        assert len(log.appended) == before
        assert exchange.last_event_id is None
        call.answer()
        await exchange.end()
        assert told(exchange.messages) == ["done"]
        log.up()
        await recorder_of(one.manager).recover()
        _, last_event_id = await away(talking, client)
        assert place_of(client, last_event_id).position == 0


async def test_the_log_is_asked_again_where_the_newest_event_was_heard_of_long_ago(
    log: FaultyLog, talking: Talking, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.ping()
    assert log.background["heads"] == 0
    monkeypatch.setattr(newest_event, "KNOWN_FOR", 0.1)
    await anyio.sleep(0.11)
    await client.ping()
    assert log.background["heads"] == 1
    assert [event.kind for event in log.stored(client.session_id)] == [EventKind.RESPONSE] * 2


@pytest.mark.parametrize("meanwhile", ["cancelled", "evicted", "ended"])
async def test_nothing_is_left_of_a_call_that_does_not_begin_because_of_what_happens_while_the_log_is_asked(
    store: FaultyStore, log: FaultyLog, meanwhile: str
) -> None:
    record = await store.inner.create(new_session())
    recorder, events = await running(log, record.key)
    events.begin(None, known_at=clock.now())
    held = log.hold("heads")
    ids: list[str | None] = []

    async def begin() -> None:
        ids.append(await primed(events, "1"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
        await held.wait_entered()
        match meanwhile:
            case "cancelled":
                tasks.cancel_scope.cancel()
            case "evicted":
                await events.abandon()
            case _:
                events.close("ended")
        held.release()
    assert ids == ([] if meanwhile == "cancelled" else [None])
    assert recorder.unfinished == {}
    assert log.appended == []


async def test_one_is_stored_while_this_instance_may_seem_dead(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    log.down("beat")
    with pytest.raises(Exception, match="down"):
        await instances_of(one.manager).beat()
    await client.ping()
    log.up()
    await instances_of(one.manager).beat()
    await client.ping()
    kinds = [event.kind for event in log.stored(client.session_id)]
    assert kinds == [EventKind.PRIMING, EventKind.RESPONSE, EventKind.RESPONSE]


async def test_one_is_stored_after_an_event_that_could_not_be(log: FaultyLog, talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client)
    log.broken("append")
    await call.say("a")
    await hears(exchange, "a")
    # The log takes none of this session: the client has nothing to come back for.
    _, exchange = await talking.call(client)
    await one_more_turn()
    assert exchange.last_event_id is None
    log.up()
    _, last_event_id = await away(talking, client)
    assert [event.kind for event in log.stored(client.session_id)] == [EventKind.PRIMING]
    assert place_of(client, last_event_id)[1:3] == (1, 0)


# The call runs


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("hints", [False, True], ids=["polling", "hints"])
@pytest.mark.parametrize("with_log", [False, True], ids=["first of its session", "later"])
@pytest.mark.parametrize("said", [0, 1, 2], ids=["nothing yet", "something", "all"])
async def test_a_client_that_comes_back_with_it_gets_all_that_the_call_says_once(
    other_log: FaultyLog,
    talking: Talking,
    one: Instance,
    two: Instance,
    client: Client,
    elsewhere: bool,
    hints: bool,
    with_log: bool,
    said: int,
) -> None:
    other_log.hints = hints
    if with_log:
        await opened(client)
        await client.ping()
    call, last_event_id = await away(talking, client)
    await call.say(*["a", "b"][:said])
    if said == 2:
        call.answer()
    back = two.client(client.session_id) if elsewhere else client
    resumed = await opened(back, last_event_id)
    for text in ["a", "b"][said:]:
        await one_more_turn()
        await call.say(text)
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "done"]
    assert len({event.id for event in resumed.events}) == 3
    assert (await back.open_stream(resumed.last_event_id).answer()).status == 405


async def test_a_call_that_says_nothing_goes_on_here_though_the_log_was_trimmed(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=FEW)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, last_event_id = await away(talking, client)
        for _ in range(15):
            await client.ping()
        resumed = await opened(client, last_event_id)
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["done"]


async def test_a_call_that_says_nothing_for_long_goes_on_elsewhere(
    store: FaultyStore, clock: Clock, waits: list[Follower]
) -> None:
    log = FaultyLog(store, policy=SHORT)
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, instance_timeout=PATIENT) as one,
        instance(store, events=log, instance_timeout=PATIENT) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        following = await opened(two.client(session_id), last_event_id)
        await client.ping()
        recorder = recorder_of(one.manager)
        for _ in range(8):
            clock.advance(timedelta(minutes=1))
            for some in (one, two):
                await instances_of(some.manager).beat()
            await recorder.refresh_idle_calls()
            await sweep_events(log)
            await waited(waits)
        # What others have said since is gone, and so are the first events that showed that the call runs.
        assert min(event.sequence for event in log.stored(session_id)) > 2
        assert not following.over.is_set()
        resumed = await opened(two.client(session_id), last_event_id)
        await following.end()
        assert following.messages == []
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["done"]


# The call is gone


@pytest.mark.parametrize("with_log", [False, True], ids=["first of its session", "later"])
async def test_a_call_whose_instance_was_killed_before_its_first_event_is_lost(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog, clock: Clock, with_log: bool
) -> None:
    talking = Talking()
    log = FaultyLog(store)
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        if with_log:
            await client.ping()
        _, last_event_id = await away(talking, client)
        log.down("append", "beat", "retire")
    async with instance(other_store, events=other_log) as one:
        resumed = await opened(one.client(session_id), last_event_id)
        before = other_log.mailbox.background["last_beats"]
        await until(lambda: other_log.mailbox.background["last_beats"] > before)
        assert not resumed.over.is_set()
        clock.advance(LONG)
        await instances_of(one.manager).beat()
        await resumed.end()
        assert told(resumed.messages) == ["lost"]
        assert resumed.messages[0]["id"] == client._last_id
        assert (await one.client(session_id).open_stream(resumed.last_event_id).answer()).status == 405


@pytest.mark.parametrize("with_log", [False, True], ids=["first of its session", "later"])
async def test_a_call_whose_instance_retired_before_its_first_event_is_lost_at_once(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog, with_log: bool
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        if with_log:
            await client.ping()
        _, last_event_id = await away(talking, client)
        # It stops, and the loss of each call cannot be stored.
        log.down("append")
    async with instance(other_store, events=other_log) as one:
        resumed = await opened(one.client(session_id), last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["lost"]


async def test_a_call_whose_copy_left_memory_before_its_first_event_is_lost(
    talking: Talking, one: Instance, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    _, last_event_id = await away(talking, client)
    resumed = await opened(two.client(session_id), last_event_id)
    await one.terminate(session_id)
    await resumed.end()
    assert told(resumed.messages) == ["lost"]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("trimmed_by", ["number", "age"])
async def test_a_call_whose_answer_is_not_kept_any_more_ends_with_an_error(
    store: FaultyStore, other_store: FaultyStore, clock: Clock, elsewhere: bool, trimmed_by: str
) -> None:
    policy = FEW if trimmed_by == "number" else SHORT
    log = FaultyLog(store, policy=policy)
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log) as one,
        instance(other_store, events=FaultyLog(other_store, policy=policy)) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        call.answer()
        await until(lambda: recorder_of(one.manager).unfinished == {})
        if trimmed_by == "number":
            for _ in range(15):
                await client.ping()
        else:
            clock.advance(timedelta(minutes=6))
            await sweep_events(log)
        resumed = await opened(two.client(session_id) if elsewhere else client, last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["trimmed"]


async def never_began(one: Instance, client: Client) -> str:
    """The id before the first event of a call of a running instance which never began."""
    stream = f"{instances_of(one.manager).name}.ffff"
    return EventIds(session_key(str(client.session_id))).write(stream, 0, 0, "never")


async def test_a_call_that_never_ran_is_lost_here_at_once(one: Instance, client: Client) -> None:
    resumed = await opened(client, await never_began(one, client))
    await resumed.end()
    assert told(resumed.messages) == ["lost"]


@pytest.mark.parametrize("max_age", [timedelta(minutes=5), timedelta(days=30), None], ids=str)
async def test_a_call_that_never_ran_on_a_living_instance_is_lost_elsewhere_in_bounded_time(
    store: FaultyStore,
    other_store: FaultyStore,
    clock: Clock,
    waits: list[Follower],
    max_age: timedelta | None,
) -> None:
    policy = EventPolicy(max_age=max_age)
    log, other_log = FaultyLog(store, policy=policy), FaultyLog(other_store, policy=policy)
    silence = min(max_age or timedelta.max, timedelta(hours=1))
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, instance_timeout=PATIENT) as one,
        instance(other_store, events=other_log, instance_timeout=PATIENT) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        resumed = await opened(two.client(session_id), await never_began(one, client))
        runs = await opened(two.client(session_id), last_event_id)

        async def pass_by(passed: timedelta) -> None:
            for some in (one, two):
                await instances_of(some.manager).beat()
            clock.advance(passed)
            for some in (one, two):
                await instances_of(some.manager).beat()
            await waited(waits)

        await pass_by(0.9 * silence)
        # While the database cannot be reached no call can be heard of.
        other_log.down("beat")
        with pytest.raises(Exception, match="down"):
            await instances_of(two.manager).beat()
        clock.advance(2 * silence)
        await waited(waits)
        other_log.up()
        await pass_by(0.9 * silence)
        assert not resumed.over.is_set()
        await call.say("a")
        await hears(runs, "a")
        await pass_by(0.2 * silence)
        await resumed.end()
        assert told(resumed.messages) == ["lost"]
        assert resumed.messages[0]["id"] == "never"
        assert not runs.over.is_set()


async def test_a_call_that_is_heard_of_at_the_last_moment_is_not_lost(
    store: FaultyStore, other_store: FaultyStore, clock: Clock, waits: list[Follower]
) -> None:
    log, other_log = FaultyLog(store, policy=SHORT), FaultyLog(other_store, policy=SHORT)
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, instance_timeout=PATIENT) as one,
        instance(other_store, events=other_log, instance_timeout=PATIENT) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        resumed = await opened(two.client(session_id), last_event_id)
        await waited(waits)
        held = other_log.hold("read")
        clock.advance(timedelta(minutes=6))
        await held.wait_entered()
        await call.say("a")
        other_log.up()
        held.release()
        await hears(resumed, "a")
        call.answer()
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]


async def test_no_call_begins_in_a_copy_that_has_left_memory(store: FaultyStore, log: FaultyLog) -> None:
    record = await store.inner.create(new_session())
    recorder, events = await running(log, record.key)
    events.begin(0, known_at=clock.now())
    assert await primed(events, "1") is not None
    await events.abandon()
    assert await primed(events, "2") is None
    assert recorder.unfinished == {}


async def test_a_call_under_the_id_of_one_that_runs_does_not_begin_in_a_copy_that_leaves_meanwhile(
    store: FaultyStore, log: FaultyLog
) -> None:
    record = await store.inner.create(new_session())
    recorder, events = await running(log, record.key)
    events.begin(0, known_at=clock.now())
    await primed(events, "1")
    held = log.hold("append")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(primed, events, "1")
        await held.wait_entered()
        log.up()
        await events.abandon()
        held.release()
    assert recorder.unfinished == {}


# The session ends


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("ended_by", ["DELETE", "operator"])
async def test_a_client_that_waits_for_the_first_event_of_its_session_is_told_that_it_has_ended(
    store: FaultyStore,
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    elsewhere: bool,
    ended_by: str,
) -> None:
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, end_within=0.2) as one,
        instance(other_store, events=other_log, end_within=0.2) as two,
    ):
        for some in (one, two):
            await some.first_poll()
        client = one.client()
        session_id = await client.handshake()
        _, last_event_id = await away(talking, client)
        back = two.client(session_id) if elsewhere else client
        resumed = await opened(back, last_event_id)
        if ended_by == "DELETE":
            await client.delete()
        else:
            await FaultyStore(store.inner).end(session_key(session_id), reason=EndReason.OPERATOR)
        await resumed.end()
        assert told(resumed.messages) == ["ended"]
        assert (await back.open_stream(last_event_id).answer()).status == 404


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
async def test_a_client_that_comes_back_for_the_first_event_of_its_session_just_as_it_ends_does_not_wait(
    log: FaultyLog, other_log: FaultyLog, talking: Talking, two: Instance, client: Client, elsewhere: bool
) -> None:
    _, last_event_id = await away(talking, client)
    back, its_log = (two.client(client.session_id), other_log) if elsewhere else (client, log)
    held = its_log.hold("read", after=True)
    resumed = back.open_stream(last_event_id)
    await held.wait_entered()
    await back.delete()
    its_log.up()
    held.release()
    await resumed.end()
    assert (await back.open_stream(last_event_id).answer()).status == 404


async def test_a_response_whose_session_ends_while_it_reads_the_log_says_so(
    other_log: FaultyLog, talking: Talking, two: Instance, client: Client
) -> None:
    call, last_event_id = await away(talking, client)
    back = two.client(client.session_id)
    resumed = await opened(back, last_event_id)
    await one_more_turn()
    held = other_log.hold("read")
    await call.say("a")
    await held.wait_entered()
    await back.delete()
    other_log.up()
    held.release()
    await resumed.end()
    assert told(resumed.messages) == ["ended"]


async def test_a_log_that_goes_before_its_first_event_is_read_is_not_read_without_pause(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log) as one,
        instance(other_store, events=other_log, end_within=0.5) as two,
    ):
        await two.first_poll()
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        resumed = await opened(two.client(session_id), last_event_id)
        await one_more_turn()
        held = other_log.hold("read")
        await call.say("a")
        await held.wait_entered()
        await FaultyStore(store.inner).end(session_key(session_id), reason=EndReason.OPERATOR)
        reads = 0

        async def counted() -> None:
            nonlocal reads
            reads += 1
            # Or nothing else would run between reads without pause.
            await anyio.sleep(0.001)

        other_log.before("read", counted)
        held.release()
        await resumed.end()
        assert told(resumed.messages) == ["ended"]
        assert reads <= 2
