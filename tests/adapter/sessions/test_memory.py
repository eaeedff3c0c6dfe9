"""Memory as a cache: who leaves it, when, and what a successor may rely on."""

from __future__ import annotations

import gc
import json
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.shared.exceptions import MCPError

from mcp_session_store import EndReason, RestoreRefused, session_key
from mcp_session_store.adapter.sessions import restoring
from tests.support.asgi import Client, until
from tests.support.http import INITIALIZE_PARAMS, assert_not_handled, assert_unavailable, is_not_handled
from tests.support.instances import Notes, instance, open_session, principal, wait_for
from tests.support.internals import (
    discard_session,
    evict_unused,
    exit_stack_of,
    owners_in,
    registry_of,
    stopping_in,
    transports_in,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.support.asgi import Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock, Instance, RequestContext

pytestmark = pytest.mark.anyio

IDLE = 0.1
"""Seconds; copies are looked at every 25 ms."""
LONG = 3600.0
"""Seconds between polls of changes, so that none comes between where the clock is put forward."""


async def several_idle_rounds() -> None:
    """Give the eviction of idle sessions several chances. Time is what is tested here."""
    await anyio.sleep(4 * IDLE)


# Idle


async def test_an_idle_session_leaves_memory_and_the_next_request_restores_it(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, evict_after=IDLE, json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        for _ in range(2):
            await until(lambda: one.residents == 0)
            one.assert_seats_match()
            # It may have left before the handshake was over, too.
            restores = len(one.notes.replayed("initialize"))
            answer = await client.call("add", {"a": 1, "b": 2})
            assert answer.text == "3"
            assert answer.session_id == session_id
            assert len(one.notes.replayed("initialize")) == restores + 1


async def test_a_session_in_use_stays_in_memory(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, evict_after=60, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        for _ in range(4):
            clock.advance(timedelta(seconds=50))
            assert (await client.ping()).status == 200
            await evict_unused(one.manager)
        assert one.residents == 1
        assert one.notes.replayed("initialize") == []


async def test_nothing_leaves_unless_memory_is_full_or_time_is_up(store: FaultyStore) -> None:
    async with instance(store, evict_after=None) as one:
        await one.client().handshake()
        await several_idle_rounds()
        assert one.residents == 1


async def test_a_session_with_an_open_stream_is_busy(store: FaultyStore) -> None:
    async with instance(store, evict_after=IDLE) as one:
        client = one.client()
        await client.handshake()
        stream = await client.get_stream()
        await several_idle_rounds()
        assert one.residents == 1
        assert not stream.over.is_set()
        stream.disconnect()
        await until(lambda: one.residents == 0)


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_a_session_whose_call_outlives_its_clients_connection_is_busy(
    store: FaultyStore, json_response: bool, how: str
) -> None:
    async with instance(store, evict_after=IDLE, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        (call.cancel if how == "cancel" else call.disconnect)()
        await several_idle_rounds()
        assert one.residents == 1
        assert one.notes.waiting == 1
        one.notes.proceed.set()
        await until(lambda: one.notes.waited == 1)
        await until(lambda: one.residents == 0)


async def test_a_session_whose_notification_is_still_handled_is_busy(store: FaultyStore) -> None:
    notes = Notes()
    handling, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        handling.set()
        await proceed.wait()

    notes.on_initialized = hold
    async with instance(store, notes, evict_after=IDLE) as one:
        await one.client().handshake()
        await wait_for(handling)
        await several_idle_rounds()
        assert one.residents == 1
        proceed.set()
        await until(lambda: one.residents == 0)


async def test_a_call_that_its_client_cancelled_does_not_keep_a_session_busy(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, evict_after=IDLE, json_response=json_response) as one:
        client = one.client()
        await client.handshake()
        for _ in range(5):
            call = client.open_call("wait")
            await until(lambda: one.notes.waiting == 1)
            assert (await client.notify("notifications/cancelled", {"requestId": client._last_id})).status == 202
            await call.answer()
        # One whose cancellation comes before its handler has begun.
        unseen = client.open_call("wait")
        await client.notify("notifications/cancelled", {"requestId": client._last_id})
        await unseen.answer()
        for message in ("notifications/progress", "notifications/unheard-of", "notifications/roots/list_changed"):
            await client.notify(message, {"progressToken": 1, "progress": 1})
        await client.request("no/such/method")
        await client.request("tools/call", {"name": 1})
        await client.respond("nobody-asked", {})
        await until(lambda: one.residents == 0)


async def test_a_request_that_pins_a_session_is_not_given_a_leaving_copy(store: FaultyStore) -> None:
    # Eviction and requests in every order that the event loop offers.
    async with instance(store, evict_after=None) as one:
        client = one.client()
        session_id = await client.handshake()
        for turns in range(30):
            call = client.open_call("add", {"a": 1, "b": 2})
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            session = registry_of(one.manager).get(session_id)
            if session is not None and not session.busy:
                await registry_of(one.manager).evict(session)
            assert (await call.answer()).text == "3"
        one.assert_seats_match()


# Leaving copies and successors


def hold_the_exit(notes: Notes) -> tuple[anyio.Event, anyio.Event]:
    """Make each copy's clean-up wait: an event that tells that one has begun, and one that lets it end."""
    leaving, proceed = anyio.Event(), anyio.Event()

    async def clean_up() -> None:
        leaving.set()
        await proceed.wait()

    async def push(ctx: RequestContext) -> None:
        exit_stack_of(ctx).push_async_callback(clean_up)

    notes.on_initialize = push
    return leaving, proceed


async def evict(one: Instance, session_id: str) -> None:
    session = registry_of(one.manager).get(session_id)
    assert session is not None
    await registry_of(one.manager).evict(session)


async def terminate(one: Instance, session_id: str) -> None:
    await one.terminate(session_id)


async def discard(one: Instance, session_id: str) -> None:
    await discard_session(one.manager, session_id, transports_in(one.manager)[session_id])


@pytest.mark.parametrize("leave", [evict, terminate, discard])
async def test_a_successor_waits_until_the_copy_before_it_has_cleaned_up(
    store: FaultyStore, json_response: bool, leave: Callable[[Instance, str], Awaitable[None]]
) -> None:
    notes = Notes()
    leaving, proceed = hold_the_exit(notes)
    async with instance(store, notes, json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        await leave(one, session_id)
        call = client.open_call("add", {"a": 1, "b": 2})
        await wait_for(leaving)
        await anyio.wait_all_tasks_blocked()
        assert call.sent == []
        assert notes.replayed("initialize") == []
        proceed.set()
        assert (await call.answer()).text == "3"
        assert one.residents == 1
        assert stopping_in(one.manager) == {}
        one.assert_seats_match()


async def test_a_copy_that_does_not_leave_fails_the_request(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "STOP_TIMEOUT", 0.05)
    notes = Notes()
    _, proceed = hold_the_exit(notes)
    async with instance(store, notes) as one:
        client = one.client()
        session_id = await client.handshake()
        await evict(one, session_id)
        assert_not_handled(await client.ping())
        proceed.set()
        await until(lambda: not stopping_in(one.manager))
        assert (await client.ping()).status == 200


async def test_a_delete_does_not_wait_for_a_copy_that_is_leaving(store: FaultyStore) -> None:
    notes = Notes()
    leaving, proceed = hold_the_exit(notes)
    async with instance(store, notes) as one:
        client = one.client()
        session_id = await client.handshake()
        await evict(one, session_id)
        await wait_for(leaving)
        assert (await client.delete()).status == 200
        proceed.set()


async def test_a_copy_that_is_discarded_late_does_not_remove_its_successor(store: FaultyStore) -> None:
    alice = principal("alice")
    async with instance(store) as one:
        client = one.client(user=alice)
        session_id = await client.handshake()
        old = transports_in(one.manager)[session_id]
        old_session = registry_of(one.manager).get(session_id)
        assert old_session is not None
        await one.terminate(session_id)
        assert (await client.ping()).status == 200
        successor = transports_in(one.manager)[session_id]
        assert successor is not old
        for _ in range(2):
            await discard_session(one.manager, session_id, old)
            await registry_of(one.manager).evict(old_session)
            registry_of(one.manager).on_stopped(old_session)
        assert transports_in(one.manager)[session_id] is successor
        assert owners_in(one.manager)[session_id]["client_id"] == "alice"
        one.assert_seats_match()
        assert (await client.ping()).status == 200
        assert (await one.client(session_id).ping()).status == 404
        assert len(one.notes.replayed("initialize")) == 1


async def test_a_session_whose_transport_others_terminated_is_restored(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        for _ in range(3):
            stream = await client.get_stream()
            await one.terminate(session_id)
            call = client.open_call("add", {"a": 1, "b": 2})
            await stream.end()
            assert (await call.answer()).text == "3"
            one.assert_seats_match()


async def test_the_clean_up_of_a_copy_runs_when_it_leaves(store: FaultyStore) -> None:
    notes = Notes()
    leaving, proceed = hold_the_exit(notes)
    proceed.set()
    async with instance(store, notes, evict_after=IDLE) as one:
        await one.client().handshake()
        await wait_for(leaving)
        await until(lambda: one.residents == 0)


async def test_shutdown_waits_for_no_client_and_the_session_goes_on_elsewhere(
    store: FaultyStore, json_response: bool
) -> None:
    async with anyio.create_task_group() as outside:
        async with instance(store, json_response=json_response) as one:
            client = Client(one.app, outside)
            session_id = await client.handshake()
            stream = await client.get_stream()
            call = client.open_call("wait")
            await until(lambda: one.notes.waiting == 1)
        # Streams end whole: their last message was sent.
        await stream.end()
        await call.end()
        assert stream.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    async with instance(store) as two:
        assert (await two.client(session_id).ping()).status == 200


@pytest.mark.parametrize("fault", ["hangs", "is down", "has a bug"])
async def test_shutdown_does_not_depend_on_the_store(
    store: FaultyStore, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.stopping.SHUTDOWN_TIMEOUT", 0.05)
    with anyio.fail_after(30):
        async with instance(store) as one:
            client = one.client()
            await client.initialize()
            if fault == "hangs":
                store.hold("touch")
            elif fault == "is down":
                store.down()
            else:
                store.broken()
            assert (await client.notify("notifications/initialized")).status == 202


# Seats


async def test_more_sessions_in_use_than_memory_may_hold_are_refused(store: FaultyStore, json_response: bool) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, max_sessions=2, json_response=json_response) as one:
        clients = [one.client() for _ in range(2)]
        for client in clients:
            await client.handshake()
            await client.get_stream()
        assert_unavailable(await one.client().initialize())
        assert_not_handled(await one.client(session_id).ping())
        assert (await clients[0].ping()).status == 200
        # DELETE needs no seat, and gives one back.
        assert (await clients[0].delete()).status == 200
        restored = one.client(session_id)
        assert (await restored.get_stream()).status == 200
        assert (await one.client().initialize()).status == 503


async def test_a_session_that_is_being_committed_or_restored_has_a_seat(store: FaultyStore) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        reached.set()
        await proceed.wait()

    async with instance(store, notes, max_sessions=2) as one:
        create = store.hold("create")
        opening = one.client().open_initialize()
        await create.wait_entered()
        notes.on_initialize = hold
        restoring = one.client(session_id).open_request("ping")
        await wait_for(reached)
        assert one.residents == 0
        notes.on_initialize = None
        assert (await one.client().initialize()).status == 503
        create.release()
        proceed.set()
        assert (await opening.answer()).status == 200
        assert (await restoring.answer()).status == 200
        one.assert_seats_match()


async def test_a_wrong_principal_and_unknown_ids_take_no_seat(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, max_sessions=1) as one:
        load = store.hold("load")
        exchanges = [one.client(f"{n:032x}").open_request("ping") for n in range(10)]
        exchanges.append(one.client(session_id, user=principal("mallory")).open_request("ping"))
        await until(lambda: load.calls == 11)
        assert registry_of(one.manager).reserved == 0
        load.release()
        assert {(await exchange.answer()).status for exchange in exchanges} == {404}
        assert (await one.client(session_id).ping()).status == 200


@pytest.fixture
def _collected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Collect what a test leaves to the garbage collector before another test pays for it."""
    yield
    # Tracebacks in the log hold on to it.
    caplog.get_records("call").clear()
    gc.collect()


# The SDK leaves a stream to the garbage collector when a request is cancelled before its answer begins.
@pytest.mark.filterwarnings("ignore:.*MemoryObject:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("seed", range(6))
async def test_seats_are_given_back_on_every_path(store: FaultyStore, json_response: bool, seed: int) -> None:
    """A storm of requests, disconnects, evictions and faults; afterwards nobody sits but residents."""
    chance = random.Random(seed)
    async with instance(store) as gone:
        known = [await gone.client().handshake() for _ in range(8)]
    notes = Notes()

    async def bad_luck(_ctx: RequestContext) -> None:
        fate = chance.random()
        if fate < 0.15:
            raise MCPError(code=-32001, message="not you")
        if fate < 0.2:
            raise RuntimeError("the application's bug")
        if fate < 0.25:
            await anyio.sleep_forever()
        await anyio.sleep(chance.random() * 0.01)

    async def maybe_refuse(*_: object) -> None:
        if chance.random() < 0.1:
            raise RestoreRefused
        if chance.random() < 0.1:
            raise RuntimeError("the application's bug")

    notes.on_initialize = bad_luck
    notes.on_initialized = bad_luck
    async with instance(
        store,
        notes,
        json_response=json_response,
        max_sessions=10,
        evict_after=IDLE,
        replay_timeout=0.05,
        end_within=0.05,
        activity_interval=0.02,
        sweep_interval=0.02,
        on_restore=maybe_refuse,
    ) as one:
        exchanges: list[Exchange] = []
        for number in range(250):
            client = one.client(chance.choice([*known, "f" * 32]))
            client._last_id = number
            kind = chance.randrange(12)
            if kind < 3:
                exchanges.append(one.client().open_initialize())
            elif kind < 6:
                exchanges.append(client.open_call("add", {"a": 1, "b": 2}))
            elif kind == 6:
                exchanges.append(client.open("GET"))
            elif kind == 7 and chance.random() < 0.2:
                exchanges.append(client.open("DELETE"))
            elif kind == 7 and chance.random() < 0.2:
                # An operator, or another instance.
                await store.inner.end(session_key(chance.choice(known)), reason=EndReason.OPERATOR)
            elif kind == 8:
                exchanges.append(client.open_initialize({**INITIALIZE_PARAMS, "n": number}))
            elif kind == 9 and transports_in(one.manager):
                await one.terminate(chance.choice(list(transports_in(one.manager))))
            elif kind == 10 and exchanges:
                leaver = chance.choice(exchanges)
                (leaver.cancel if chance.random() < 0.5 else leaver.disconnect)()
            elif kind == 11:
                operation = chance.choice(
                    ["load", "create", "claim", "touch", "end", "replace_initialize", "changes", "sweep"]
                )
                fault: Callable[..., Any] = chance.choice([store.down, store.broken, store.lose_the_answer_of])
                store.up()
                if chance.random() < 0.6:
                    fault(operation)
            for _ in range(chance.randrange(4)):
                await anyio.lowlevel.checkpoint()
        store.up()
        notes.on_initialize = notes.on_initialized = None
        for exchange in exchanges:
            exchange.disconnect()
        with anyio.move_on_after(0.3):
            for exchange in exchanges:
                await exchange.over.wait()
        for exchange in exchanges:
            exchange.cancel()
        for exchange in exchanges:
            await exchange.end()
            if exchange.sent:
                assert exchange.status in (200, 202, 404, 409, 503), exchange.body
        await until(lambda: not registry_of(one.manager).restores and not stopping_in(one.manager))
        one.assert_seats_match()
        await until(lambda: one.residents == 0 or all(s.in_flight for s in registry_of(one.manager)))
        one.assert_seats_match()
        assert (await one.client().initialize()).status == 200


# Memory as a cache


def in_memory(one: Instance) -> set[str]:
    """The sessions whose copies requests find."""
    return {session.session_id for session in registry_of(one.manager)}


async def test_ten_seats_serve_any_number_of_sessions_that_are_used_one_after_another(
    store: FaultyStore, json_response: bool
) -> None:
    told: list[object] = []

    async def on_end(*what: object) -> None:
        told.append(what)

    async with instance(store, max_sessions=10, json_response=json_response, on_end=on_end) as one:
        clients = [one.client() for _ in range(60)]
        for client in clients:
            await client.handshake()
            assert one.residents <= 10
            assert registry_of(one.manager).reserved <= 10
        for turn in range(3):
            for number, client in enumerate(clients):
                answer = await client.call("add", {"a": number, "b": turn})
                assert (answer.status, answer.text) == (200, str(number + turn))
                assert one.residents <= 10
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()
        assert one.residents == 10
        calls = one.notes.genuine("tools/call")
        # Evicted and restored each time, with the marker.
        assert [seen.marker is not None for seen in calls] == [True] * 180
        assert max(seen.marker.restores for seen in calls if seen.marker is not None) == 3
    assert told == []
    assert store.counts()["end"] == 0


async def test_the_copy_that_nobody_has_used_for_longest_makes_room(store: FaultyStore) -> None:
    async with instance(store, max_sessions=3) as one:
        clients = [one.client() for _ in range(3)]
        ids = [await client.handshake() for client in clients]
        await one.at_rest()
        await clients[0].ping()
        # A stream that was open until now.
        stream = await clients[1].get_stream()
        stream.disconnect()
        await stream.end()
        await one.at_rest()
        fourth = await one.client().handshake()
        assert in_memory(one) == {ids[0], ids[1], fourth}
        await one.at_rest()
        fifth = await one.client().handshake()
        assert in_memory(one) == {ids[1], fourth, fifth}
        await one.at_rest()
        # A restore takes a seat as well.
        assert (await clients[2].ping()).status == 200
        assert in_memory(one) == {ids[2], fourth, fifth}
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


@pytest.mark.parametrize("use", ["request", "stream", "abandoned call", "notification", "commit"])
async def test_a_copy_in_use_makes_no_room(store: FaultyStore, json_response: bool, use: str) -> None:
    notes = Notes()
    proceed = anyio.Event()
    reached = anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        reached.set()
        await proceed.wait()

    async with instance(store, notes, max_sessions=1, json_response=json_response) as one:
        client = one.client()
        if use == "commit":
            create = store.hold("create")
            opening = client.open_initialize()
            await create.wait_entered()
        elif use == "notification":
            notes.on_initialized = hold
            await client.handshake()
            await wait_for(reached)
        else:
            await client.handshake()
            await one.at_rest()
            if use == "stream":
                stream = await client.get_stream()
            else:
                call = client.open_call("wait")
                await until(lambda: notes.waiting == 1)
                if use == "abandoned call":
                    call.cancel()
                    await call.end()
        before = in_memory(one)
        refused = await one.client().initialize()
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.session_id is None
        assert in_memory(one) == before
        # It is over, and there is room.
        notes.on_initialized = None
        proceed.set()
        notes.proceed.set()
        if use == "commit":
            create.release()
            assert (await opening.answer()).status == 200
        elif use == "stream":
            stream.disconnect()
            await stream.end()
        await until(lambda: [session.busy for session in registry_of(one.manager)] == [False])
        assert (await one.client().initialize()).status == 200
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 1


async def test_copies_whose_clean_up_hangs_do_not_pile_up(store: FaultyStore) -> None:
    notes = Notes()
    _, proceed = hold_the_exit(notes)
    async with instance(store, notes, max_sessions=2) as one:
        ids = []
        for _ in range(4):
            ids.append(await one.client().handshake())
            await one.at_rest()
        assert len(stopping_in(one.manager)) == 2
        refused = await one.client().initialize()
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        assert (await one.client(ids[-1]).ping()).status == 200
        assert in_memory(one) == set(ids[2:])
        proceed.set()
        await until(lambda: not stopping_in(one.manager))
        assert (await one.client().initialize()).status == 200
        one.assert_seats_match()


async def test_a_copy_that_makes_room_is_restored_when_it_has_cleaned_up(store: FaultyStore) -> None:
    notes = Notes()
    leaving, proceed = hold_the_exit(notes)
    async with instance(store, notes, max_sessions=1) as one:
        client = one.client()
        await client.handshake()
        await one.at_rest()
        notes.on_initialize = None
        other = one.client()
        await other.handshake()
        await wait_for(leaving)
        await one.at_rest()
        call = client.open_call("add", {"a": 1, "b": 2})
        await anyio.wait_all_tasks_blocked()
        assert call.sent == []
        # Who waits takes no seat.
        assert in_memory(one) == {other.session_id}
        proceed.set()
        assert (await call.answer()).text == "3"
        assert in_memory(one) == {client.session_id}


async def test_requests_at_once_for_more_sessions_than_seats_are_served_or_told_to_come_back(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store) as gone:
        ids = [await gone.client().handshake() for _ in range(40)]
    async with instance(store, max_sessions=5, json_response=json_response) as one:
        clients = [one.client(session_id) for session_id in ids]
        done: set[int] = set()
        with anyio.fail_after(60):
            while len(done) < len(clients):
                left = [number for number in range(len(clients)) if number not in done]
                calls = {number: clients[number].open_call("add", {"a": number, "b": 0}) for number in left}
                for number, call in calls.items():
                    answer = await call.answer()
                    assert one.residents <= 5
                    if is_not_handled(answer):
                        assert_not_handled(answer)
                    else:
                        assert answer.text == str(number)
                        done.add(number)
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def test_a_copy_leaves_when_nobody_has_used_it_for_a_while(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=LONG) as one:
        used, quiet = one.client(), one.client()
        await used.handshake()
        await quiet.handshake()
        await one.at_rest()
        clock.advance(timedelta(minutes=4))
        await evict_unused(one.manager)
        assert one.residents == 2
        assert (await used.ping()).status == 200
        clock.advance(timedelta(minutes=2))
        await evict_unused(one.manager)
        assert in_memory(one) == {used.session_id}
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()
        assert (await quiet.ping()).status == 200
        assert len(one.notes.replayed("initialize")) == 1


async def test_eviction_counts_from_the_end_of_the_last_use(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=LONG) as one:
        client = one.client()
        await client.handshake()
        stream = await client.get_stream()
        await one.at_rest()
        clock.advance(timedelta(minutes=10))
        await evict_unused(one.manager)
        assert one.residents == 1
        stream.disconnect()
        await stream.end()
        clock.advance(timedelta(minutes=4))
        await evict_unused(one.manager)
        assert one.residents == 1
        clock.advance(timedelta(minutes=2))
        await evict_unused(one.manager)
        assert one.residents == 0


async def test_an_initialize_whose_body_comes_in_pieces_has_another_copy_make_room(
    store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, max_sessions=1, json_response=json_response) as one:
        await one.client().handshake()
        await one.at_rest()
        message = {"jsonrpc": "2.0", "id": 1, "params": INITIALIZE_PARAMS, "method": "initialize"}
        body = json.dumps(message).encode()
        answer = await one.client().open_parts(body[:60], body[60:]).answer()
        assert answer.status == 200
        assert answer.session_id is not None
        assert in_memory(one) == {answer.session_id}
