"""Events that cannot be stored: no call is held up or lost by it, and what nobody could be given is kept."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EventPolicy, StoreUnavailable
from mcp_session_store.adapter.streams import backlog as backlog_module
from mcp_session_store.adapter.streams import circuit as circuit_module
from mcp_session_store.adapter.streams.followers import Followers
from mcp_session_store.adapter.streams.recorder import LARGE_AT_ONCE, EventRecorder, Outcome
from mcp_session_store.errors import EventTooLarge, SchemaBehind, StoreBusy
from mcp_session_store.event_log import LARGE_APPEND, STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent, checked_size, message_bytes
from mcp_session_store.testing import new_session
from tests.support.asgi import PATIENCE, until
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import instance, lone_instance, principal
from tests.support.internals import backlog_bytes_of, recorder_of
from tests.support.streams import all_stored, away, one_more_turn, opened, without_ids
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

ERRORS = [
    StoreUnavailable("it is down"),
    StoreBusy("too many wait"),
    SchemaBehind("it is behind"),
    EventTooLarge("it is too large"),
    RuntimeError("a bug"),
]
OUTAGES = [("append",), ("append", "beat"), ()]
"""What is down: storing alone, as when the table is locked; what says that the instance runs, too; or all."""


class Still:
    """The instances' monotonic clock, which stands unless it is put forward."""

    def __init__(self, now: float) -> None:
        self.now = now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Still:
    """A clock that stands, so that nothing is tried because time has passed."""
    clock = Still(1000.0)
    monkeypatch.setattr(anyio, "current_time", lambda: clock.now)
    return clock


# What is live


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_the_log_raises_calls_go_on_and_what_they_say_goes_out_without_ids(
    log: FaultyLog, error: Exception, talking: Talking, one: Instance, client: Client
) -> None:
    stream = await opened(client)
    call, exchange = await talking.call(client)
    await call.say("a")
    log.failing(error, "append")
    await call.say("b", "c")
    await call.tell("d")
    call.answer()
    await exchange.end()
    assert without_ids(exchange, "b", "c", "done")
    await hears(stream, "d")
    assert without_ids(stream, "d")
    # A call that begins now, and a session.
    call, exchange = await talking.call(client)
    await call.say("e")
    call.answer()
    await exchange.end()
    assert [event.id for event in exchange.events] == [None, None]
    assert told(exchange.messages) == ["e", "done"]
    await one.client().handshake()
    log.up()
    await ids_come_back(client, talking)
    assert one.residents == 2
    one.assert_seats_match()


async def ids_come_back(client: Client, talking: Talking) -> None:
    """Wait until all that a call says has an id again."""
    with anyio.fail_after(PATIENCE):
        while True:
            call, exchange = await talking.call(client)
            await call.say("again")
            call.answer()
            await exchange.end()
            if [event.id is None for event in exchange.events] == [False] * 3:
                return
            await anyio.sleep(0.05)


