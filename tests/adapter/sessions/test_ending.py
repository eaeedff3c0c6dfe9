"""A session that ends anywhere ends everywhere: what its copies on other instances do, and when they learn of it."""

from __future__ import annotations

import datetime as datetime_module
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import EndReason, RetentionPolicy, StoreUnavailable, session_key, telemetry
from mcp_session_store.adapter import background
from mcp_session_store.adapter import clock as adapter_clock
from mcp_session_store.adapter.sessions import changes, restoring
from mcp_session_store.adapter.sessions import resident as session_module
from mcp_session_store.retention import MIN_TOMBSTONE
from tests.support.asgi import Client, until
from tests.support.faulty_stores import FaultyStore, Sessions
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance, principal, wait_for
from tests.support.internals import (
    activity_is_urgent,
    activity_of,
    changes_of,
    evict_unused,
    exit_stack_of,
    is_listened_to,
    notify_of_changes,
    registry_of,
    rows_of,
    stopping_in,
    unreported_in,
)

if TYPE_CHECKING:
    from mcp_session_store import SessionRecord
    from tests.support.asgi import Exchange
    from tests.support.instances import Clock, Instance, RequestContext

pytestmark = pytest.mark.anyio

LONG = 3600.0
"""Seconds within which an end is learned of: too long for a test to wait for."""
SOON = 0.2
"""Seconds, where polling is all there is."""
HOUR = timedelta(hours=1)


class Ends:
    """What the `on_end` hook was told."""

    def __init__(self) -> None:
        self.told: list[tuple[SessionRecord, EndReason]] = []

    async def __call__(self, record: SessionRecord, reason: EndReason) -> None:
        self.told.append((record, reason))

    @property
    def reasons(self) -> list[EndReason]:
        return [reason for _, reason in self.told]


class Used:
    """A copy of a session that is in use: an open stream, and a call that runs."""

    def __init__(self, one: Instance, client: Client, stream: Exchange, call: Exchange) -> None:
        self.one = one
        self.client = client
        self.stream = stream
        self.call = call
        self.call_id = client._last_id

    @classmethod
    async def of(cls, one: Instance, session_id: str | None, **settings: Any) -> Used:
        client = one.client(session_id, **settings)
        if session_id is None:
            await client.begin()
        stream = await client.get_stream()
        assert stream.status == 200
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        return cls(one, client, stream, call)

    async def is_over(self) -> None:
        """All of it has ended, and the client was told so."""
        await self.stream.end()
        answer = await self.call.answer()
        assert answer.error["message"] == "Session ended"
        assert [message.get("id") for message in answer.messages] == [self.call_id]
        await until(lambda: self.one.notes.waiting == 0)
        assert self.one.notes.waited == 0
        assert (await self.client.request("tools/list")).status == 404
        assert (await self.client.open("GET").answer()).status == 404
        assert (await self.client.delete()).status == 404
        await until(lambda: stopping_in(self.one.manager) == {})
        assert self.one.residents == 0
        self.one.assert_seats_match()


async def learned(one: Instance) -> None:
    """Let an instance ask once what has changed, without waiting for its time."""
    await changes_of(one.manager).poll()


