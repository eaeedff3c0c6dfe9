"""What an instance says outside of calls comes on the client's stream, wherever that is open, without an event log."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import anyio
import mcp_types as types
import pytest
from mcp import MCPError
from mcp.server.streamable_http import GET_STREAM_KEY, EventMessage, EventStore

from mcp_session_store.adapter.relay import outlet, queued, streams
from mcp_session_store.adapter.streams import standalone
from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.stream_mail import STREAM_QUEUE, STREAM_WAIT
from tests.support.asgi import PATIENCE, until
from tests.support.asking import roots
from tests.support.databases import migrated
from tests.support.faulty_stores import FaultyMailbox
from tests.support.instances import Notes, instance, open_session
from tests.support.internals import instances_of, outbox_is_empty, question_ids_of, registry_of
from tests.support.streams import APART, one_more_turn
from tests.support.talking import Talking, hears, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.streamable_http import EventCallback, EventId, StreamId
    from mcp_types import JSONRPCMessage

    from mcp_session_store.adapter.streams.standalone import StandaloneStream
    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock, Instance
    from tests.support.talking import Call

pytestmark = pytest.mark.anyio

TEXTS = [str(n) for n in range(40)]
"""More than any buffer holds, and fewer than may wait."""


class Side:
    """An instance, with a call of the session that runs there, and its client."""

    def __init__(self, instance: Instance, client: Client, call: Call, talking: Talking) -> None:
        self.instance = instance
        self.client = client
        self.call = call
        self.talking = talking

    @property
    def standalone(self) -> StandaloneStream:
        """The stream of the copy here."""
        session = registry_of(self.instance.manager).get(str(self.client.session_id))
        assert session is not None
        return session.standalone

    async def knows_the_former_holder(self) -> None:
        """Wait until the instance from which the stream was taken, if any, has said how it left it."""
        hold = self.standalone.hold
        assert hold is not None
        await hold.handed_over.wait()

    async def get(self) -> Exchange:
        """Open the client's stream here."""
        stream = self.client.open_stream()
        await stream.start()
        assert stream.status == 200, stream.body
        return stream


@asynccontextmanager
async def sides(
    store: FaultyStore | str, *mailboxes: FaultyMailbox | Literal[True], **options: Any
) -> AsyncIterator[list[Side]]:
    """Instances that have copies of one session, in each of which a call runs.

    Args:
        store: Their store, or the URL of their database.
        mailboxes: The mailbox of each; true: in its database.
        options: For each instance.
    """
    async with AsyncExitStack() as stack:
        sides: list[Side] = []
        for mailbox in mailboxes:
            talking = Talking()
            one = await stack.enter_async_context(instance(store, talking.notes, relay=mailbox, **options))
            client = one.client(sides[0].client.session_id if sides else None)
            if not sides:
                await client.begin()
            sides.append(Side(one, client, (await talking.call(client))[0], talking))
        yield sides


