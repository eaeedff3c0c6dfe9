"""Claims of restored sessions: they travel with the report of activity, and none is lost by anything but a crash."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EndReason, RetentionPolicy, session_key
from mcp_session_store.adapter.sessions import activity
from tests.support.asgi import until
from tests.support.http import assert_not_handled
from tests.support.instances import Notes, instance, open_session, wait_for
from tests.support.internals import activity_is_failing, changes_of, evict_unused, report_activity, rows_of, stopping_in

if TYPE_CHECKING:
    from mcp_session_store import SessionRecord
    from tests.support.faulty_stores import FaultyStore, Sessions
    from tests.support.instances import Clock, RequestContext

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
LONG = 3600.0
"""Seconds between what a test does not want to happen."""


async def test_a_restore_waits_for_no_statement_but_the_load(store: FaultyStore, json_response: bool) -> None:
    session_id = await open_session(store)
    async with instance(store, json_response=json_response) as one:
        await one.first_poll()
        store.calls.clear()
        touch = store.hold("touch")
        client = one.client(session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert [call for call in store.calls if call != "touch"] == ["load"]
        await touch.wait_entered()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        touch.release()
        record = await store.restored(session_id)
        assert (record.restores, record.instance_hint) == (1, one.manager.instance)
        assert store.counts()["claim"] == 0


@pytest.mark.parametrize(
    "policy", [RetentionPolicy(), RetentionPolicy(idle=None, absolute=HOUR), RetentionPolicy(idle=None)], ids=str
)
async def test_a_claim_is_reported_at_once_by_every_policy(store: FaultyStore, policy: RetentionPolicy) -> None:
    store.retention = policy
    session_id = await open_session(store)
    async with instance(store, activity_interval=LONG, end_within=LONG) as one:
        await one.client(session_id).request("tools/list")
        await store.restored(session_id)


async def test_sessions_that_are_restored_together_are_claimed_in_one_report(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "GATHERING", 1.0)
    ids = [await open_session(store) for _ in range(20)]
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        store.touches.clear()
        for exchange in [one.client(session_id).open_request("ping") for session_id in ids]:
            assert (await exchange.answer()).status == 200
        for session_id in ids:
            await store.restored(session_id)
        assert len(store.touches) == 1


@pytest.mark.parametrize("how", ["ended", "expired"])
async def test_a_copy_whose_claim_comes_back_as_not_live_is_dropped(
    store: FaultyStore, sessions: Sessions, how: str
) -> None:
    session_id = await open_session(store)
    told: list[tuple[SessionRecord, EndReason]] = []

    async def on_end(record: SessionRecord, reason: EndReason) -> None:
        told.append((record, reason))

    store.hints = False
    async with instance(store, end_within=LONG, on_end=on_end) as one:
        await one.first_poll()
        touch = store.hold("touch")
        client = one.client(session_id)
        stream = await client.get_stream()
        assert (await client.request("tools/list")).status == 200
        await touch.wait_entered()
        if how == "ended":
            await sessions.end(session_key(session_id), reason=EndReason.OPERATOR)
        else:
            # By the store's clock alone, as if the instance had reported what it does not know of.
            sessions.ahead += timedelta(days=2)
        touch.release()
        await stream.end()
        await until(lambda: told != [])
        assert one.residents == 0
        assert (await client.request("tools/list")).status == 404
    ((record, reason),) = told
    assert reason is (EndReason.OPERATOR if how == "ended" else EndReason.EXPIRED)
    # The record is that of the restored session.
    assert (record.restores, record.instance_hint) == (1, one.manager.instance)


async def test_a_claim_is_judged_by_its_age(store: FaultyStore, sessions: Sessions, clock: Clock) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR)
    async with instance(store) as gone:
        client = gone.client()
        session_id = await client.begin()
    clock.advance(timedelta(minutes=59))
    notes = Notes()
    reached, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        reached.set()
        await proceed.wait()

    notes.on_initialize = hold
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        call = one.client(session_id).open_request("ping")
        await wait_for(reached)
        # It expires during its replay. But it was used before.
        clock.advance(timedelta(minutes=2))
        proceed.set()
        assert (await call.answer()).status == 200
        record = await store.restored(session_id)
        assert record.expires_at == record.last_seen_at + HOUR
        assert (await one.client(session_id).request("tools/list")).status == 200
    assert len(notes.replayed("initialize")) == 1


async def test_a_restore_that_outlasts_the_absolute_lifetime_is_not_published(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(absolute=HOUR)
    session_id = await open_session(store)
    clock.advance(timedelta(minutes=59))
    notes = Notes()

    async def last(_ctx: RequestContext) -> None:
        clock.advance(timedelta(minutes=2))

    notes.on_initialize = last
    async with instance(store, notes, end_within=LONG) as one:
        assert (await one.client(session_id).request("tools/list")).status == 404
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 0
        one.assert_seats_match()
    assert notes.genuine("ping") == []


async def test_a_copy_ends_by_the_times_that_the_load_told(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=HOUR, absolute=2 * HOUR)
    async with instance(store) as gone:
        session_id = await gone.client().begin()
    clock.advance(HOUR / 2)
    # Clocks that differ change nothing.
    sessions.ahead += timedelta(days=365)
    row = rows_of(sessions)[session_key(session_id)]
    row.record = _later(row.record, timedelta(days=365))
    async with instance(store, end_within=LONG, evict_after=None) as one:
        await one.first_poll()
        store.hold("touch")
        client = one.client(session_id)
        assert (await client.request("tools/list")).status == 200
        clock.advance(timedelta(minutes=59))
        await evict_unused(one.manager)
        assert one.residents == 1
        clock.advance(timedelta(minutes=29))
        stream = await client.get_stream()
        clock.advance(timedelta(minutes=2))
        await evict_unused(one.manager)
        await stream.end()
        assert one.residents == 0


async def test_a_claim_that_has_not_left_counts_when_the_session_is_restored_again(store: FaultyStore) -> None:
    session_id = await open_session(store)
    notes = Notes()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        touch = store.hold("touch")
        client = one.client(session_id)
        for restores in (1, 2, 3):
            assert (await client.request("tools/list")).status == 200
            marker = notes.seen[-1].marker
            assert marker is not None
            assert marker.restores == restores
            assert (marker.previous_instance == one.manager.instance) == (restores > 1)
            await one.terminate(session_id)
            await until(lambda: not stopping_in(one.manager))
            if restores == 2:
                # The first two are in reports that the store has not answered.
                await touch.wait_entered()
        touch.release()
        assert (await store.restored(session_id, 3)).restores == 3


async def test_a_claim_before_the_service_counts_those_that_have_not_left(store: FaultyStore) -> None:
    session_id = await open_session(store)
    notes = Notes()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        touch = store.hold("touch")
        client = one.client(session_id)
        assert (await client.request("tools/list")).status == 200
        await one.terminate(session_id)
        await until(lambda: not stopping_in(one.manager))
        store.claims_first = True
        assert (await client.request("tools/list")).status == 200
        marker = notes.seen[-1].marker
        assert marker is not None
        assert marker.restores == 2
        touch.release()
        await until(lambda: store.claims(session_id) != [])
        await report_activity(one.manager)
        assert (await store.restored(session_id, 2)).restores == 2


@pytest.mark.parametrize("fault", ["down", "lost"])
async def test_a_claim_that_the_store_does_not_take_is_repeated_and_counts_once(store: FaultyStore, fault: str) -> None:
    session_id = await open_session(store)
    async with instance(store, end_within=LONG, activity_interval=LONG) as one:
        await one.first_poll()
        {"down": store.down, "lost": store.lose_the_answer_of}[fault]("touch")
        client = one.client(session_id)
        assert (await client.request("tools/list")).status == 200
        await until(lambda: store.counts()["touch"] >= 2)
        # The copy leaves, and its claim stays.
        await one.terminate(session_id)
        store.up()
        await until(lambda: not activity_is_failing(one.manager))
        assert (await store.restored(session_id)).restores == 1


async def test_while_the_store_takes_no_reports_each_restore_is_claimed_before_it_is_served(
    store: FaultyStore,
) -> None:
    ids = [await open_session(store) for _ in range(3)]
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        store.down("touch")
        assert (await one.client(ids[0]).request("tools/list")).status == 200
        await until(lambda: activity_is_failing(one.manager))
        assert (await one.client(ids[1]).request("tools/list")).status == 200
        assert store.counts()["claim"] == 1
        # Of a database that takes no changes, such as a copy that is promoted late, nothing is served.
        store.down("touch", "claim")
        assert_not_handled(await one.client(ids[2]).request("tools/list"))
        store.up()
        for session_id in ids[:2]:
            await store.restored(session_id)
        await until(lambda: not activity_is_failing(one.manager))
        store.calls.clear()
        assert (await one.client(ids[2]).request("tools/list")).status == 200
        assert store.counts()["claim"] == 0


async def test_a_session_that_ended_while_the_process_was_suspended_in_its_restore_is_not_served(
    store: FaultyStore, sessions: Sessions
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()

        async def suspended(_ctx: RequestContext) -> None:
            await sessions.end(session_key(session_id), reason=EndReason.OPERATOR)
            changes_of(one.manager).verified_until = -math.inf

        store.hints = False
        notes.on_initialize = suspended
        assert (await one.client(session_id).ping()).status == 404
        assert store.counts()["claim"] == 1
    assert notes.genuine("ping") == []


async def test_a_session_that_is_deleted_before_its_claim_was_reported_is_gone(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        touch = store.hold("touch")
        client = one.client(session_id)
        assert (await client.request("tools/list")).status == 200
        assert (await client.delete()).status == 200
        touch.release()
        await until(lambda: store.claims(session_id) != [])
        assert await store.ended(session_id) is EndReason.CLIENT
        assert (await client.request("tools/list")).status == 404


async def test_a_stop_reports_the_claims_that_have_not_left(store: FaultyStore) -> None:
    resident, evicted = [await open_session(store) for _ in range(2)]
    async with instance(store, end_within=LONG) as one:
        await one.first_poll()
        for session_id in (resident, evicted):
            assert (await one.client(session_id).request("tools/list")).status == 200
        await one.terminate(evicted)
    for session_id in (resident, evicted):
        record = await store.record(session_id)
        assert record is not None
        assert (record.restores, record.instance_hint) == (1, one.manager.instance)


async def test_a_record_shows_nothing_of_a_restore_that_was_killed_before_its_report(store: FaultyStore) -> None:
    session_id = await open_session(store)
    before = await store.record(session_id)
    async with instance(store, end_within=LONG) as killed:
        await killed.first_poll()
        store.down("touch")
        assert (await killed.client(session_id).request("tools/list")).status == 200
    assert await store.record(session_id) == before
    store.up()
    notes = Notes()
    async with instance(store, notes) as one:
        assert (await one.client(session_id).request("tools/list")).status == 200
        marker = notes.seen[-1].marker
        assert marker is not None
        assert before is not None
        assert (marker.restores, marker.previous_instance) == (1, before.instance_hint)


def _later(record: SessionRecord, by: timedelta) -> SessionRecord:
    """Return a record with all times later."""
    assert record.expires_at is not None
    return replace(
        record,
        created_at=record.created_at + by,
        last_seen_at=record.last_seen_at + by,
        expires_at=record.expires_at + by,
    )
