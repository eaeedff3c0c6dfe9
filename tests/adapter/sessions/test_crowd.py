"""A crowd in a full memory: clients that go away from their calls keep no other client out."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.message import ServerMessageMetadata

from mcp_session_store import RetentionPolicy
from tests.support.asgi import until
from tests.support.instances import Notes, instance, principal
from tests.support.internals import (
    activity_of,
    departures_of,
    evict_unused,
    registry_of,
    report_activity,
    resident_of,
    stopping_in,
)
from tests.support.streams import old_client

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyLog, FaultyStore, Sessions
    from tests.support.instances import Clock, Instance, RequestContext

pytestmark = pytest.mark.anyio

AWAY = timedelta(seconds=31)
LONG_AWAY = timedelta(minutes=5, seconds=1)
LONG = 3600.0
HOUR = timedelta(hours=1)


async def ask_for_roots(ctx: RequestContext) -> str:
    # On the session's own stream, as `list_roots` of the SDK does it.
    await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
    return "listed"


async def ask_for_a_message(ctx: RequestContext) -> str:
    message = types.SamplingMessage(role="user", content=types.TextContent(type="text", text="?"))
    params = types.CreateMessageRequestParams(messages=[message], max_tokens=1)
    related = ServerMessageMetadata(related_request_id=ctx.request_id)
    request = types.CreateMessageRequest(params=params)
    await ctx.session.send_request(request, types.CreateMessageResult, metadata=related)
    return "sampled"


async def ask_the_user(ctx: RequestContext) -> str:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    await ctx.session.elicit_form("?", schema, related_request_id=ctx.request_id)
    return "elicited"


QUESTIONS: dict[str, Callable[[RequestContext], Awaitable[str]]] = {
    "roots": ask_for_roots,
    "sampling": ask_for_a_message,
    "elicitation": ask_the_user,
}


def asking() -> Notes:
    """A server whose tools ask the client."""
    notes = Notes()
    notes.tools.update(QUESTIONS)
    return notes


def in_memory(one: Instance) -> set[str | None]:
    """Return the sessions whose copies requests find."""
    return {session.session_id for session in registry_of(one.manager)}


async def asked(one: Instance, client: Client, tool: str) -> Exchange:
    """Call a tool that asks the client; return when it waits for the answer."""
    call = client.open_call(tool)
    session = resident_of(one.manager, str(client.session_id))
    await until(lambda: session.loop.asked != {})
    return call


async def running(one: Instance, client: Client) -> Exchange:
    """Call the tool that waits; return when it runs."""
    before = one.notes.waiting
    call = client.open_call("wait")
    await until(lambda: one.notes.waiting == before + 1)
    return call


async def gone(call: Exchange) -> None:
    """Have the client of a request go away."""
    call.disconnect()
    await call.end()


async def pass_by(one: Instance, clock: Clock, passed: timedelta) -> None:
    """Let time pass, at whose end the instance looks which of its copies are in use."""
    clock.advance(passed)
    await evict_unused(one.manager)


async def held(one: Instance, **settings: Any) -> Client:
    """Open a session whose client keeps a stream open."""
    client = one.client(**settings)
    await client.handshake()
    assert (await client.get_stream()).status == 200
    session = resident_of(one.manager, str(client.session_id))
    await until(lambda: session.in_flight == 0)
    return client


# The attack


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
async def test_calls_that_ask_clients_that_have_gone_keep_no_other_client_out(
    store: FaultyStore, log: FaultyLog, clock: Clock, question: str, events: bool
) -> None:
    async with instance(store, asking(), max_sessions=5, events=log if events else False, end_within=LONG) as one:
        live = await held(one)
        for _ in range(4):
            attacker = one.client()
            await attacker.handshake()
            stream = await attacker.get_stream()
            await gone(await asked(one, attacker, question))
            await gone(stream)
        # For a moment a client may come back to answer.
        assert (await one.client().initialize()).status == 503
        await pass_by(one, clock, AWAY)
        newcomers = [await held(one) for _ in range(4)]
        assert in_memory(one) == {live.session_id, *(client.session_id for client in newcomers)}
        # All of them are in use.
        assert (await one.client().initialize()).status == 503
        for client in (live, *newcomers):
            assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert one.notes.replayed("initialize") == []
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
async def test_a_call_that_asks_a_client_that_has_gone_does_not_keep_its_session_for_ever(
    store: FaultyStore, log: FaultyLog, sessions: Sessions, clock: Clock, events: bool
) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR)
    async with instance(store, asking(), events=log if events else False, end_within=LONG, evict_after=None) as one:
        client = one.client()
        session_id = await client.handshake()
        await gone(await asked(one, client, "elicitation"))
        await activity_of(one.manager).report(everything=True)
        for _ in range(3):
            clock.advance(timedelta(minutes=19))
            await evict_unused(one.manager)
            await report_activity(one.manager)
            assert one.residents == 1
            assert await store.record(session_id) is not None
        clock.advance(timedelta(minutes=5))
        await report_activity(one.manager)
        await until(lambda: one.residents == 0 and not stopping_in(one.manager))
        assert (await client.ping()).status == 404


# The order


async def test_copies_leave_a_full_memory_in_order(store: FaultyStore, log: FaultyLog, clock: Clock) -> None:
    notes = asking()

    async def later(ctx: RequestContext) -> str:
        await notes.proceed.wait()
        return await ask_the_user(ctx)

    notes.tools["later"] = later
    async with instance(store, notes, max_sessions=6, events=log, end_within=LONG) as one:
        # In the opposite order, so that none leaves for its age alone.
        resumable, not_resumable, waiting, computing, idle = [one.client() for _ in range(5)]
        for client in (resumable, waiting, computing, idle):
            await client.handshake()
        not_resumable = await old_client(one)
        connected = await held(one)
        await one.at_rest()
        await gone(await running(one, resumable))
        await gone(await running(one, not_resumable))
        await gone(await asked(one, waiting, "elicitation"))
        # One of its two calls does not wait for the client.
        await gone(await asked(one, computing, "roots"))
        await gone(await running(one, computing))

        async def newcomer_evicts(*evicted: Client) -> None:
            before = in_memory(one)
            newcomer = await held(one)
            assert before - in_memory(one) == {client.session_id for client in evicted}
            assert newcomer.session_id in in_memory(one)

        async def newcomer_is_refused() -> None:
            before = in_memory(one)
            assert (await one.client().initialize()).status == 503
            assert in_memory(one) == before

        await newcomer_evicts(idle)
        await newcomer_is_refused()
        await pass_by(one, clock, AWAY)
        await newcomer_evicts(waiting)
        await newcomer_evicts(not_resumable)
        await newcomer_is_refused()
        await pass_by(one, clock, timedelta(minutes=3))
        await newcomer_is_refused()
        await pass_by(one, clock, timedelta(minutes=2))
        await newcomer_evicts(resumable)
        await newcomer_evicts(computing)
        await pass_by(one, clock, HOUR)
        await newcomer_is_refused()
        assert connected.session_id in in_memory(one)
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def test_a_call_that_makes_room_is_lost_to_a_client_that_comes_back(
    store: FaultyStore, log: FaultyLog, clock: Clock
) -> None:
    async with instance(store, max_sessions=1, events=log, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        call = await running(one, client)
        await until(lambda: call.last_event_id is not None)
        last_event_id = await call.leave()
        await pass_by(one, clock, LONG_AWAY)
        other = one.client()
        assert (await other.initialize()).status == 200
        await until(lambda: one.notes.waiting == 0 and not stopping_in(one.manager))
        await one.at_rest()
        answer = await client.open_stream(last_event_id).answer()
        assert answer.error["data"] == {"reason": "lost"}


async def test_a_client_that_comes_back_keeps_its_call(store: FaultyStore, log: FaultyLog, clock: Clock) -> None:
    async with instance(store, max_sessions=1, events=log, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        call = await running(one, client)
        await until(lambda: call.last_event_id is not None)
        last_event_id = await call.leave()
        await pass_by(one, clock, LONG_AWAY)
        stream = client.open_stream(last_event_id)
        await stream.start()
        assert (await one.client().initialize()).status == 503
        one.notes.proceed.set()
        assert (await stream.answer()).text == "waited"


async def test_a_call_whose_question_was_answered_does_not_wait_for_the_client(
    store: FaultyStore, log: FaultyLog, clock: Clock
) -> None:
    notes = asking()

    async def ask_and_work(ctx: RequestContext) -> str:
        await ask_the_user(ctx)
        notes.waiting += 1
        await notes.proceed.wait()
        return "done"

    notes.tools["ask and work"] = ask_and_work
    async with instance(store, notes, max_sessions=1, events=log, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        call = await asked(one, client, "ask and work")
        question = await call.next()
        assert (await client.respond(question["id"], {"action": "accept", "content": {}})).status == 202
        await until(lambda: notes.waiting == 1)
        await gone(call)
        await pass_by(one, clock, AWAY)
        assert (await one.client().initialize()).status == 503
        notes.proceed.set()


async def test_a_finished_answer_on_its_way_to_the_log_makes_no_room(
    store: FaultyStore, log: FaultyLog, clock: Clock
) -> None:
    async with instance(store, max_sessions=1, events=log, end_within=LONG) as one:
        client = one.client(user=principal("alice"))
        session_id = await client.handshake()
        call = await running(one, client)
        await until(lambda: call.last_event_id is not None)
        last_event_id = await call.leave()
        append = log.hold("append")
        one.notes.proceed.set()
        await append.wait_entered()
        await pass_by(one, clock, LONG_AWAY)
        for user in (None, principal("bob")):
            assert (await one.client(user=user).initialize()).status == 503
        assert in_memory(one) == {session_id}
        append.release()
        assert (await client.open_stream(last_event_id).answer()).text == "waited"


# Shares


async def test_a_principal_that_fills_the_memory_shares_it(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, max_sessions=6, json_response=json_response) as one:
        for _ in range(6):
            await held(one, user=principal("alice"))
        for user in (None, principal("alice")):
            assert (await one.client(user=user).initialize()).status == 503
        bobs = [await held(one, user=principal("bob")) for _ in range(3)]
        # Each holds its half.
        for user in (None, principal("alice"), principal("bob")):
            assert (await one.client(user=user).initialize()).status == 503
        carols = [await held(one, user=principal("carol")) for _ in range(2)]
        assert (await one.client(user=principal("carol")).initialize()).status == 503
        for client in (*bobs[1:], *carols):
            assert (await client.ping()).status == 200
        owners = [session.owner["client_id"] for session in registry_of(one.manager) if session.owner is not None]
        assert sorted(owners) == ["alice", "alice", "bob", "bob", "carol", "carol"]
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def test_a_call_beyond_its_principals_share_is_answered_as_lost(
    store: FaultyStore, log: FaultyLog, json_response: bool
) -> None:
    async with instance(store, max_sessions=2, events=log, json_response=json_response) as one:
        calls = []
        for _ in range(2):
            client = one.client(user=principal("alice"))
            await client.handshake()
            calls.append(await running(one, client))
        bob = one.client(user=principal("bob"))
        assert (await bob.initialize()).status == 200
        # That of the client that was in contact least recently.
        lost = await calls[0].answer()
        assert lost.error["data"] == {"reason": "lost"}
        one.notes.proceed.set()
        assert (await calls[1].answer()).text == "waited"


@pytest.mark.parametrize("stalled", ["body", "answer"])
async def test_requests_that_stall_keep_no_place_beyond_a_share(
    store: FaultyStore, json_response: bool, stalled: str
) -> None:
    async with instance(store, max_sessions=4, json_response=json_response) as one:
        for _ in range(4):
            client = one.client(user=principal("alice"))
            await client.handshake()
            await one.at_rest()
            if stalled == "body":
                client.open_parts(b"{" + b" " * 100_000, whole=False)
            else:
                (await running(one, client)).stop_reading()
        one.notes.proceed.set()
        await until(lambda: all(session.pins and not session.in_flight for session in registry_of(one.manager)))
        # Each has a client that is in contact.
        assert (await one.client().initialize()).status == 503
        for _ in range(2):
            await held(one, user=principal("bob"))
        assert (await one.client(user=principal("bob")).initialize()).status == 503
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def test_an_answer_on_its_way_to_the_client_leaves_after_all_others(store: FaultyStore) -> None:
    async with instance(store, max_sessions=3) as one:
        answered = one.client(user=principal("alice"))
        await answered.handshake()
        await one.at_rest()
        call = await running(one, answered)
        call.stop_reading()
        one.notes.proceed.set()
        session = resident_of(one.manager, str(answered.session_id))
        await until(lambda: session.in_flight == 0)
        one.notes.proceed = anyio.Event()
        other = one.client(user=principal("alice"))
        await other.handshake()
        await running(one, other)
        await held(one, user=principal("alice"))
        await held(one, user=principal("bob"))
        assert {answered.session_id, other.session_id} < in_memory(one)
        await held(one, user=principal("carol"))
        assert answered.session_id in in_memory(one)
        call.read_on()
        assert (await call.answer()).text == "waited"


async def test_a_stranger_cancels_no_running_call(store: FaultyStore) -> None:
    async with instance(store, max_sessions=3) as one:
        calls = []
        for user in (None, None, principal("alice")):
            client = one.client(user=user)
            await client.handshake()
            calls.append(await running(one, client))
        for user in (None, principal("alice"), principal("bob")):
            assert (await one.client(user=user).initialize()).status == 503
        one.notes.proceed.set()
        assert {(await call.answer()).text for call in calls} == {"waited"}


async def test_a_principal_without_a_share_keeps_its_calls_for_a_moment_only(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, max_sessions=1, end_within=LONG) as one:
        alice = one.client(user=principal("alice"))
        await alice.handshake()
        await gone(await running(one, alice))
        assert (await one.client(user=principal("bob")).initialize()).status == 503
        await pass_by(one, clock, AWAY)
        assert (await one.client().initialize()).status == 200


# Contact elsewhere


async def test_a_call_goes_on_while_its_client_is_in_contact_on_another_instance(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=timedelta(minutes=10))
    async with (
        instance(store, events=log, end_within=LONG, instance_timeout=LONG) as one,
        instance(other_store, events=other_log, end_within=LONG, instance_timeout=LONG) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        call = await running(one, client)
        await until(lambda: call.last_event_id is not None)
        last_event_id = await call.leave()
        await activity_of(one.manager).report(everything=True)
        stream = two.client(session_id).open_stream(last_event_id)
        await stream.start()
        for _ in range(12):
            clock.advance(timedelta(minutes=2.5))
            await evict_unused(one.manager)
            for manager in (two.manager, one.manager):
                await report_activity(manager)
        assert one.residents == 1
        # Back here: the copy that runs the call serves the client, although its idle time was over.
        assert (await client.ping()).status == 200
        assert one.notes.replayed("initialize") == []
        one.notes.proceed.set()
        assert (await stream.answer()).text == "waited"


async def test_an_outage_cancels_no_call_whose_client_is_away(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR)
    async with instance(store, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        await gone(await running(one, client))
        await activity_of(one.manager).report(everything=True)
        clock.advance(2 * HOUR)
        store.broken("load", "touch", "changes")
        with pytest.raises(RuntimeError):
            await evict_unused(one.manager)
        with pytest.raises(RuntimeError):
            await report_activity(one.manager)
        assert one.notes.waiting == 1
        store.up()
        await report_activity(one.manager)
        await until(lambda: one.notes.waiting == 0)


# JSON responses


@pytest.mark.parametrize("events", [False, True], ids=["no events", "events"])
async def test_a_client_that_leaves_a_json_response_is_noticed(
    store: FaultyStore, log: FaultyLog, clock: Clock, events: bool
) -> None:
    events_of = log if events else False
    async with instance(store, max_sessions=1, json_response=True, events=events_of, end_within=LONG) as one:
        departures = departures_of(one.manager)
        client = one.client()
        await client.handshake()
        await one.at_rest()
        call = await running(one, client)
        for _ in range(2):
            await departures.look()
        assert len(departures.watches) == 1
        call.disconnect()
        await call.end()
        assert one.notes.waiting == 1
        assert resident_of(one.manager, str(client.session_id)).pins == 0
        assert (await one.client().initialize()).status == 503
        await pass_by(one, clock, AWAY)
        assert (await one.client().initialize()).status == 200
        await until(lambda: one.notes.waiting == 0 and not departures.watches)
        assert departures.waiting == {}


async def test_a_json_response_that_is_watched_comes_whole(store: FaultyStore) -> None:
    async with instance(store, json_response=True) as one:
        departures = departures_of(one.manager)
        client = one.client()
        await client.handshake()
        call = await running(one, client)
        await departures.look()
        assert departures.watches == {}
        await departures.look()
        one.notes.proceed.set()
        assert (await call.answer()).text == "waited"
        await until(lambda: not departures.watches)
        assert departures.waiting == {}


async def test_a_handshake_whose_client_has_gone_leaves_no_copy_with_json_responses(store: FaultyStore) -> None:
    notes = Notes()

    async def hang(_ctx: RequestContext) -> None:
        notes.waiting += 1
        await notes.proceed.wait()

    notes.on_initialize = hang
    async with instance(store, notes, json_response=True) as one:
        opening = one.client().open_initialize()
        await until(lambda: notes.waiting == 1)
        for _ in range(2):
            await departures_of(one.manager).look()
        opening.disconnect()
        await opening.end()
        await until(lambda: not stopping_in(one.manager))
        assert store.records == 0
        one.assert_seats_match()
