"""The standalone stream of a session that several instances serve: all come on it, once, wherever it is open."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import mcp_types as types
import pytest

from mcp_session_store import session_key
from mcp_session_store.adapter.relay import logged
from mcp_session_store.adapter.streams import beginning, followers, standalone
from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.event_log import STANDALONE_WAIT
from mcp_session_store.mailbox import MessageKind
from tests.support.asgi import PATIENCE, until
from tests.support.asking import roots
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import Notes, instance
from tests.support.internals import recorder_of
from tests.support.streams import APART, all_stored, one_more_turn, opened
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock, Instance, RequestContext
    from tests.support.talking import Call

pytestmark = pytest.mark.anyio

TEXTS = [str(n) for n in range(40)]


@pytest.fixture(autouse=True)
def _former_holders_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a stream wait for its former holder for as long as a test does."""
    for module in (beginning, logged):
        monkeypatch.setattr(module, "HAND_OVER_WITHIN", PATIENCE)


@pytest.fixture
def talking_there() -> Talking:
    """The server of the instance `two`."""
    return Talking()


@pytest.fixture
async def two(
    one: Instance,
    other_store: FaultyStore,
    other_log: FaultyLog,
    talking_there: Talking,
) -> AsyncIterator[Instance]:
    async with instance(other_store, talking_there.notes, events=other_log) as two:
        yield two


@pytest.fixture
def there(two: Instance, client: Client) -> Client:
    """The client, at the instance `two`."""
    return two.client(client.session_id)


@pytest.fixture
async def call(talking: Talking, client: Client) -> Call:
    """A call of the session that runs on `one`."""
    return (await talking.call(client))[0]


@pytest.fixture
async def call_there(talking_there: Talking, there: Client) -> Call:
    """A call of the session that runs on `two`."""
    return (await talking_there.call(there))[0]


async def get(client: Client) -> Exchange:
    """Open the client's stream anew."""
    stream = client.open_stream()
    await stream.start()
    assert stream.status == 200, stream.body
    return stream


async def test_what_another_instance_says_comes_by_a_hint(
    log: FaultyLog, client: Client, call: Call, call_there: Call
) -> None:
    stream = await opened(client)
    await call.tell("here")
    await hears(stream, "here")
    # What comes now is not found by the first look at the log.
    for number in range(1, len(TEXTS)):
        await call_there.tell(TEXTS[number])
        await hears(stream, "here", *TEXTS[1 : number + 1])
    # Streams are looked at for all messages of a minute, and not for each.
    assert log.background["heads"] <= 3


async def test_streams_are_looked_at_once_a_minute_and_after_an_outage(
    one: Instance, log: FaultyLog, client: Client, clock: Clock
) -> None:
    recorder = recorder_of(one.manager)
    await opened(client)
    await recorder.followers.poll()
    looks = log.background["heads"]
    for seconds in (30, 31):
        clock.advance(timedelta(seconds=seconds))
        await recorder.followers.poll()
        assert log.background["heads"] == looks + (seconds == 31)
    log.down("beat")
    with pytest.raises(StoreUnavailable):
        await recorder.instances.beat()
    await recorder.followers.poll()
    log.up()
    assert log.background["heads"] == looks + 1
    await recorder.instances.beat()
    await recorder.followers.poll()
    assert log.background["heads"] == looks + 2


async def test_what_was_said_while_no_stream_was_open_comes_on_the_next_one(
    log: FaultyLog, client: Client, there: Client, call: Call, call_there: Call, clock: Clock
) -> None:
    await call.tell("long ago")
    await call_there.tell("long ago")
    await until(lambda: len(log.messages(client.session_id)) == 2)
    clock.advance(STANDALONE_WAIT)
    await call.tell("a")
    await call_there.tell("b")
    stream = await opened(there)
    await hears(stream, "a", "b")
    await call.tell("c")
    await hears(stream, "a", "b", "c")
    assert len({event.id for event in stream.events}) == 4


@pytest.mark.parametrize("version", ["2025-11-25", "2025-06-18"])
async def test_of_streams_on_two_instances_the_later_one_goes_on_after_what_the_other_has_sent(
    version: str, client: Client, there: Client, call: Call, call_there: Call, clock: Clock
) -> None:
    for one in (client, there):
        one.headers["mcp-protocol-version"] = version
    first = await get(client)
    await call.tell("a")
    await hears(first, "a")
    await call_there.tell("b")
    await hears(first, "a", "b")
    first.stop_reading()
    await call.tell(*TEXTS)
    await call_there.tell(*(f"there {text}" for text in TEXTS))
    # The third and the fourth come while the one before may not know yet where it begins.
    streams = [first]
    for at in (there, client, there):
        clock.advance(APART)
        streams.append(await get(at))
    await call.tell("last")
    await call_there.tell("very last")
    await until(lambda: any("very last" in told(stream.messages) for stream in streams[1:]))
    first.read_on()
    for older in streams[:-1]:
        await older.end()
    heard = [text for stream in streams for text in told(stream.messages)]
    assert heard == ["a", "b", *TEXTS, *(f"there {text}" for text in TEXTS), "last", "very last"]


