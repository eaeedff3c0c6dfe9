"""Calls that will never be answered, because what ran them is gone: their clients are told, and others are not."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server import streamable_http_manager
from mcp.server.runner import serve_loop

from mcp_session_store import EndReason, RetentionPolicy, StoreUnavailable, session_key
from mcp_session_store.adapter.streams.event_ids import Cursor
from mcp_session_store.adapter.streams.followers import POLL_INTERVAL, Follower
from mcp_session_store.event_log import NO_SESSION
from mcp_session_store.records import EventKind
from mcp_session_store.settings import InstanceSettings
from tests.support.asgi import until
from tests.support.faulty_stores import FaultyLog, FaultyStore
from tests.support.instances import instance
from tests.support.internals import cancel_tasks, instances_of, recorder_of, registry_of, shut_down, stopping_in
from tests.support.streams import away, one_more_turn, opened, without_ids
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.asgi import Client, Exchange
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

LONG = timedelta(seconds=InstanceSettings().instance_timeout + 1)
"""So long an instance says nothing that is gone."""


@asynccontextmanager
async def killed(store: FaultyStore, talking: Talking) -> AsyncIterator[Instance]:
    """An instance that is killed at the end: it says nothing of it, and stores nothing more."""
    log = FaultyLog(store)
    async with instance(store, talking.notes, events=log) as one:
        yield one
        log.down("append", "beat", "retire")


async def beat(*instances: Instance) -> None:
    """Have instances say now that they run."""
    for one in instances:
        await instances_of(one.manager).beat()


async def looked(log: FaultyLog) -> None:
    """Wait until it has been asked once more which instances run."""
    before = log.mailbox.background["last_beats"]
    await until(lambda: log.mailbox.background["last_beats"] > before)
    await one_more_turn()


def names_its_call(exchange: Exchange, client: Client) -> bool:
    """Whether a stream ended with an error of the client's last call that it can act on, and settle."""
    last = exchange.messages[-1]
    return last["id"] == client._last_id and last["error"]["code"] == -32000 and exchange.events[-1].id is not None


# Another instance is gone


@pytest.mark.parametrize("hints", [False, True], ids=["polling", "hints"])
async def test_a_call_of_an_instance_that_was_killed_is_lost_when_it_has_been_silent_for_too_long(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog, clock: Clock, hints: bool
) -> None:
    other_log.hints = hints
    talking = Talking()
    async with killed(store, talking) as gone:
        client = gone.client()
        session_id = await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        await hears(exchange, "a")
        last_event_id = await exchange.leave()
        await call.say("b")
        await until(lambda: len(other_log.messages(session_id)) == 2)
    async with instance(other_store, events=other_log) as one:
        back = one.client(session_id)
        resumed = await opened(back, last_event_id)
        await hears(resumed, "b")
        await looked(other_log)
        # It may come again.
        assert not resumed.over.is_set()
        clock.advance(LONG)
        await beat(one)
        await resumed.end()
        assert told(resumed.messages) == ["b", "lost"]
        assert names_its_call(resumed, client)
        assert "not run again" in resumed.messages[-1]["error"]["message"]
        assert (await back.open_stream(resumed.last_event_id).answer()).status == 405
        # Whoever comes later is told at once.
        for _ in range(2):
            later = back.open_stream(last_event_id)
            await later.end()
            assert told(later.messages) == ["b", "lost"]
        assert one.notes.genuine("tools/call") == []
        assert one.notes.replayed("tools/call") == []