@pytest.fixture(autouse=True)
def _former_holders_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a former holder take as long as a test does until what it has not sent counts as lost."""
    for module in (outlet, queued, streams):
        monkeypatch.setattr(module, "HANDED_OVER_WITHIN", PATIENCE)


@pytest.fixture
async def two(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> AsyncIterator[tuple[Side, Side]]:
    async with sides(store, mailbox, other_mailbox) as (one, other):
        yield one, other


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def two_anywhere(
    request: pytest.FixtureRequest, store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> AsyncIterator[tuple[Side, Side]]:
    """Two instances in memory, and two on a database of each kind."""
    if request.param == "memory":
        context = sides(store, mailbox, other_mailbox)
    else:
        url: str = request.getfixturevalue(f"{request.param}_url")
        await migrated(url)
        context = sides(url, True, True)
    async with context as (one, other):
        yield one, other


async def test_what_another_instance_says_comes_on_the_stream_in_order(two_anywhere: tuple[Side, Side]) -> None:
    one, other = two_anywhere
    stream = await one.get()
    await one.call.tell("here")
    await hears(stream, "here")
    await other.call.tell(*TEXTS)
    await hears(stream, "here", *TEXTS)
    await other.call.tell("last")
    await hears(stream, "here", *TEXTS, "last")


async def test_what_is_said_while_no_stream_is_open_comes_on_the_next_one_before_the_rest(
    two_anywhere: tuple[Side, Side],
) -> None:
    one, other = two_anywhere
    await one.call.tell("a", "b")
    await other.call.tell("c")
    stream = await one.get()
    await one.call.tell("d")
    await until(lambda: len(stream.messages) == 4)
    assert [text for text in told(stream.messages) if text != "c"] == ["a", "b", "d"]
    # Nothing waits any more, so that it goes the direct way.
    await one.call.tell("e")
    await until(lambda: told(stream.messages)[-1] == "e")


async def test_of_streams_on_two_instances_the_later_one_is_served_and_gets_what_the_other_has_not_sent(
    two_anywhere: tuple[Side, Side],
) -> None:
    one, other = two_anywhere
    first = await one.get()
    await one.call.tell("a")
    await other.call.tell("b")
    await hears(first, "a", "b")
    first.stop_reading()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.call.tell, *TEXTS)
        tasks.start_soon(other.call.tell, *(f"other {text}" for text in TEXTS))
        await one_more_turn()
        second = await other.get()
        await until(lambda: len(second.messages) >= 2 * len(TEXTS) - 2)
    first.read_on()
    await first.end()
    await until(lambda: len(first.messages) + len(second.messages) >= 2 + 2 * len(TEXTS))
    heard = told(first.messages)[2:] + told(second.messages)
    assert [text for text in heard if not text.startswith("other")] == TEXTS
    assert [text for text in heard if text.startswith("other")] == [f"other {text}" for text in TEXTS]


async def test_what_waits_for_a_client_that_leaves_comes_on_its_next_stream(two_anywhere: tuple[Side, Side]) -> None:
    one, other = two_anywhere
    first = await one.get()
    # Which stream was opened later, the store knows only up to the time that a claim takes to it.
    await one.knows_the_former_holder()
    await one.call.tell("a")
    await hears(first, "a")
    first.stop_reading()
    await one.call.tell(*TEXTS[:10])
    await other.call.tell(*TEXTS[10:20])
    await one_more_turn()
    await first.leave()
    second = await other.get()
    # The one that the connection had when it broke is lost.
    await until(lambda: len(second.messages) >= 19)
    assert set(TEXTS[1:20]) <= set(told(second.messages))
    assert len(second.messages) == len(set(told(second.messages)))


async def test_a_question_outside_of_calls_is_asked_on_the_stream_of_another_instance(
    two_anywhere: tuple[Side, Side],
) -> None:
    one, other = two_anywhere
    answers: list[types.ListRootsResult] = []

    async def ask(side: Side) -> None:
        answers.append(await side.call.ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, other)
        await one_more_turn()
        stream = await one.get()
        question = await stream.next()
        assert question["method"] == "roots/list"
        assert (await one.client.respond(question["id"], roots("x"))).status == 202
    assert str(answers[0].roots[0].uri) == "file:///x"


@pytest.mark.parametrize("is_posted", [True, False], ids=["posted", "not posted"])
async def test_a_question_that_no_stream_takes_within_half_a_minute_fails(
    store: FaultyStore, mailbox: FaultyMailbox, clock: Clock, is_posted: bool
) -> None:
    async with sides(store, mailbox) as (one,):
        failures: list[MCPError] = []

        async def ask() -> None:
            with pytest.raises(MCPError) as failure:
                await one.call.ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
            failures.append(failure.value)

        async with anyio.create_task_group() as tasks:
            if not is_posted:
                # Nothing is posted under a number that is not entered.
                mailbox.down("beat")
                question_ids_of(one.instance.manager).draw()
            tasks.start_soon(ask)
            if is_posted:
                await until(lambda: mailbox.inner.data.stream_mail != {})
            else:
                await until(lambda: not outbox_is_empty(one.instance.manager))
            await one_more_turn()
            assert not failures
            clock.advance(STREAM_WAIT)
            await until(lambda: failures != [])
        assert "roots/list" in failures[0].message
        mailbox.up()
        stream = await one.get()
        await one.call.tell("later")
        await hears(stream, "later")


async def test_clients_that_take_the_stream_from_each_other_on_two_instances_are_refused_for_a_while(
    two_anywhere: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "TAKEN_WITHIN", 60.0)
    streams = [await two_anywhere[0].get()]
    await two_anywhere[0].knows_the_former_holder()
    for turn in range(1, standalone.TAKEN_AT_MOST + 1):
        streams.append(await two_anywhere[turn % 2].get())
        await streams[-2].end()
        await two_anywhere[turn % 2].knows_the_former_holder()
    refused = two_anywhere[(standalone.TAKEN_AT_MOST + 1) % 2]
    assert (await refused.client.open_stream().answer()).status == 409
    await refused.call.tell("a")
    await hears(streams[-1], "a")
    monkeypatch.setattr(standalone, "TAKEN_WITHIN", 0)
    await refused.get()
    await streams[-1].end()


async def test_with_the_store_away_a_stream_opens_and_is_entered_later(
    store: FaultyStore, mailbox: FaultyMailbox, other_store: FaultyStore, other_mailbox: FaultyMailbox
) -> None:
    async with sides(store, mailbox, other_mailbox) as (one, other):
        store.down()
        mailbox.down()
        stream = await one.get()
        await one.call.tell("a")
        await hears(stream, "a")
        await other.call.tell("b")
        store.up()
        mailbox.up()
        await until(lambda: told(stream.messages) == ["a", "b"])


async def test_what_a_failing_mailbox_does_not_give_is_taken_when_it_is_back(
    two: tuple[Side, Side], mailbox: FaultyMailbox
) -> None:
    one, other = two
    stream = await one.get()
    await other.call.tell("a")
    await hears(stream, "a")
    mailbox.down("take")
    taken = mailbox.background["take"]
    await other.call.tell("b")
    await until(lambda: mailbox.background["take"] > taken)
    await one_more_turn()
    mailbox.up()
    await until(lambda: told(stream.messages) == ["a", "b"])


async def test_what_is_said_here_waits_for_what_the_holder_elsewhere_has_not_sent(
    two: tuple[Side, Side], mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    one, other = two
    await one.call.tell("a")
    taking, unaware, other_taking = mailbox.hold("take"), mailbox.hold("receive"), other_mailbox.hold("take")
    first = await one.get()
    await taking.wait_entered()
    second = await other.get()
    await other_taking.wait_entered()
    # What waits is the other one's by now, which this one has not heard of.
    taking.release()
    await one_more_turn()
    await one.call.tell("b")
    await one_more_turn()
    other_taking.release()
    await hears(second, "a", "b")
    unaware.release()
    await first.end()
    assert first.messages == []


async def test_a_holder_whose_transport_is_blocked_leaves_what_it_has_taken(
    two: tuple[Side, Side], mailbox: FaultyMailbox
) -> None:
    one, other = two
    await one.get()
    call, exchange = await one.talking.call(one.client)
    exchange.stop_reading()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.say, *TEXTS)
        await one_more_turn()
        taken = mailbox.background["take"]
        await other.call.tell("a")
        await until(lambda: mailbox.background["take"] > taken)
        await one_more_turn()
        second = await other.get()
        await hears(second, "a")
        exchange.read_on()


async def test_an_older_stream_is_closed_although_the_holder_between_told_no_instance(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HANDED_OVER_WITHIN", 0.05)
    async with sides(store, mailbox, other_mailbox, FaultyMailbox(store.inner)) as (one, between, last):
        first = await one.get()
        await one.knows_the_former_holder()
        other_mailbox.down()
        await between.get()
        hold = between.standalone.hold
        assert hold is not None
        await hold.claimed.wait()
        third = await last.get()
        await first.end()
        await one.call.tell("a")
        await hears(third, "a")
        other_mailbox.up()


async def test_what_cannot_be_left_while_the_mailbox_is_away_is_left_later(
    two: tuple[Side, Side], mailbox: FaultyMailbox
) -> None:
    one, other = two
    first = await one.get()
    await other.call.tell("a")
    await hears(first, "a")
    first.stop_reading()
    await other.call.tell("b", "c", "d")
    stored = mailbox.inner.data.stream_mail
    await until(lambda: outbox_is_empty(other.instance.manager) and all(mail.taken_by for mail in stored.values()))
    await one_more_turn()
    mailbox.down("take", "release")
    second = await other.get()
    await until(lambda: mailbox.background["release"] > 0)
    mailbox.up()
    await until(lambda: told(second.messages)[-1:] == ["d"])
    first.read_on()
    await first.end()
    assert [*told(first.messages), *told(second.messages)] == ["a", "b", "c", "d"]


async def test_what_the_mailbox_drops_holds_up_nothing(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with sides(store, mailbox) as (one,):
        mailbox.refuses_to_say = True
        await one.call.tell("dropped")
        await until(lambda: outbox_is_empty(one.instance.manager))
        stream = await one.get()
        await one.call.tell("a")
        await hears(stream, "a")


class _Kept(EventStore):
    """An event store of the user's."""

    def __init__(self) -> None:
        self.kept: list[JSONRPCMessage | None] = []

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        self.kept.append(message)
        return str(len(self.kept))

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        for number, message in enumerate(self.kept[int(last_event_id) :], start=int(last_event_id) + 1):
            if message is not None:
                await send_callback(EventMessage(message, str(number)))
        return GET_STREAM_KEY