async def test_what_was_kept_is_stored_once_though_storing_it_is_cut_short_by_the_end_of_its_instance(
    store: FaultyStore, log: FaultyLog
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, _ = await talking.call(client)
        log.down("append")
        await call.tell("a", "b", "c")
        log.up()
        # First it is tried whether anything can be; then the first is, which may be stored already; then the others.
        storing = log.hold("append", after=True)
        for _ in range(2):
            await storing.wait_entered()
            before, storing = storing, log.hold("append", after=True)
            before.release()
        await storing.wait_entered()
        log.up()
    assert told([json.loads(message) for message in log.messages(session_id)][:3]) == ["a", "b", "c"]
    assert len([stream for stream, _ in log.streams(session_id) if stream == STANDALONE_STREAM]) == 3


async def test_an_event_that_takes_too_long_to_store_goes_out_then(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    call, exchange = await talking.call(client)
    held = log.hold("append")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.say, "a", "b", "c")
        await held.wait_entered()
        await one_more_turn()
        assert exchange.messages == []
        held.fail(StoreUnavailable("it did not answer in time"))
    await hears(exchange, "a", "b", "c")
    assert without_ids(exchange, "a", "b", "c")
    assert len(log.appended) == 1


@pytest.mark.parametrize("outage", OUTAGES, ids=["append", "append and beat", "all"])
async def test_while_the_log_is_down_no_event_waits_for_it(
    log: FaultyLog, still: Still, outage: tuple[str, ...], talking: Talking, one: Instance
) -> None:
    client, other = one.client(), one.client()
    await client.handshake()
    await other.handshake()
    call, exchange = await talking.call(client)
    log.appended.clear()
    log.down(*outage)
    for n in range(40):
        await call.say(str(n))
        await hears(exchange, *(str(m) for m in range(n + 1)))
    other_call, other_exchange = await talking.call(other)
    await other_call.say("a")
    await hears(other_exchange, "a")
    assert len(log.appended) == 1
    log.up()
    await all_stored(one)
    await call.say("stored", "stored")
    await until(lambda: told(exchange.messages)[-2:] == ["stored", "stored"])
    assert None not in [event.id for event in exchange.events[-2:]]


async def test_an_outage_is_told_once_in_the_log(
    store: FaultyStore, log: FaultyLog, still: Still, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=circuit_module.__name__)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, _ = await talking.call(client)
        for _ in range(2):
            log.down("append")
            for _ in range(5):
                still.advance(60)
                await call.say("secret")
            log.up()
            await all_stored(one)
            await call.say("secret", "secret")
        await one_more_turn()
        told_of = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == circuit_module.__name__]
        assert [level for level, _ in told_of] == ["WARNING", "INFO"] * 2
        assert "secret" not in caplog.text
        assert str(client.session_id) not in "".join(text for _, text in told_of)


@pytest.mark.parametrize("outage", OUTAGES, ids=["append", "append and beat", "all"])
async def test_when_the_log_is_back_ids_are_given_from_the_first_event_on(
    log: FaultyLog, still: Still, outage: tuple[str, ...], talking: Talking, one: Instance
) -> None:
    client, other = one.client(), one.client()
    await client.handshake()
    await other.handshake()
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    log.down(*outage)
    await call.say("a")
    await hears(exchange, "a")
    assert (await plain(client)).events == []
    log.up()
    await all_stored(one)
    # Nothing has been said since: the next call and the next stream can be resumed all the same.
    _, exchange = await talking.call(other)
    await until(lambda: exchange.last_event_id is not None)
    await opened(other)


async def plain(client: Client) -> Exchange:
    """A standalone stream that was opened and left while nothing could be stored."""
    stream = client.open_stream()
    await stream.start()
    assert stream.status == 200
    await stream.leave()
    return stream


async def test_a_standalone_stream_that_is_opened_while_the_log_is_down_is_live(
    store: FaultyStore, log: FaultyLog, json_response: bool
) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        call, _ = await talking.call(client)
        log.down("append")
        stream = client.open_stream()
        await stream.start()
        assert stream.status == 200
        await call.tell("a")
        await hears(stream, "a")
        assert without_ids(stream, "a")


async def test_a_client_that_was_given_no_id_is_not_sent_away(log: FaultyLog, talking: Talking, client: Client) -> None:
    log.down("append")
    before, _ = await talking.call(client)
    await before.say("a")
    call, exchange = await talking.call(client)
    await call.close()
    call.answer()
    await exchange.end()
    assert told(exchange.messages) == ["done"]