@pytest.mark.parametrize("how", ["hint", "polling"])
@pytest.mark.parametrize("ended_by", ["DELETE", "operator", "sibling"])
async def test_a_session_that_ends_anywhere_ends_everywhere(
    store: FaultyStore,
    other_store: FaultyStore,
    json_response: bool,
    how: str,
    ended_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nobody waits for clients that have been answered.
    monkeypatch.setattr(session_module, "LAST_ANSWERS", LONG)
    store.hints = other_store.hints = how == "hint"
    if ended_by == "sibling":
        store.retention = RetentionPolicy(per_principal=1)
    end_within = LONG if how == "hint" else SOON
    ends, other_ends = Ends(), Ends()
    alice = principal("alice")
    async with (
        instance(store, json_response=json_response, end_within=end_within, on_end=ends) as one,
        instance(other_store, json_response=json_response, end_within=end_within, on_end=other_ends) as two,
    ):
        await one.first_poll()
        await two.first_poll()
        used = await Used.of(one, None, user=alice)
        session_id = str(used.client.session_id)
        elsewhere = await Used.of(two, session_id, user=alice)
        if ended_by == "DELETE":
            assert (await two.client(session_id, user=alice).delete()).status == 200
            reason = EndReason.CLIENT
        elif ended_by == "operator":
            assert await FaultyStore(store.inner).end(session_key(session_id), reason=EndReason.OPERATOR)
            reason = EndReason.OPERATOR
        else:
            async with instance(FaultyStore(store.inner)) as three:
                await three.client(user=alice).begin()
            reason = EndReason.LIMIT
        await used.is_over()
        await elsewhere.is_over()
        for told in (ends, other_ends):
            await until(lambda told=told: told.told != [])  # type: ignore[misc]
        await learned(one)
        await learned(two)
    assert ends.reasons == other_ends.reasons == [reason]
    assert ends.told[0][0].key == session_key(session_id)


async def test_an_end_leaves_other_sessions_alone(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store, end_within=LONG) as one:
        used = await Used.of(one, None)
        others = [one.client() for _ in range(3)]
        streams = []
        for other in others:
            await other.begin()
            streams.append(await other.get_stream())
        await other_store.end(session_key(str(used.client.session_id)), reason=EndReason.OPERATOR)
        await used.call.answer()
        for other, stream in zip(others, streams, strict=True):
            assert (await other.request("tools/list")).status == 200
            assert not stream.over.is_set()
        assert one.residents == 3
        one.assert_seats_match()


async def test_a_copy_that_is_idle_leaves_when_its_session_ends_elsewhere(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    ends = Ends()
    async with instance(store, end_within=LONG, on_end=ends) as one:
        await one.first_poll()
        session_id = await one.client().begin()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0 and ends.told != [])
        one.assert_seats_match()
        assert (await one.client(session_id).request("tools/list")).status == 404
    assert ends.reasons == [EndReason.OPERATOR]


async def test_the_session_is_refused_while_its_copy_still_leaves(store: FaultyStore, other_store: FaultyStore) -> None:
    notes = Notes()
    proceed = anyio.Event()

    async def push(ctx: RequestContext) -> None:
        exit_stack_of(ctx).push_async_callback(proceed.wait)

    notes.on_initialize = push
    async with instance(store, notes, end_within=LONG) as one:
        session_id = await one.client().begin()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        assert registry_of(one.manager).stopping(session_id) is not None
        assert (await one.client(session_id).request("tools/list")).status == 404
        proceed.set()


async def test_a_client_that_reads_no_answer_does_not_keep_the_copy(
    store: FaultyStore, other_store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LAST_ANSWERS", 0.05)
    async with instance(store, json_response=json_response, end_within=LONG) as one:
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("wait")

        async def stuck(_message: Any) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(call, "send", stuck)
        await until(lambda: one.notes.waiting == 1)
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0 and one.notes.waiting == 0)
        await until(lambda: stopping_in(one.manager) == {})
        one.assert_seats_match()
        call.cancel()


# What learning costs


async def test_one_query_learns_of_all_sessions(store: FaultyStore, other_store: FaultyStore) -> None:
    store.hints = False
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        ids = [await one.client().begin() for _ in range(30)]
        for session_id in ids[:20]:
            await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: store.touches != [] and not activity_is_urgent(one.manager))
        store.background.clear()
        store.calls.clear()
        await learned(one)
        assert store.background == {"changes": 1}
        assert store.calls == []
        assert one.residents == 10
        assert {(await one.client(session_id).request("tools/list")).status for session_id in ids[20:]} == {200}


async def test_polling_goes_on_whether_there_are_sessions_or_not(store: FaultyStore) -> None:
    store.hints = False
    async with instance(store, end_within=SOON, sweep_interval=None):
        await until(lambda: store.background["changes"] >= 3)
    assert store.calls == ["open"]