@pytest.mark.parametrize("at", ["the same", "a third"])
async def test_a_stream_that_moves_before_its_former_holder_has_answered_goes_on_after_what_that_one_has_sent(
    at: str, log: FaultyLog, other_log: FaultyLog, store: FaultyStore, client: Client, there: Client, call: Call
) -> None:
    async with instance(store, Notes(), events=FaultyLog(store)) as third:
        first = await get(client)
        await call.tell("a")
        await hears(first, "a")
        held = log.mailbox.hold("receive")
        second = await get(there)
        await held.wait_entered()
        await until(lambda: MessageKind.STREAM_TAKEN in (posted.kind for posted in other_log.mailbox.posted))
        latest = await get(there if at == "the same" else third.client(client.session_id))
        await second.end()
        await one_more_turn()
        log.mailbox.up()
        held.release()
        await call.tell("b")
        await hears(latest, "b")
        assert second.messages == []


async def test_a_client_that_left_goes_on_anywhere_without_an_id(
    client: Client, there: Client, call: Call, call_there: Call
) -> None:
    stream = await get(client)
    await call.tell("a")
    await hears(stream, "a")
    for at in (there, there, client, client):
        await stream.leave()
        await call.tell("b")
        await call_there.tell("c")
        stream = await get(at)
        await hears(stream, "b", "c")


async def test_a_former_holder_that_does_not_answer_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, log: FaultyLog, client: Client, there: Client, call: Call
) -> None:
    monkeypatch.setattr(beginning, "HAND_OVER_WITHIN", 0.1)
    stream = await opened(client)
    await stream.leave()
    held = log.mailbox.hold("receive")
    await call.tell("a")
    await hears(await get(there), "a")
    log.mailbox.up()
    held.release()


async def test_a_stream_that_the_store_does_not_enter_begins_all_the_same(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, client: Client, call: Call
) -> None:
    monkeypatch.setattr(beginning, "ENTERED_WITHIN", 0.1)
    store.down("touch")
    await call.tell("a")
    await hears(await get(client), "a")


async def test_a_client_that_resumes_elsewhere_ends_the_stream_that_it_had(
    client: Client, there: Client, call: Call, call_there: Call
) -> None:
    first = await opened(client)
    await call.tell("a")
    await hears(first, "a")
    second = await opened(there, first.last_event_id)
    await first.end()
    await call.tell("b")
    await call_there.tell("c")
    await hears(second, "b", "c")


async def test_clients_that_take_it_from_each_other_on_two_instances_are_refused_for_a_while(
    monkeypatch: pytest.MonkeyPatch, client: Client, there: Client, call: Call
) -> None:
    monkeypatch.setattr(standalone, "TAKEN_WITHIN", 60.0)
    streams = [await opened(client)]
    statuses = []
    for turn in range(standalone.TAKEN_AT_MOST + 2):
        stream = (there, client)[turn % 2].open_stream()
        await stream.start()
        statuses.append(stream.status)
        if stream.status == 200:
            await streams[-1].end()
            await until(lambda stream=stream: stream.last_event_id is not None)  # type: ignore[misc]
            streams.append(stream)
    assert statuses[: standalone.TAKEN_AT_MOST] == [200] * standalone.TAKEN_AT_MOST
    assert 409 in statuses
    await call.tell("a")
    await hears(streams[-1], "a")


async def test_a_server_has_its_client_come_back_for_a_stream_that_is_open_elsewhere(
    client: Client, call_there: Call
) -> None:
    stream = await opened(client)
    await call_there.close_standalone()
    await stream.end()
    await call_there.tell("a")
    await hears(await opened(client, stream.last_event_id), "a")


async def test_a_question_of_a_replayed_handler_waits_for_the_stream_wherever_it_is_opened(
    client: Client, there: Client, talking_there: Talking
) -> None:
    answers: list[types.ListRootsResult] = []

    async def ask(ctx: RequestContext) -> None:
        answers.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    talking_there.notes.on_initialized = ask
    assert (await there.ping()).status == 200
    stream = await get(client)
    question = await stream.next()
    assert question["method"] == "roots/list"
    assert (await client.respond(question["id"], roots("x"))).status == 202
    await until(lambda: len(answers) == 1)


async def test_a_stream_that_is_opened_in_an_outage_is_entered_later(
    one: Instance, store: FaultyStore, log: FaultyLog, client: Client, call: Call, call_there: Call
) -> None:
    store.down()
    log.down()
    stream = await get(client)
    await call.tell("a")
    await hears(stream, "a")
    store.up()
    log.up()
    await all_stored(one)
    await until(lambda: stream.last_event_id is not None)
    await call_there.tell("b")
    await hears(stream, "a", "b")


async def test_how_far_a_stream_got_is_remembered_for_a_minute(
    one: Instance, client: Client, call: Call, clock: Clock
) -> None:
    key = session_key(str(client.session_id))
    of_one = recorder_of(one.manager).followers
    assert of_one.given(key) is None
    stream = await opened(client)
    await call.tell("a")
    await hears(stream, "a")
    sequence = of_one.given(key)
    assert sequence is not None
    await stream.leave()
    await call.tell("b")
    await one_more_turn()
    assert of_one.given(key) == sequence
    clock.advance(timedelta(seconds=followers.REMEMBERED))
    assert of_one.given(key) is None