async def test_with_an_event_store_of_the_users_what_others_say_is_stored_by_the_holder_and_can_be_resumed(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    kept = _Kept()
    async with sides(store, mailbox, other_mailbox, event_store=kept) as (one, other):
        stream = await one.get()
        await other.call.tell("a")
        await hears(stream, "a")
        assert stream.last_event_id is not None
        last = await stream.leave()
        resumed = one.client.open_stream(last)
        await resumed.start()
        await until(lambda: one.standalone.is_open)
        await other.call.tell("b")
        await hears(resumed, "b")
        assert resumed.last_event_id is not None
        # Closed by a handler on the instance that does not have it.
        await other.call.close_standalone()
        await resumed.end()


async def test_more_than_may_wait_is_dropped(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with sides(store, mailbox) as (one,):
        texts = [str(number) for number in range(STREAM_QUEUE + 20)]
        await one.call.tell(*texts)
        await until(lambda: outbox_is_empty(one.instance.manager))
        stream = await one.get()
        await until(lambda: len(stream.messages) == STREAM_QUEUE)
        await one.call.tell("later")
        await until(lambda: told(stream.messages)[-1] == "later")
        assert told(stream.messages) == [*texts[:STREAM_QUEUE], "later"]


async def test_an_instance_that_takes_another_number_keeps_the_streams_that_are_open_there(
    two: tuple[Side, Side],
) -> None:
    one, other = two
    stream = await one.get()
    await other.call.tell("a")
    await hears(stream, "a")
    number = question_ids_of(one.instance.manager).number
    question_ids_of(one.instance.manager).draw()
    await until(lambda: instances_of(one.instance.manager).entered not in (None, number))
    await other.call.tell("b")
    await hears(stream, "a", "b")


async def test_a_stream_ends_whose_claim_comes_after_that_of_a_later_one(
    two: tuple[Side, Side], store: FaultyStore, mailbox: FaultyMailbox, clock: Clock
) -> None:
    one, other = two
    number = question_ids_of(one.instance.manager).number

    async def fail() -> None:
        if any(activity.stream is not None and activity.stream.number == number for activity in store.touches[-1]):
            raise StoreUnavailable("the test says it is down")

    store.before("touch", fail)
    # It is not told by the other instance.
    mailbox.down("receive")
    first = await one.get()
    clock.advance(APART)
    second = await other.get()
    await other.knows_the_former_holder()
    store.up()
    await first.end()
    await one.call.tell("a")
    await other.call.tell("b")
    await until(lambda: sorted(told(second.messages)) == ["a", "b"])
    assert first.messages == []


async def test_a_handler_in_a_replay_asks_on_the_stream_that_is_open_elsewhere(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    answers: list[types.ListRootsResult] = []

    async def ask(ctx: Any) -> None:
        answers.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    notes = Notes()
    notes.on_initialized = ask
    async with (
        instance(store, relay=mailbox) as one,
        instance(store, notes, relay=other_mailbox) as other,
        anyio.create_task_group() as tasks,
    ):
        client = one.client()
        session_id = await client.begin()
        stream = client.open_stream()
        await stream.start()
        tasks.start_soon(other.client(session_id).request, "tools/list")
        question = await stream.next()
        assert question["method"] == "roots/list"
        assert (await client.respond(question["id"], roots("x"))).status == 202
        await until(lambda: len(answers) == 1)


async def test_a_restore_and_the_stream_for_which_it_is_done_are_claimed_in_one_report(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.sessions.activity.GATHERING", 1.0)
    session_id = await open_session(store)
    store.touches.clear()
    async with instance(store, relay=mailbox) as one:
        stream = one.client(session_id).open_stream()
        await stream.start()
        session = registry_of(one.manager).get(session_id)
        assert session is not None
        hold = session.standalone.hold
        assert hold is not None
        await hold.claimed.wait()
        (claim,) = store.claims(session_id)
        assert claim.stream is not None
        # Nothing waits for it, so that nothing is taken.
        assert mailbox.background["take"] == 0
        assert sum(any(one.stream for one in touch) for touch in store.touches) == 1