async def test_each_poll_goes_on_where_the_last_one_that_worked_ended(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.hints = False
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        for _ in range(3):
            session_id = await one.client().begin()
            await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
            store.down("changes")
            with pytest.raises(StoreUnavailable):
                await learned(one)
            store.up()
            await learned(one)
        await learned(one)
        assert len(store.polled) == 5
        assert store.polled[0][0] is None
        for (_, found), (since, _) in zip(store.polled, store.polled[1:], strict=False):
            assert since == found.until
        assert [len(found.changes) for _, found in store.polled] == [0, 1, 1, 1, 0]


async def test_hints_for_sessions_of_others_cost_nothing(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store, end_within=LONG) as one, instance(other_store, end_within=LONG) as two:
        await one.first_poll()
        mine = await one.client().begin()
        clients = [two.client() for _ in range(5)]
        for client in clients:
            await client.begin()
        # A report learns of ends, too.
        await until(lambda: unreported_in(one.manager) == {})
        polls = store.background["changes"]
        for client in clients:
            await client.delete()
        # A hint that concerns this instance comes after them all.
        await FaultyStore(store.inner).end(session_key(mine), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        assert store.background["changes"] == polls + 1


async def test_hints_that_come_together_cost_one_query(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        ids = [await one.client().begin() for _ in range(20)]
        # A report learns of ends, too.
        await until(lambda: unreported_in(one.manager) == {})
        polls = store.background["changes"]
        for session_id in ids:
            await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        assert store.background["changes"] == polls + 1


async def test_a_hint_that_names_nobody_is_for_all(store: FaultyStore) -> None:
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        polls = store.background["changes"]
        notify_of_changes(one.manager)
        await until(lambda: store.background["changes"] == polls + 1)


# When it fails


async def test_a_broken_listener_is_logged_counted_and_tried_again_and_polling_holds_the_bound(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "MIN_BACKOFF", 0.01)
    failures: list[dict[str, str]] = []
    monkeypatch.setattr(
        telemetry, "background_failures", type("Failures", (), {"add": lambda _, n, by: failures.append(by)})()
    )
    store.down("listen")
    async with instance(store, end_within=SOON) as one:
        session_id = await one.client().begin()
        hints = telemetry.of("default", task="hints")
        await until(lambda: "hints failed" in caplog.text and failures.count(hints) >= 2)
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        # It recovers by itself.
        store.up()
        await until(lambda: is_listened_to(store.inner))


async def test_a_poll_that_fails_is_logged_and_tried_again_and_misses_nothing(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "MIN_BACKOFF", 0.01)
    store.hints = False
    # It does not look paused while it cannot poll.
    async with instance(store, end_within=LONG) as one:
        session_id = await one.client().begin()
        await one.first_poll()
        # A report learns of ends, too.
        await until(lambda: unreported_in(one.manager) == {})
        store.down("changes")
        polls = store.background["changes"]
        notify_of_changes(one.manager)
        await until(lambda: store.background["changes"] >= polls + 3)
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        assert (await one.client(session_id).request("tools/list")).status == 200
        assert "the session store is away" in caplog.text
        store.up()
        await until(lambda: one.residents == 0)
        assert (await one.client(session_id).request("tools/list")).status == 404


@pytest.mark.parametrize("touch", ["works", "fails at first"])
async def test_after_an_outage_that_outlives_tombstones_all_sessions_are_verified(
    store: FaultyStore, sessions: Sessions, clock: Clock, touch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "now", lambda: adapter_clock.now())
    store.hints = False
    ends = Ends()
    async with instance(store, end_within=LONG, on_end=ends) as one:
        await one.first_poll()
        ended, live = [one.client() for _ in range(2)]
        for client in (ended, live):
            await client.begin()
        stream = await ended.get_stream()
        store.down()
        await sessions.end(session_key(str(ended.session_id)), reason=EndReason.OPERATOR)
        clock.advance(MIN_TOMBSTONE)
        del rows_of(sessions)[session_key(str(ended.session_id))]
        store.up()
        if touch == "fails at first":
            store.down("touch")
            with pytest.raises(Exception, match="down"):
                await learned(one)
            assert one.residents == 2
            store.up()
        await learned(one)
        await stream.end()
        assert one.residents == 1
        assert (await live.request("tools/list")).status == 200
        assert (await ended.request("tools/list")).status == 404
        await until(lambda: ends.told != [])
        # Where there is no outage, nothing is verified.
        store.calls.clear()
        clock.advance(MIN_TOMBSTONE / 3)
        await learned(one)
        assert store.calls == []


async def test_an_end_hook_that_fails_is_logged_and_the_copy_leaves(
    store: FaultyStore, other_store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async def on_end(*_: object) -> None:
        raise RuntimeError("the application's bug")

    async with instance(store, end_within=LONG, on_end=on_end) as one:
        session_id = await one.client().begin()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: f"the on_end hook failed for the session {session_key(session_id)}" in caplog.text)
        assert one.residents == 0
        # The instance goes on.
        await one.client().begin()


# Restores


@pytest.mark.parametrize("when", ["before the load", "after the load", "before the claim", "after the claim"])
async def test_a_session_that_ends_elsewhere_while_it_is_restored_is_not_published(
    store: FaultyStore, other_store: FaultyStore, when: str
) -> None:
    async with instance(other_store) as gone:
        session_id = await gone.client().begin()
    ends = Ends()
    async with instance(store, end_within=LONG, on_end=ends) as one:
        await one.first_poll()
        store.claims_first = "claim" in when
        after, _, operation = when.partition(" the ")
        held = store.hold(operation, after=after == "after")
        call = one.client(session_id).open_call("add", {"a": 1, "b": 2})
        await held.wait_entered()
        polls = store.background["changes"]
        await FaultyStore(store.inner).end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: store.background["changes"] > polls)
        held.release()
        assert (await call.answer()).status == 404
        assert one.notes.genuine("tools/call") == []
        await until(lambda: stopping_in(one.manager) == {})
        assert one.residents == 0
        one.assert_seats_match()
        assert (await one.client(session_id).request("tools/list")).status == 404


# Lifetimes


@pytest.mark.parametrize("restored", [False, True], ids=["opened here", "restored here"])
async def test_the_absolute_lifetime_ends_copies_that_are_in_use(
    store: FaultyStore,
    sessions: Sessions,
    clock: Clock,
    json_response: bool,
    restored: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "LAST_ANSWERS", LONG)
    sessions.retention = RetentionPolicy(absolute=HOUR)
    ends = Ends()
    session_id = None
    if restored:
        async with instance(FaultyStore(sessions)) as gone:
            session_id = await gone.client().begin()
        clock.advance(HOUR / 2)
    # Nothing but the eviction task learns of it: polls and reports are far away.
    async with instance(
        store, json_response=json_response, end_within=LONG, evict_after=0.2, activity_interval=LONG, on_end=ends
    ) as one:
        used = await Used.of(one, session_id)
        await until(lambda: not activity_is_urgent(one.manager))
        if not restored:
            clock.advance(HOUR / 2)
        clock.advance(timedelta(minutes=29))
        await evict_unused(one.manager)
        assert (await used.client.request("tools/list")).status == 200
        assert not used.stream.over.is_set()
        clock.advance(timedelta(minutes=1, seconds=1))
        await used.is_over()
        await until(lambda: ends.told != [])
    assert ends.reasons == [EndReason.EXPIRED]


async def test_a_request_after_the_absolute_lifetime_is_refused_whether_the_copy_is_still_there_or_not(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(absolute=HOUR)
    async with instance(store, end_within=LONG, evict_after=None) as one:
        client = one.client()
        await client.begin()
        await activity_of(one.manager).report(everything=True)
        clock.advance(timedelta(minutes=59))
        assert (await client.request("tools/list")).status == 200
        clock.advance(timedelta(minutes=2))
        assert one.residents == 1
        assert (await client.request("tools/list")).status == 404
        assert one.notes.replayed("initialize") == []


async def test_an_idle_session_expires_on_a_copy_that_nothing_evicts(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR)
    async with instance(store, end_within=LONG, evict_after=None) as one:
        clients = [one.client() for _ in range(2)]
        for client in clients:
            await client.begin()
        await one.at_rest()
        await activity_of(one.manager).report(everything=True)
        clock.advance(timedelta(minutes=59))
        await evict_unused(one.manager)
        assert one.residents == 2
        assert (await clients[0].request("tools/list")).status == 200
        clock.advance(timedelta(minutes=2))
        assert (await clients[1].request("tools/list")).status == 404
        await evict_unused(one.manager)
        assert one.residents == 1
        assert (await clients[0].request("tools/list")).status == 200
        assert one.notes.replayed("initialize") == []


async def test_a_session_that_was_used_elsewhere_meanwhile_goes_on_here(
    store: FaultyStore, other_store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR)
    async with (
        instance(store, end_within=LONG, evict_after=None) as one,
        instance(other_store, end_within=LONG, evict_after=None) as two,
    ):
        client = one.client()
        session_id = await client.begin()
        await one.at_rest()
        await activity_of(one.manager).report(everything=True)
        for _ in range(4):
            clock.advance(timedelta(minutes=20))
            assert (await two.client(session_id).request("tools/list")).status == 200
            await activity_of(two.manager).report(everything=True)
        # Expired as far as this instance knows; the store knows better.
        assert (await client.request("tools/list")).status == 200
        assert len(one.notes.replayed("initialize")) == 1


async def test_an_abandoned_new_session_expires_after_ten_minutes_on_its_copy_too(
    store: FaultyStore, clock: Clock
) -> None:
    async with instance(store, end_within=LONG, evict_after=None) as one:
        await one.first_poll()
        client = one.client()
        await client.initialize()
        clock.advance(timedelta(minutes=9))
        await evict_unused(one.manager)
        assert one.residents == 1
        clock.advance(timedelta(minutes=2))
        await evict_unused(one.manager)
        assert one.residents == 0
        assert (await client.request("tools/list")).status == 404


# Clocks


@pytest.mark.parametrize("skew", [-HOUR, HOUR], ids=["an hour slow", "an hour fast"])
async def test_an_instance_whose_wall_clock_is_wrong_behaves_like_any_other(
    sessions: Sessions, clock: Clock, monkeypatch: pytest.MonkeyPatch, skew: timedelta
) -> None:
    """The instances' clock is wrong, the store's is right; lifetimes are shorter than the difference."""
    sessions.retention = RetentionPolicy(idle=timedelta(minutes=20), absolute=timedelta(minutes=51))

    class Skewed(datetime_module.datetime):
        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> Any:
            return datetime_module.datetime.now(tz) + skew

    real = time.time
    monkeypatch.setattr(restoring, "datetime", Skewed)
    monkeypatch.setattr(time, "time", lambda: real() + skew.total_seconds())
    store = FaultyStore(sessions)
    ends = Ends()
    async with instance(store, end_within=LONG, evict_after=None, on_end=ends) as one:
        await one.first_poll()
        client, quiet = one.client(), one.client()
        session_id = await client.begin()
        await quiet.begin()
        await one.at_rest()
        await activity_of(one.manager).report(everything=True)
        for _ in range(2):
            clock.advance(timedelta(minutes=15))
            assert (await client.request("tools/list")).status == 200
            await activity_of(one.manager).report(everything=True)
            await evict_unused(one.manager)
        assert await store.expiry(session_id) == timedelta(minutes=20)
        # The other one was idle for as long as it may.
        assert one.residents == 1
        assert (await quiet.request("tools/list")).status == 404
        # Evicted and restored, and still the same lifetimes.
        await one.terminate(session_id)
        assert (await client.request("tools/list")).status == 200
        await client.get_stream()
        clock.advance(timedelta(minutes=19))
        await evict_unused(one.manager)
        assert one.residents == 1
        clock.advance(timedelta(minutes=3))
        assert (await client.request("tools/list")).status == 404
        await evict_unused(one.manager)
        await until(lambda: one.residents == 0)


async def test_ends_are_learned_of_whatever_the_wall_clock_says(
    store: FaultyStore, sessions: Sessions, other_store: FaultyStore
) -> None:
    # The store's clock differs from the instance's, and `until` is the store's.
    sessions.ahead = -HOUR
    store.hints = False
    async with instance(store, end_within=SOON) as one:
        await one.first_poll()
        session_id = await one.client().begin()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)


# A handshake under way


async def test_a_second_initialize_in_a_session_that_has_ended_elsewhere_ends_the_copy(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    store.hints = False
    ends = Ends()
    async with instance(store, json_response=json_response, end_within=LONG, on_end=ends) as one:
        await one.first_poll()
        client = one.client()
        session_id = await client.begin()
        stream = await client.get_stream()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        assert (await client.initialize({**INITIALIZE_PARAMS, "n": 1})).status == 404
        assert (await client.request("tools/list")).status == 404
        await stream.end()
        await until(lambda: ends.told != [])
        one.assert_seats_match()
    assert ends.reasons == [EndReason.OPERATOR]


async def test_a_session_that_ends_elsewhere_during_its_second_initialize_is_over(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    notes = Notes()
    reached, proceed = anyio.Event(), anyio.Event()
    async with instance(store, notes, json_response=json_response, end_within=LONG) as one:
        client = one.client()
        session_id = await client.begin()

        async def hold(_ctx: RequestContext) -> None:
            reached.set()
            await proceed.wait()

        notes.on_initialize = hold
        again = client.open_initialize({**INITIALIZE_PARAMS, "n": 1})
        await wait_for(reached)
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        await until(lambda: one.residents == 0)
        answer = await again.answer()
        assert answer.status in (404, 503) or answer.error["message"] == "Session ended"
        await until(lambda: stopping_in(one.manager) == {})
        one.assert_seats_match()
        assert (await client.request("tools/list")).status == 404
        proceed.set()