async def test_a_call_of_an_instance_that_stopped_is_lost_at_once(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(other_store, events=other_log) as two:
        async with instance(store, talking.notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            call, last_event_id = await away(talking, client)
            resumed = await opened(two.client(session_id), last_event_id)
            await call.say("a")
            await hears(resumed, "a")
        assert log.mailbox.background["retire"] == 1
        await resumed.end()
        assert told(resumed.messages) == ["a", "lost"]
        assert names_its_call(resumed, client)


@pytest.mark.parametrize("name", ["\0", "1234567\0", "1234567\ud800", "", "x" * 300], ids=range(5))
async def test_a_name_that_no_instance_can_have_does_not_stop_the_look_at_all_others(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog, name: str
) -> None:
    talking = Talking()
    async with instance(other_store, events=other_log) as two:
        followers = recorder_of(two.manager).followers
        odd = Follower(NO_SESSION, f"{name}.1", Cursor(f"{name}.1", 0, 0))
        followers.add(odd, instance=name)
        async with instance(store, talking.notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            _, last_event_id = await away(talking, client)
            resumed = await opened(two.client(session_id), last_event_id)
            await until(lambda: followers.is_dead(name))
        await resumed.end()
        assert told(resumed.messages) == ["lost"]
        followers.remove(odd, instance=name)


async def test_a_client_that_comes_back_often_has_no_poll_of_its_own(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    talking = Talking()
    async with (
        instance(other_store, events=other_log) as two,
        instance(store, talking.notes, events=log) as one,
    ):
        client = one.client()
        session_id = await client.handshake()
        _, last_event_id = await away(talking, client)
        back = two.client(session_id)
        other_log.background.clear()
        began = anyio.current_time()
        for _ in range(20):
            resumed = await opened(back, last_event_id)
            await anyio.sleep(0.02)
            await resumed.leave()
        polls = (anyio.current_time() - began) / (0.8 * POLL_INTERVAL)
        assert other_log.mailbox.background["last_beats"] <= polls + 1


async def test_who_comes_back_after_the_instance_stopped_is_told_at_once(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        await call.say("a")
        await until(lambda: log.messages(session_id) != [])
    async with instance(store, events=log) as one:
        resumed = one.client(session_id).open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["a", "lost"]
        assert names_its_call(resumed, client)


async def test_an_answer_is_given_though_the_instance_that_stored_it_is_gone(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as gone:
        client = gone.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        texts = [str(n) for n in range(250)]
        await call.say(*texts)
        call.answer()
        await until(lambda: "done" in log.messages(session_id)[-1])
    async with instance(store, events=log) as one:
        resumed = one.client(session_id).open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == [*texts, "done"]


async def test_an_answer_that_is_stored_just_before_its_instance_stops_is_given(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    other_log.hints = False
    talking = Talking()
    async with instance(other_store, events=other_log) as two:
        async with instance(store, talking.notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            call, last_event_id = await away(talking, client)
            resumed = await opened(two.client(session_id), last_event_id)
            await looked(other_log)
            # It learns of nothing while this happens.
            held = other_log.hold("heads")
            await held.wait_entered()
            call.answer()
            await until(lambda: log.messages(session_id) != [])
        other_log.up()
        held.release()
        await resumed.end()
        assert told(resumed.messages) == ["done"]


async def test_a_call_that_says_nothing_for_long_is_not_lost_while_its_instance_runs(
    other_log: FaultyLog, clock: Clock, talking: Talking, one: Instance, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    resumed = await opened(two.client(session_id), last_event_id)
    for _ in range(5):
        clock.advance(LONG / 2)
        await beat(one, two)
        await looked(other_log)
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["done"]


async def test_after_an_outage_nobody_is_taken_for_gone_who_had_no_chance_to_say_that_he_runs(
    log: FaultyLog, other_log: FaultyLog, clock: Clock, talking: Talking, one: Instance, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    resumed = await opened(two.client(session_id), last_event_id)
    clock.advance(LONG / 2)
    await beat(one, two)
    for some in (log, other_log):
        some.down()
    with pytest.raises(Exception, match="down"):
        await beat(two)
    clock.advance(2 * LONG)
    # It is back, and this one is the first to say so.
    other_log.up()
    await beat(two)
    await looked(other_log)
    clock.advance(LONG / 2)
    await beat(two)
    await looked(other_log)
    assert not resumed.over.is_set()
    log.up()
    await beat(one)
    clock.advance(LONG / 2)
    await beat(one, two)
    await looked(other_log)
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["done"]


async def test_after_an_outage_who_stays_silent_is_taken_for_gone(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog, clock: Clock
) -> None:
    talking = Talking()
    async with instance(other_store, events=other_log) as two:
        async with killed(store, talking) as one:
            client = one.client()
            session_id = await client.handshake()
            _, last_event_id = await away(talking, client)
        resumed = await opened(two.client(session_id), last_event_id)
        other_log.down()
        with pytest.raises(Exception, match="down"):
            await beat(two)
        clock.advance(2 * LONG)
        other_log.up()
        await beat(two)
        await looked(other_log)
        assert not resumed.over.is_set()
        clock.advance(LONG)
        await beat(two)
        await resumed.end()
        assert told(resumed.messages) == ["lost"]


async def test_how_long_an_instance_may_be_silent_is_configured(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog, clock: Clock
) -> None:
    talking = Talking()
    async with killed(store, talking) as gone:
        client = gone.client()
        session_id = await client.handshake()
        _, last_event_id = await away(talking, client)
    async with instance(other_store, events=other_log, instance_timeout=600) as one:
        resumed = await opened(one.client(session_id), last_event_id)
        clock.advance(timedelta(minutes=9))
        await beat(one)
        await looked(other_log)
        assert not resumed.over.is_set()
        clock.advance(timedelta(minutes=2))
        await beat(one)
        await resumed.end()
        assert told(resumed.messages) == ["lost"]


async def test_an_instance_says_three_times_within_its_timeout_that_it_runs(store: FaultyStore, log: FaultyLog) -> None:
    async with instance(store, events=log, instance_timeout=0.3):
        before = log.mailbox.background["beat"]
        await until(lambda: log.mailbox.background["beat"] >= before + 3)


async def test_one_query_tells_of_all_instances_that_are_waited_for(store: FaultyStore, log: FaultyLog) -> None:
    clients: list[tuple[str, str]] = []
    for _ in range(3):
        talking = Talking()
        async with killed(FaultyStore(store.inner), talking) as gone:
            client = gone.client()
            session_id = await client.handshake()
            clients += [(session_id, (await away(talking, client))[1]) for _ in range(2)]
    async with instance(store, events=log) as one:
        asked: list[set[str]] = []
        last_beats = log.mailbox.inner.last_beats

        async def note(names: Any) -> Any:
            asked.append(set(names))
            return await last_beats(names)

        log.mailbox.inner.last_beats = note  # type: ignore[method-assign]
        streams = [await opened(one.client(*client)) for client in ((session_id,) for session_id, _ in clients[::2])]
        resumed = [await opened(one.client(session_id), last_event_id) for session_id, last_event_id in clients]
        await until(lambda: asked != [] and len(asked[-1]) == 3)
        before = len(asked)
        await one_more_turn()
        assert len(asked) - before <= 1
        assert not any(stream.over.is_set() for stream in [*streams, *resumed])


# A copy here is gone


async def test_a_call_whose_copy_has_left_this_instance_is_lost(
    log: FaultyLog, talking: Talking, one: Instance, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    await call.say("a")
    elsewhere = await opened(two.client(session_id), last_event_id)
    await hears(elsewhere, "a")
    await one.terminate(session_id)
    await elsewhere.end()
    assert call.cancelled
    assert told(elsewhere.messages) == ["a", "lost"]
    assert names_its_call(elsewhere, client)
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["a", "lost"]
    # It is stored once, as the last event of the call.
    assert [event.kind for event in log.stored(session_id)] == [EventKind.NOTIFICATION, EventKind.ERROR]
    assert recorder_of(one.manager).unfinished == {}


async def test_a_call_is_lost_with_a_server_loop_that_crashes(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = anyio.Event()

    async def crashing(*args: Any, **kwargs: Any) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: serve_loop(*args, **kwargs))
            await crash.wait()
            raise RuntimeError("a bug")

    monkeypatch.setattr(streamable_http_manager, "serve_loop", crashing)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        _, last_event_id = await away(talking, client)
        crash.set()
        await until(lambda: one.residents == 0)
        monkeypatch.setattr(streamable_http_manager, "serve_loop", serve_loop)
        resumed = client.open_stream(last_event_id)
        await resumed.end()
        # The SDK's own error, which it writes when its dispatcher is closed.
        assert told(resumed.messages) == ["Connection closed"]
        assert names_its_call(resumed, client)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_an_answer_that_is_being_stored_when_its_copy_leaves_is_not_lost(
    log: FaultyLog, after: bool, talking: Talking, one: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    held = log.hold("append", after=after)
    call.answer("precious")
    await held.wait_entered()
    log.up()
    session = registry_of(one.manager).get(session_id)
    assert session is not None
    await registry_of(one.manager).evict(session)
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["precious"]
    assert len(log.messages(session_id)) == 1
    assert recorder_of(one.manager).unfinished == {}


async def test_a_copy_whose_answers_are_not_stored_yet_is_in_use(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, max_sessions=1) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        session = registry_of(one.manager).get(session_id)
        assert session is not None
        # Another copy has changed what a restore replays: this one leaves as soon as nobody uses it.
        session.stale_since = 99
        held = log.hold("append")
        call.answer("precious")
        await held.wait_entered()
        await one_more_turn()
        assert session.busy
        assert (await one.client().initialize()).status == 503
        held.release()
        await until(lambda: one.residents == 0)
        log.up()
        resumed = client.open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["precious"]


async def test_a_call_that_its_client_cancels_is_answered_on_its_stream(talking: Talking, client: Client) -> None:
    call, last_event_id = await away(talking, client)
    resumed = await opened(client, last_event_id)
    await client.notify("notifications/cancelled", {"requestId": client._last_id})
    await resumed.end()
    assert call.cancelled
    assert told(resumed.messages) == ["Request cancelled"]


async def test_a_call_whose_id_is_used_again_while_it_runs_ends_with_an_error(
    talking: Talking, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client, request_id=7)
    await call.say("a")
    await hears(exchange, "a")
    resumed = await opened(two.client(session_id), await exchange.leave())
    await talking.call(client, request_id=7)
    await resumed.end()
    assert told(resumed.messages) == ["lost"]
    assert resumed.messages[-1]["id"] == 7


# The session ends


@pytest.mark.parametrize("hints", [False, True], ids=["polling", "hints"])
@pytest.mark.parametrize("ended_by", ["DELETE here", "DELETE elsewhere", "operator", "expiry"])
async def test_who_follows_a_call_is_told_that_its_session_has_ended(
    store: FaultyStore,
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    ended_by: str,
    hints: bool,
    clock: Clock,
) -> None:
    store.hints = other_store.hints = log.hints = other_log.hints = hints
    if ended_by == "expiry":
        store.retention = RetentionPolicy(absolute=timedelta(hours=1))
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log, end_within=0.2) as one,
        instance(other_store, events=other_log, end_within=0.2) as two,
    ):
        await one.first_poll()
        await two.first_poll()
        client = one.client()
        session_id = await client.handshake()
        there = two.client(session_id)
        call, last_event_id = await away(talking, client)
        await call.say("a")
        _, connected = await talking.call(client)
        call_ids = [client._last_id - 1, client._last_id]
        standalone = await opened(client)
        other_standalone = await opened(there, standalone.last_event_id)
        if ended_by == "DELETE elsewhere":
            # The followed call runs on the one instance, and its client is on the other.
            resumed = await opened(there, last_event_id)
        else:
            resumed = await opened(client, last_event_id)
        await hears(resumed, "a")
        if ended_by == "DELETE here":
            await client.delete()
        elif ended_by == "DELETE elsewhere":
            await there.delete()
        elif ended_by == "operator":
            await FaultyStore(store.inner).end(session_key(session_id), reason=EndReason.OPERATOR)
        else:
            clock.advance(timedelta(hours=2))
        for stream in (resumed, connected, standalone, other_standalone):
            await stream.end()
        assert told(resumed.messages) == ["a", "ended"]
        assert [resumed.messages[-1]["id"], connected.messages[-1]["id"]] == call_ids
        assert resumed.messages[-1]["error"]["message"] == "Session ended"
        assert told(connected.messages) == ["ended"]
        # The standalone stream belongs to no call.
        assert standalone.messages == other_standalone.messages == []
        assert (await client.open_stream(last_event_id).answer()).status == 404
        assert (await there.open_stream(last_event_id).answer()).status == 404
        # What has expired is there until it is swept.
        assert ended_by == "expiry" or log.stored(session_id) == []


async def test_nothing_is_left_of_a_session_that_was_ended_while_calls_ran(talking: Talking, one: Instance) -> None:
    client, other = one.client(), one.client()
    session_id = await client.handshake()
    await other.handshake()
    recorder = recorder_of(one.manager)
    _, connected = await talking.call(client)
    _, last_event_id = await away(talking, client)
    resumed = await opened(client, last_event_id)
    stream = await opened(client)
    goes_on, exchange = await talking.call(other)
    assert (await client.delete()).status == 200
    for open_response in (connected, resumed, stream):
        await open_response.end()
    await until(lambda: len(recorder.unfinished) == 1)
    assert recorder.followers.of(session_key(session_id)) == []
    assert (await client.open_stream(last_event_id).answer()).status == 404
    goes_on.answer()
    await exchange.end()
    assert told(exchange.messages) == ["done"]
    assert recorder.unfinished == {}


async def test_the_end_of_a_session_is_told_though_the_log_hangs(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    _, connected = await talking.call(client)
    _, last_event_id = await away(talking, client)
    resumed = await opened(client, last_event_id)
    held = log.hold("append")
    assert (await client.delete()).status == 200
    await connected.end()
    await resumed.end()
    assert told(connected.messages) == ["ended"]
    assert told(resumed.messages) == ["ended"]
    await until(lambda: not stopping_in(one.manager))
    await one_more_turn()
    # Its events are gone with it: none is asked for, and none is stored.
    assert held.calls == 0


@pytest.mark.parametrize("of_call", [False, True], ids=["standalone", "call"])
async def test_a_resumption_that_meets_the_end_of_its_session_ends(
    log: FaultyLog, talking: Talking, client: Client, of_call: bool
) -> None:
    stream = await opened(client)
    standalone = str(await stream.leave())
    _, last_event_id = await away(talking, client)
    held = log.hold("read", after=True)
    resumed = client.open_stream(last_event_id if of_call else standalone)
    await held.wait_entered()
    await client.delete()
    log.up()
    held.release()
    await resumed.end()
    assert (await client.open_stream(standalone).answer()).status == 404


# The instance stops


async def test_an_instance_that_stops_closes_its_streams_and_says_so(
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    talking: Talking,
    one: Instance,
    two: Instance,
    client: Client,
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    name = one.manager.instance.rpartition(":")[2]
    async with instance(other_store, events=other_log) as two:
        there = two.client(session_id)
        its_name = two.manager.instance.rpartition(":")[2]
        assert set(await log.mailbox.inner.last_beats([name, its_name])) == {name, its_name}
        resumed, standalone = await opened(there, last_event_id), await opened(there)
        # The streams end by the shutdown, before whoever serves them is cancelled.
        await shut_down(two.manager)
        await resumed.end()
        await standalone.end()
        assert resumed.messages == standalone.messages == []
    assert set(await log.mailbox.inner.last_beats([name, its_name])) == {name}
    # The call runs on, and is not lost.
    resumed = await opened(client, last_event_id)
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["done"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fails", [False, True], ids=["slow", "failing"])
async def test_answers_on_their_way_to_the_log_are_stored_before_their_instance_stops(
    store: FaultyStore, log: FaultyLog, after: bool, fails: bool
) -> None:
    talking = Talking()
    async with anyio.create_task_group() as tasks:
        async with instance(store, talking.notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            first, first_id = await away(talking, client)
            second, second_id = await away(talking, client)
            running, running_id = await away(talking, client)
            held = log.hold("append", after=after)
            first.answer("one")
            await held.wait_entered()
            # It waits for the one before.
            second.answer("two")
            await one_more_turn()

            async def release() -> None:
                await anyio.sleep(0.2)
                log.up()
                if fails:
                    held.fail(StoreUnavailable("it did not answer in time"))
                held.release()

            tasks.start_soon(release)
        assert running.cancelled
        assert log.mailbox.background["retire"] == 1
    assert told([json.loads(message) for message in log.messages(session_id)][:2]) == ["one", "two"]
    async with instance(store, events=log) as two:
        for last_event_id, answer in ((first_id, "one"), (second_id, "two"), (running_id, "lost")):
            resumed = two.client(session_id).open_stream(last_event_id)
            await resumed.end()
            assert told(resumed.messages) == [answer]


async def test_the_loss_of_a_call_that_runs_is_stored_before_its_instance_stops(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with anyio.create_task_group() as tasks, instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        await away(talking, client)
        held = log.hold("append")

        async def release() -> None:
            await held.wait_entered()
            await anyio.sleep(0.2)
            log.up()
            held.release()

        tasks.start_soon(release)
    assert told([json.loads(message) for message in log.messages(session_id)]) == ["lost"]


async def test_a_stop_does_not_wait_for_copies_whose_tasks_are_cancelled(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        await away(talking, client)
        session = registry_of(one.manager).get(str(client.session_id))
        assert session is not None
        assert session.events is not None
        cancel_tasks(one.manager)
        await one_more_turn()
    assert session.events.abandoned.is_set()


async def test_an_answer_whose_copy_is_leaving_is_stored_before_its_instance_stops(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with anyio.create_task_group() as tasks, instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        held = log.hold("append")
        call.answer("precious")
        await held.wait_entered()
        # Storing it is cancelled, and begun again.
        again = log.hold("append")
        session = registry_of(one.manager).get(session_id)
        assert session is not None
        await registry_of(one.manager).evict(session)
        await again.wait_entered()

        async def release() -> None:
            await until(lambda: again.calls > 1)
            log.up()
            again.release()

        tasks.start_soon(release)
    async with instance(store, events=log) as two:
        resumed = two.client(session_id).open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["precious"]
    assert len(log.messages(session_id)) == 1


async def test_a_call_that_went_out_live_is_over(talking: Talking, one: Instance, client: Client) -> None:
    call, exchange = await talking.call(client)
    call.answer()
    await exchange.end()
    assert not without_ids(exchange, "done")
    assert recorder_of(one.manager).unfinished == {}