async def test_a_client_that_does_not_read_holds_nobody_up_while_the_log_is_down(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    exchange.stop_reading()
    log.down("append")
    texts = [str(n) for n in range(60)]
    with anyio.fail_after(PATIENCE):
        await call.say(*texts)
    assert (await client.ping()).status == 200
    call.answer()
    log.up()
    await all_stored(one)
    exchange.read_on()
    await exchange.end()
    # It was live as long as there was room, which is lost with the connection; the rest was kept.
    resumed = client.open_stream(exchange.last_event_id)
    await resumed.end()
    heard = told(exchange.messages) + told(resumed.messages)
    assert told(resumed.messages)[-41:] == [*texts[-40:], "done"]
    assert heard == [text for text in [*texts, "done"] if text in heard]


# What is kept


@pytest.mark.parametrize("outage", OUTAGES, ids=["append", "append and beat", "all"])
async def test_what_nobody_could_be_given_is_stored_when_the_log_is_back(
    log: FaultyLog, outage: tuple[str, ...], talking: Talking, one: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    stream = await opened(client)
    standalone = await stream.leave()
    call, last_event_id = await away(talking, client)
    await call.say("a")
    await until(lambda: len(log.messages(session_id)) == 1)
    log.down(*outage)
    await call.say("b", "c")
    await call.tell("d")
    call.answer()
    await one_more_turn()
    assert len(log.messages(session_id)) == 1
    log.up()
    await all_stored(one)
    assert [event.kind for event in log.stored(session_id)][1:] == [
        *[EventKind.NOTIFICATION] * 4,
        EventKind.RESPONSE,
    ]
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "c", "done"]
    await hears(await opened(client, standalone), "d")


async def test_an_event_is_not_stored_twice_whose_first_try_had_worked(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    call, last_event_id = await away(talking, client)
    log.lose_the_answer_of("append")
    await call.say("a", "b")
    await until(lambda: len(log.appended) >= 1)
    call.answer()
    log.up()
    await all_stored(one)
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "done"]


async def test_the_answer_is_stored_for_who_comes_back_though_it_went_out_live(
    log: FaultyLog, talking: Talking, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    log.down("append")
    call.answer()
    await exchange.end()
    assert without_ids(exchange, "done")
    # Its client has not got it, whatever we think.
    resumed = await opened(two.client(session_id), exchange.last_event_id)
    log.up()
    await resumed.end()
    assert told(resumed.messages) == ["done"]


@pytest.mark.parametrize("is_standalone", [False, True])
async def test_what_is_read_from_the_log_before_its_failure_to_store_that_is_known_comes_once(
    log: FaultyLog, talking: Talking, client: Client, is_standalone: bool
) -> None:
    call, last_event_id = await away(talking, client)
    say = call.tell if is_standalone else call.say
    stream = await opened(client, None if is_standalone else last_event_id)
    await say("a")
    await hears(stream, "a")
    held = log.hold("append", after=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(say, "b")
        await held.wait_entered()
        stream = await opened(client, await stream.leave())
        await hears(stream, "b")
        held.fail(StoreUnavailable("the test says the answer is lost"))
        log.up()
    await say("c")
    await until(lambda: told(stream.messages)[-1] == "c")
    assert told(stream.messages) == ["b", "c"]


async def test_who_has_resumed_a_stream_is_given_what_cannot_be_stored_once(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    call, last_event_id = await away(talking, client)
    resumed = await opened(client, last_event_id)
    await call.say("a")
    await hears(resumed, "a")
    last_event_id = str(resumed.last_event_id)
    await one_more_turn()
    log.down("append")
    await call.say("b")
    await hears(resumed, "a", "b")
    await one_more_turn()
    call.answer()
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "done"]
    assert without_ids(resumed, "b", "done")
    log.up()
    await all_stored(one)
    resumed = client.open_stream(last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["done"]


async def test_what_cannot_be_stored_waits_for_a_client_that_has_not_read_what_was(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    call, last_event_id = await away(talking, client)
    await call.say("a", "b")
    resumed = client.open_stream(last_event_id)
    resumed.stop_reading()
    await until(lambda: log.counts()["read"] > 0)
    await one_more_turn()
    log.down("append")
    await call.say("c")
    call.answer()
    await one_more_turn()
    resumed.read_on()
    log.up()
    await resumed.end()
    assert told(resumed.messages) == ["a", "b", "c", "done"]
    assert all(event.id for event in resumed.events)


async def test_the_loss_of_a_call_is_stored_when_the_log_is_back(
    log: FaultyLog, talking: Talking, one: Instance, two: Instance, client: Client
) -> None:
    session_id = str(client.session_id)
    call, last_event_id = await away(talking, client)
    log.down("append")
    await one.terminate(session_id)
    await until(lambda: call.cancelled)
    resumed = await opened(two.client(session_id), last_event_id)
    await one_more_turn()
    assert resumed.messages == []
    log.up()
    await resumed.end()
    assert told(resumed.messages) == ["lost"]


# The bound


@pytest.mark.parametrize(("bound", "value"), [("MAX_EVENTS", 3), ("MAX_BYTES", 450), ("MAX_BYTES_IN_ALL", 450)])
@pytest.mark.parametrize("answer", [pytest.param("x" * 100, id="small"), pytest.param("x" * 800, id="large")])
async def test_no_more_is_kept_than_there_is_room_for_and_an_answer_before_what_its_call_said(
    store: FaultyStore,
    other_store: FaultyStore,
    log: FaultyLog,
    other_log: FaultyLog,
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    value: int,
    answer: str,
) -> None:
    monkeypatch.setattr(backlog_module, bound, value)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one, instance(other_store, events=other_log) as two:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        log.down("append")
        await call.say(*(str(n) for n in range(20)))
        call.answer(answer)
        await one_more_turn()
        resumed = await opened(two.client(session_id), last_event_id)
        log.up()
        await resumed.end()
        *kept, last = told(resumed.messages)
        assert kept == [str(n) for n in range(len(kept))]
        assert len(kept) <= 5
        # What has more bytes than may wait is an error for who comes back, with the id of the call.
        assert last == ("lost" if bound != "MAX_EVENTS" and len(answer) > value else answer)
        assert resumed.messages[-1]["id"] == client._last_id
        await all_stored(one)
        assert backlog_bytes_of(one.manager) == 0
        assert recorder_of(one.manager).unfinished == {}


@pytest.mark.parametrize(
    "principals",
    [
        pytest.param((None, None), id="no principals"),
        pytest.param((principal("greedy"), principal("modest")), id="principals"),
        pytest.param((None, principal("modest")), id="a stranger"),
    ],
)
async def test_the_answers_of_others_are_kept_though_the_first_have_taken_all_the_room(
    store: FaultyStore,
    log: FaultyLog,
    monkeypatch: pytest.MonkeyPatch,
    principals: tuple[AuthenticatedUser | None, AuthenticatedUser | None],
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BYTES", 20_000)
    monkeypatch.setattr(backlog_module, "MAX_BYTES_IN_ALL", 80_000)
    greedy, modest = principals
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        answers: list[tuple[Client, str]] = []
        log_is_full = 5
        calls = []
        for user in [greedy] * log_is_full + [modest]:
            client = one.client(user=user)
            await client.handshake()
            call, last_event_id = await away(talking, client)
            calls.append(call)
            answers.append((client, last_event_id))
        log.down("append")
        for call in calls[:-1]:
            await call.say("x" * 8_000)
            call.answer("y" * 10_000)
            await one_more_turn()
        calls[-1].answer("z" * 4_000)
        await one_more_turn()
        assert backlog_bytes_of(one.manager) <= 80_000 + 500
        log.up()
        await all_stored(one)
        heard = []
        for client, last_event_id in answers:
            resumed = client.open_stream(last_event_id)
            await resumed.end()
            heard.append(told(resumed.messages)[-1])
        assert heard == ["y" * 10_000] * log_is_full + ["z" * 4_000]


async def test_an_answer_that_has_gone_from_the_backlog_takes_no_memory(
    log: FaultyLog, talking: Talking, one: Instance, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BYTES", 1000)
    call, _ = await away(talking, client)
    log.down("append")
    call.answer("x" * 2000)
    await one_more_turn()
    (stream,) = recorder_of(one.manager).unfinished.values()
    assert stream.answer is not None
    assert message_bytes(stream.answer) < 500


async def test_the_answer_of_a_call_whose_client_was_given_no_id_is_not_kept(
    log: FaultyLog, talking: Talking, one: Instance, client: Client
) -> None:
    log.down("append", "heads")
    first, exchange = await talking.call(client)
    await first.say("a")
    await until(lambda: recorder_of(one.manager).down)
    first.answer()
    await exchange.end()
    kept = backlog_bytes_of(one.manager)
    for _ in range(3):
        call, exchange = await talking.call(client)
        call.answer()
        await exchange.end()
        assert told(exchange.messages) == ["done"]
    assert kept > 0
    assert backlog_bytes_of(one.manager) == kept
    assert len(recorder_of(one.manager).unfinished) <= 1


async def test_of_many_large_answers_few_are_on_their_way_and_one_that_waits_survives_a_stop(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.stopping.SHUTDOWN_TIMEOUT", 2.0)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        clients = [one.client() for _ in range(LARGE_AT_ONCE + 1)]
        calls = []
        for client in clients:
            await client.handshake()
            calls.append(await away(talking, client))
        held = log.hold("append")
        log.appended.clear()
        for call, _ in calls:
            call.answer("x" * LARGE_APPEND)
        await held.wait_entered()
        await one_more_turn()
        assert len(log.appended) == LARGE_AT_ONCE
        log.up()  # but for those that are on their way
    async with instance(store, events=log) as one:
        resumed = one.client(clients[-1].session_id).open_stream(calls[-1][1])
        await resumed.end()
        assert told(resumed.messages) == ["x" * LARGE_APPEND]


@pytest.mark.parametrize("is_down", [False, True], ids=["up", "down"])
async def test_a_large_event_that_takes_too_long_does_not_make_events_count_as_down(
    log: FaultyLog, talking: Talking, one: Instance, is_down: bool
) -> None:
    large, other = one.client(), one.client()
    await large.handshake()
    await other.handshake()
    call, exchange = await talking.call(large)
    other_call, other_exchange = await talking.call(other)
    held = log.hold("append")
    call.answer("x" * LARGE_APPEND)
    await held.wait_entered()
    log.up()
    if is_down:
        log.down("append")
    held.fail(StoreUnavailable("it did not answer in time"))
    await exchange.end()
    # It is live, and waits to be stored. Whether others can be is found out beside them.
    assert without_ids(exchange, "x" * LARGE_APPEND)
    await until(lambda: recorder_of(one.manager).down == is_down)
    if not is_down:
        await other_call.say("a")
        await hears(other_exchange, "a")
        assert other_exchange.events[-1].id is not None
    log.up()
    await all_stored(one)
    resumed = large.open_stream(exchange.last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["x" * LARGE_APPEND]


async def test_a_large_event_that_fails_again_and_again_is_tried_now_and_then(
    log: FaultyLog, talking: Talking, one: Instance, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = log.inner.append
    tries = 0

    async def refuse_large(key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        nonlocal tries
        if sum(map(message_bytes, events)) > LARGE_APPEND:
            tries += 1
            raise StoreUnavailable("it has no room for this")
        return await append(key, events, again=again)

    monkeypatch.setattr(log.inner, "append", refuse_large)
    call, exchange = await talking.call(client)
    call.answer("x" * LARGE_APPEND)
    await exchange.end()
    await until(lambda: tries >= 2)
    await anyio.sleep(0.3)
    assert tries <= 4
    assert not recorder_of(one.manager).down


async def test_what_others_have_to_keep_is_not_lost_by_a_session_that_keeps_too_much(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_EVENTS", 3)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        greedy, modest = one.client(), one.client()
        await greedy.handshake()
        await modest.handshake()
        call, _ = await away(talking, greedy)
        other_call, last_event_id = await away(talking, modest)
        log.down("append")
        await call.say(*(str(n) for n in range(20)))
        await other_call.say("a")
        other_call.answer()
        await one_more_turn()
        log.up()
        await all_stored(one)
        resumed = modest.open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
async def test_an_answer_that_the_log_does_not_take_is_told_to_who_comes_back(
    store: FaultyStore, other_store: FaultyStore, down: bool
) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_bytes_per_session=2000))
    talking = Talking()
    async with (
        instance(store, talking.notes, events=log) as one,
        instance(other_store, events=FaultyLog(other_store)) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        if down:
            log.down("append")
        await call.say("a")
        call.answer("x" * 3000)
        await one_more_turn()
        log.up()
        resumed = two.client(session_id).open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["a", "lost"]
        assert resumed.messages[-1]["id"] == client._last_id
        assert "EventTooLarge" in resumed.messages[-1]["error"]["message"]


async def test_an_answer_that_is_too_large_to_store_reaches_a_client_that_is_there(store: FaultyStore) -> None:
    log = FaultyLog(store, policy=EventPolicy(max_bytes_per_session=2000))
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a", "x" * 3000, "b")
        call.answer("y" * 3000)
        await exchange.end()
        assert told(exchange.messages) == ["a", "x" * 3000, "b", "y" * 3000]


async def test_a_log_with_a_bug_is_asked_a_few_times_for_an_answer(
    log: FaultyLog, talking: Talking, client: Client
) -> None:
    session_id = str(client.session_id)
    call, exchange = await talking.call(client)
    await call.say("a")
    await hears(exchange, "a")
    log.appended.clear()
    log.broken("append")
    call.answer()
    await exchange.end()
    assert told(exchange.messages) == ["a", "done"]
    assert len(log.appended) <= 3
    log.up()
    # The answer is not there: nobody waits for it.
    resumed = client.open_stream(exchange.last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["lost"]
    assert len(log.stored(session_id)) == 1


async def test_an_answer_that_is_no_json_is_told_to_who_comes_back(talking: Talking, client: Client) -> None:
    call, exchange = await talking.call(client)
    await call.say("a")
    call.answer("\ud800")
    await exchange.end()
    resumed = client.open_stream(exchange.last_event_id)
    await resumed.end()
    assert told(resumed.messages) == ["lost"]
    assert (await client.ping()).status == 200


# Beginnings and ends


async def test_an_instance_that_starts_while_the_log_is_down_gives_ids_when_it_is_back(
    store: FaultyStore, log: FaultyLog
) -> None:
    store.down("open")
    log.down()
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        store.up()
        client = one.client()
        await client.handshake()
        call, exchange = await talking.call(client)
        await call.say("a")
        call.answer()
        await exchange.end()
        assert without_ids(exchange, "a", "done")
        log.up()
        await ids_come_back(client, talking)


class Counted(str):
    """A text that counts how often it is encoded."""

    __slots__ = ("encoded",)

    encoded: int

    def encode(self, *arguments: str, **options: str) -> bytes:
        self.encoded += 1
        return super().encode(*arguments, **options)


@pytest.mark.parametrize("character", ["é", "\ud800"], ids=["stored", "not taken"])
async def test_a_message_is_encoded_once_on_its_way_through_an_outage(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    instances = lone_instance(log.mailbox)
    recorder = EventRecorder(log, Followers(log, instances), instances)
    await recorder.recover()
    message = Counted(character * 100_000)
    message.encoded = 0
    key = (await store.inner.create(new_session())).key
    event = NewEvent(stream=STANDALONE_STREAM, position=1, kind=EventKind.NOTIFICATION, message=message)
    sizes: list[int] = []

    async def append(_key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int:
        # As each log measures them, the probe of one that is back among them.
        sizes.extend(checked_size(event) for event in events)
        return 1

    monkeypatch.setattr(log.inner, "append", append)
    log.down("append")
    assert (await recorder.record(key, event, deliver=lambda _: False)).outcome is Outcome.BACKLOG
    log.up()
    await recorder.recover()
    assert sizes == ([0, 200_000] if character == "é" else [0])
    # One that UTF-8 has no bytes for is encoded a second time, with what stands for it, to be counted.
    assert message.encoded == (1 if character == "é" else 2)


async def test_a_message_in_ascii_is_not_encoded_to_be_measured() -> None:
    message = Counted("a" * 100)
    message.encoded = 0
    event = NewEvent(stream=STANDALONE_STREAM, position=1, kind=EventKind.NOTIFICATION, message=message)
    assert message_bytes(event) == checked_size(event) == 100
    assert message.encoded == 0


async def test_what_is_kept_is_stored_when_the_instance_stops(store: FaultyStore, log: FaultyLog) -> None:
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        session_id = await client.handshake()
        call, last_event_id = await away(talking, client)
        log.down("append")
        await call.say("a")
        call.answer()
        await one_more_turn()
        assert log.messages(session_id) == []
        log.up()
    async with instance(store, events=log) as one:
        resumed = one.client(session_id).open_stream(last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["a", "done"]


async def test_an_outage_does_not_hold_up_the_end_of_an_instance(
    store: FaultyStore, log: FaultyLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.stopping.SHUTDOWN_TIMEOUT", 0.1)
    talking = Talking()
    async with instance(store, talking.notes, events=log) as one:
        client = one.client()
        await client.handshake()
        call, _ = await away(talking, client)
        held = log.hold("append")
        log.hold("retire")
        call.answer()
        await held.wait_entered()
