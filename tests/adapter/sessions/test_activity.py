"""Activity of sessions: gathered in memory, reported in one statement, lost by nothing but a crash."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import (
    ConfigurationError,
    EndReason,
    RetentionPolicy,
    StoreUnavailable,
    durable_app,
    session_key,
    telemetry,
)
from mcp_session_store.adapter import manager as manager_module
from mcp_session_store.adapter.sessions import activity as activity_module
from mcp_session_store.adapter.sessions import resident
from mcp_session_store.adapter.sessions.activity import checked_interval
from mcp_session_store.retention import NEW_SESSION_LIFETIME
from tests.support.asgi import PATIENCE, Client, until
from tests.support.instances import Notes, instance, principal, running
from tests.support.internals import (
    activity_is_urgent,
    activity_of,
    ender_of,
    registry_of,
    replace_shutdown,
    report_activity,
    rows_of,
    unreported_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from mcp_session_store.activity import Activity
    from tests.support.faulty_stores import FaultyStore, Sessions
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

DAY = timedelta(hours=24)
LATE = 30.0
"""Seconds by which a test may be late to look at an age."""
NO_POLL = 3600.0
"""Seconds between polls of changes, so that none comes between: where the clock was put forward, it would report."""


async def reported(one: Instance, store: FaultyStore) -> None:
    """Let the new sessions' first activity be stored."""
    await one.first_poll()
    await one.at_rest()
    await until(lambda: store.touches != [] and not activity_is_urgent(one.manager))
    await activity_of(one.manager).report(everything=True)
    store.touches.clear()
    store.calls.clear()


async def report(one: Instance) -> None:
    """Let the background task run once, without waiting for its time."""
    await report_activity(one.manager)


def told(touch: Iterable[Activity], session_id: str | None) -> Activity:
    """What a touch was told of one session."""
    assert session_id is not None
    (activity,) = (activity for activity in touch if activity.key == session_key(session_id))
    return activity


# A new session


async def test_a_new_record_lives_ten_minutes(store: FaultyStore) -> None:
    async with instance(store) as one:
        session_id = (await one.client().initialize()).session_id
        assert await store.expiry(session_id) == NEW_SESSION_LIFETIME == timedelta(minutes=10)
    # Shutdown is no activity.
    assert await store.expiry(session_id) == NEW_SESSION_LIFETIME


async def test_a_first_use_that_lasts_is_reported_at_once(store: FaultyStore) -> None:
    async with instance(store, activity_interval=3600, end_within=NO_POLL) as one:
        await one.first_poll()
        client = one.client()
        await client.handshake()
        await one.at_rest()
        store.calls.clear()
        call = client.open_call("wait")
        await until(lambda: store.counts()["touch"] == 1)
        await until(lambda: one.notes.waiting == 1)
        assert await store.expiry(client.session_id) == DAY
        one.notes.proceed.set()
        assert (await call.answer()).text == "waited"


async def test_the_first_use_makes_a_record_live_on(store: FaultyStore) -> None:
    async with instance(store) as one:
        await one.first_poll()
        client = one.client()
        await client.initialize()
        await client.call("add", {"a": 1, "b": 2})
        await until(lambda: store.counts()["touch"] == 1)
        assert await store.expiry(client.session_id) == DAY
        for _ in range(20):
            await client.request("tools/list")
        assert store.counts()["touch"] == 1


async def test_first_activities_are_reported_together(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity_module, "GATHERING", 1.0)
    async with instance(store) as one:
        await one.first_poll()
        clients = [one.client() for _ in range(20)]
        for client in clients:
            await client.initialize()
        exchanges = [client.open_request("tools/list") for client in clients]
        for exchange in exchanges:
            await exchange.answer()
        await until(lambda: store.counts()["touch"] > 0)
        for client in clients:
            assert await store.expiry(client.session_id) == DAY
        assert store.counts()["touch"] == 1


# What requests cost


async def test_activity_costs_no_query_for_a_request_and_one_for_a_report(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, activity_interval=3600, end_within=NO_POLL) as one:
        clients = [one.client() for _ in range(20)]
        for client in clients:
            await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        for _ in range(10):
            for client in clients:
                await client.request("tools/list")
        assert store.calls == []
        await report(one)
        assert store.calls == ["touch"]
        assert {activity.key for activity in store.touches[0]} == {
            session_key(str(client.session_id)) for client in clients
        }


async def test_the_activity_task_reports_by_itself_at_intervals(store: FaultyStore, sessions: Sessions) -> None:
    sessions.retention = RetentionPolicy(idle=timedelta(seconds=20))
    async with instance(store, activity_interval=0.02) as one:
        client = one.client()
        await client.begin()
        await client.get_stream()
        await until(lambda: store.counts()["touch"] >= 2)
        assert len(unreported_in(one.manager)) <= 1


async def test_ages_are_those_of_the_first_and_the_last_activity(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client, other = one.client(), one.client()
        await client.begin()
        await other.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        await client.request("tools/list")
        clock.advance(timedelta(minutes=40))
        await client.request("tools/list")
        await other.request("tools/list")
        clock.advance(timedelta(minutes=5))
        await report(one)
        (touch,) = store.touches
        mine, others = told(touch, client.session_id), told(touch, other.session_id)
        assert 2700 <= mine.first_age < 2700 + LATE
        assert 300 <= mine.last_age < 300 + LATE
        assert 300 <= others.last_age <= others.first_age < 300 + LATE
        # What has been reported is not reported again.
        clock.advance(timedelta(hours=2))
        await client.request("tools/list")
        await report(one)
        assert told(store.touches[1], client.session_id).first_age < LATE
        assert len(store.touches[1]) == 1


async def test_a_session_is_reported_at_most_once_in_a_twentieth_of_the_idle_time(
    store: FaultyStore, clock: Clock
) -> None:
    async with instance(store, end_within=NO_POLL, evict_after=None) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        for _ in range(14):
            clock.advance(timedelta(minutes=5))
            await client.request("tools/list")
            await report(one)
        assert store.touches == []
        clock.advance(timedelta(minutes=5))
        await report(one)
        # The first of all that were held back.
        ((activity,),) = store.touches
        assert 4200 <= activity.first_age < 4200 + LATE
        assert 300 <= activity.last_age < 300 + LATE


@pytest.mark.parametrize("idle", [DAY, None])
async def test_other_instances_learn_of_activity_within_half_of_the_time_for_which_memory_keeps_a_session(
    store: FaultyStore, sessions: Sessions, clock: Clock, idle: timedelta | None
) -> None:
    sessions.retention = RetentionPolicy(idle=idle)
    async with instance(store, end_within=NO_POLL, evict_after=300) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        for minutes in (2, 1):
            clock.advance(timedelta(minutes=minutes))
            await client.request("tools/list")
            assert store.touches == []
            await report(one)
        ((activity,),) = store.touches
        assert 0 <= activity.last_age < LATE


async def test_without_an_idle_time_sessions_are_still_reported_now_and_then(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    sessions.retention = RetentionPolicy(idle=None)
    async with instance(store, end_within=NO_POLL, evict_after=None) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        assert await store.expiry(client.session_id) is None
        await client.request("tools/list")
        clock.advance(timedelta(minutes=4))
        await report(one)
        assert store.touches == []
        clock.advance(timedelta(minutes=2))
        await report(one)
        assert len(store.touches) == 1


async def test_a_session_that_is_about_to_expire_is_reported_at_once(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=23, minutes=59, seconds=45))
        await client.request("tools/list")
        # Nobody but the request asks for it: the next report is seconds away.
        await until(lambda: store.touches != [])
        clock.advance(timedelta(hours=1))
        assert (await client.request("tools/list")).status == 200
        assert await store.record(str(client.session_id)) is not None


async def test_activity_that_was_held_back_is_reported_before_the_session_expires(
    store: FaultyStore, clock: Clock
) -> None:
    async with instance(store, activity_interval=3600, end_within=NO_POLL, evict_after=None) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        await until(lambda: registry_of(one.manager).with_key(session_key(str(client.session_id))) is not None)
        clock.advance(timedelta(minutes=30))
        await client.request("tools/list")
        await report(one)
        assert store.touches == []
        # Nothing more is heard of the client; the report that fits in still comes.
        session = registry_of(one.manager).with_key(session_key(str(client.session_id)))
        assert session is not None
        session.lifetime.reported_at += 86400
        clock.advance(timedelta(hours=22))
        await report(one)
        assert len(store.touches) == 1
        assert await store.expiry(client.session_id) == DAY


async def test_a_session_at_the_end_of_its_absolute_lifetime_is_not_reported_over_and_over(
    store: FaultyStore, sessions: Sessions, clock: Clock
) -> None:
    # No report can prolong it.
    sessions.retention = RetentionPolicy(absolute=timedelta(hours=1))
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(minutes=59, seconds=45))
        for _ in range(5):
            await client.request("tools/list")
            assert not activity_is_urgent(one.manager)
            await report(one)
        assert len(store.touches) <= 1


async def test_new_sessions_have_no_others_reported_before_their_time_nor_keep_them_from_it(
    store: FaultyStore, clock: Clock
) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        await report(one)
        await client.request("tools/list")
        assert store.touches == []
        for number in (1, 2):
            new = one.client()
            await new.begin()
            await until(lambda number=number: len(store.touches) == number)  # type: ignore[misc]
            assert [activity.key for activity in store.touches[-1]] == [session_key(str(new.session_id))]
        await one.at_rest()
        await until(lambda: not activity_is_urgent(one.manager))
        # Their time has come, and new ones are opened all the while.
        clock.advance(timedelta(seconds=20))
        new = one.client()
        await new.begin()
        await until(lambda: len(store.touches) > 2)
        assert told(store.touches[2], client.session_id)
        assert told(store.touches[2], new.session_id)


# What activity is


async def test_an_open_stream_is_activity(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await client.request("tools/list")
        stream = await client.get_stream()
        await reported(one, store)
        for _ in range(30):
            clock.advance(timedelta(hours=2))
            await report(one)
        assert len(store.touches) == 30
        for touch in store.touches:
            activity = told(touch, client.session_id)
            assert 0 <= activity.last_age <= activity.first_age
            assert activity.last_age < LATE
        stream.disconnect()
        await stream.end()
        clock.advance(timedelta(hours=2))
        await report(one)
        assert len(store.touches) == 30
        assert (await client.request("tools/list")).status == 200


async def test_a_running_call_is_activity_while_its_client_waits(
    store: FaultyStore, clock: Clock, json_response: bool
) -> None:
    async with instance(store, end_within=NO_POLL, json_response=json_response) as one:
        client = one.client()
        await client.begin()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        await reported(one, store)
        for _ in range(30):
            clock.advance(timedelta(hours=2))
            await report(one)
        assert len(store.touches) == 30
        one.notes.proceed.set()
        assert (await call.answer()).text == "waited"


async def test_a_running_call_is_no_activity_when_its_client_has_left(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.handshake()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        call.disconnect()
        await call.end()
        await reported(one, store)
        for _ in range(11):
            clock.advance(timedelta(hours=2))
            await report(one)
        assert store.touches == []
        assert one.notes.waiting == 1
        # Its idle time is over: the store is asked, and confirms it.
        clock.advance(timedelta(hours=3))
        await report(one)
        assert store.touches != []
        assert await store.record(str(client.session_id)) is None
        await until(lambda: one.notes.waiting == 0)
        assert one.residents == 0


async def test_a_wrong_principals_requests_are_no_activity(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client(user=principal("alice"))
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        wrong = one.client(client.session_id, user=principal("mallory"))
        for _ in range(3):
            assert (await wrong.request("tools/list")).status == 404
            assert (await wrong.open("GET").answer()).status == 404
        await report(one)
        assert store.touches == []


# When the store fails


class Counter:
    """Stands for an OpenTelemetry counter."""

    def __init__(self) -> None:
        self.added: list[dict[str, str]] = []

    def add(self, amount: int, attributes: dict[str, str] | None = None) -> None:
        assert amount == 1
        self.added.append(attributes or {})


@pytest.mark.parametrize("fault", ["down", "bug", "lost"])
async def test_an_activity_that_cannot_be_reported_is_logged_counted_and_reported_again(
    store: FaultyStore, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = Counter()
    monkeypatch.setattr(telemetry, "background_failures", failures)
    async with instance(store) as one:
        await one.first_poll()
        client = one.client()
        {"down": store.down, "bug": store.broken, "lost": store.lose_the_answer_of}[fault]("touch")
        await client.begin()
        # The first failures of a store that answers otherwise are no sign of a trouble.
        activity = telemetry.of("default", task="activity")
        await until(lambda: "activity" in caplog.text and failures.added.count(activity) >= 2)
        assert (await client.request("tools/list")).status == 200
        told = [record for record in caplog.records if "activity" in record.getMessage()]
        assert told
        assert {record.levelname for record in told} == {"ERROR" if fault == "bug" else "WARNING"}
        later = one.client()
        await later.begin()
        store.up()
        await until(lambda: not unreported_in(one.manager))
        for each in (client, later):
            assert await store.expiry(each.session_id) == DAY
        # It has recovered: the next one is reported at once.
        another = one.client()
        touches = store.counts()["touch"]
        await another.begin()
        await until(lambda: store.counts()["touch"] > touches)


async def test_what_a_failed_report_held_counts_from_its_first_activity_on(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        await client.request("tools/list")
        touch = store.hold("touch")
        async with anyio.create_task_group() as tasks:

            async def failing() -> None:
                with pytest.raises(RuntimeError, match="a bug"):
                    await report(one)

            tasks.start_soon(failing)
            await touch.wait_entered()
            # More activity, while the report that is going to fail is under way.
            clock.advance(timedelta(minutes=10))
            await client.request("tools/list")
            touch.fail(RuntimeError("a bug"))
        store.up()
        clock.advance(timedelta(minutes=1))
        await report(one)
        activity = told(store.touches[-1], client.session_id)
        assert 660 <= activity.first_age < 660 + LATE
        assert 60 <= activity.last_age < 60 + LATE


@pytest.mark.parametrize("used_since", [True, False])
async def test_reports_that_fail_at_once_lose_nothing(store: FaultyStore, clock: Clock, used_since: bool) -> None:
    # The background task's, and the one that the watch asks for after an outage.
    async with instance(store, end_within=NO_POLL) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(hours=2))
        await client.request("tools/list")
        touch = store.hold("touch")

        async def failing() -> None:
            with pytest.raises(RuntimeError, match="a bug"):
                await activity_of(one.manager).report(everything=True)

        async with anyio.create_task_group() as tasks:
            for calls in (1, 2, 3):
                tasks.start_soon(failing)
                await until(lambda calls=calls: touch.calls == calls)  # type: ignore[misc]
                clock.advance(timedelta(minutes=10))
                if calls < 3 or used_since:
                    await client.request("tools/list")
            if not used_since:
                # Nobody can look up any more when it was used.
                await one.terminate(str(client.session_id))
                await until(lambda: one.residents == 0)
            touch.fail(RuntimeError("a bug"))
        store.up()
        clock.advance(timedelta(minutes=1))
        await report(one)
        activity = told(store.touches[-1], client.session_id)
        assert 1860 <= activity.first_age < 1860 + LATE
        last = 60 if used_since else 660
        assert last <= activity.last_age < last + LATE


async def test_an_activity_in_time_counts_when_it_is_reported_late(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, end_within=NO_POLL) as one:
        await one.first_poll()
        client = one.client()
        await client.initialize()
        store.down("touch")
        await client.notify("notifications/initialized")
        await client.request("tools/list")
        await until(lambda: store.counts()["touch"] > 0)
        clock.advance(timedelta(minutes=12))
        store.up()
        await until(lambda: not unreported_in(one.manager))
        record = await store.record(str(client.session_id))
        assert record is not None
        assert record.expires_at == record.last_seen_at + DAY


async def test_an_activity_of_a_session_that_has_left_memory_is_reported(store: FaultyStore) -> None:
    async with instance(store) as one:
        await one.first_poll()
        client = one.client()
        await client.initialize()
        touch = store.hold("touch")
        await client.notify("notifications/initialized")
        await client.request("tools/list")
        await one.terminate(str(client.session_id))
        await until(lambda: one.residents == 0)
        touch.release()
        await until(lambda: not unreported_in(one.manager))
    assert await store.expiry(client.session_id) == DAY


async def test_an_activity_that_was_held_back_is_reported_when_its_session_leaves_memory(
    store: FaultyStore, clock: Clock
) -> None:
    async with instance(store, end_within=NO_POLL, evict_after=None) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        clock.advance(timedelta(minutes=30))
        await client.request("tools/list")
        await report(one)
        assert store.touches == []
        await one.terminate(str(client.session_id))
        await until(lambda: one.residents == 0)
        await report(one)
        assert told(store.touches[0], client.session_id)


# What a report learns


async def test_the_copy_of_a_session_that_turns_out_to_be_over_leaves_memory(
    store: FaultyStore, sessions: Sessions, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "LAST_ANSWERS", PATIENCE)
    ends: list[EndReason] = []

    async def on_end(_record: Any, reason: EndReason) -> None:
        ends.append(reason)

    async with instance(store, on_end=on_end, json_response=json_response) as one:
        client = one.client()
        await client.begin()
        await reported(one, store)
        stream = await client.get_stream()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        # The store is always right: whatever the instance believes of the time that has passed.
        sessions.ahead = timedelta(hours=25)
        await activity_of(one.manager).report(everything=True)
        await ender_of(one.manager).verify()
        await stream.end()
        answer = await call.answer()
        assert answer.error["message"] == "Session ended"
        await until(lambda: one.notes.waiting == 0)
        assert (await client.request("tools/list")).status == 404
        await until(lambda: ends != [])
        assert ends == [EndReason.EXPIRED]
        assert one.residents == 0
        one.assert_seats_match()


async def test_a_report_learns_which_sessions_have_expired(store: FaultyStore, sessions: Sessions) -> None:
    ends: list[EndReason] = []

    async def on_end(_record: Any, reason: EndReason) -> None:
        ends.append(reason)

    async with instance(store, end_within=3600, on_end=on_end) as one:
        expired, live = one.client(), one.client()
        await expired.begin()
        await live.begin()
        await reported(one, store)
        # Due, without the time that would have the poll verify all.
        for session in registry_of(one.manager):
            session.lifetime.reported_at -= 7200
        stream = await expired.get_stream()
        await live.request("tools/list")
        # What this instance does not know of, such as a policy that another one has.
        row = rows_of(sessions)[session_key(str(expired.session_id))]
        row.record = dataclasses.replace(row.record, expires_at=row.record.created_at)
        await report(one)
        await stream.end()
        assert (await expired.request("tools/list")).status == 404
        assert (await live.request("tools/list")).status == 200
        await until(lambda: ends != [])
    assert ends == [EndReason.EXPIRED]


# Shutdown


async def test_shutdown_reports_what_has_not_been_reported(store: FaultyStore) -> None:
    async with instance(store) as one:
        await one.first_poll()
        client = one.client()
        store.down("touch")
        await client.begin()
        await until(lambda: store.counts()["touch"] > 0)
        store.up()
    assert await store.expiry(client.session_id) == DAY


async def test_shutdown_reports_when_each_session_was_last_used(store: FaultyStore, clock: Clock) -> None:
    async with anyio.create_task_group() as outside, instance(store, end_within=NO_POLL) as one:
        used, streaming = one.client(), Client(one.app, outside)
        ended = Client(one.app, outside)
        for client in (used, streaming, ended):
            await client.begin()
        await reported(one, store)
        clock.advance(timedelta(minutes=5))
        for client in (used, streaming, ended):
            await client.request("tools/list")
        await streaming.get_stream()
        stream = await ended.get_stream()
        clock.advance(timedelta(minutes=5))
        stream.disconnect()
        await stream.end()
        clock.advance(timedelta(minutes=1))
    (touch,) = store.touches
    assert told(touch, streaming.session_id).last_age < LATE
    assert 360 <= told(touch, used.session_id).last_age < 360 + LATE
    assert 60 <= told(touch, ended.session_id).last_age < 60 + LATE


@pytest.mark.parametrize("fault", ["down", "slow"])
async def test_shutdown_with_activity_waits_for_a_store_that_fails_no_longer_than_its_bound(
    store: FaultyStore, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.stopping.SHUTDOWN_TIMEOUT", 0.05)
    with anyio.fail_after(30):
        async with instance(store) as one:
            client = one.client()
            await client.begin()
            await reported(one, store)
            await client.request("tools/list")
            if fault == "down":
                store.down("touch")
            else:
                store.hold("touch")
    assert store.counts()["touch"] == 1
    if fault == "down":
        assert "activity" in caplog.text


async def test_shutdown_loses_no_report_that_is_under_way(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = store.hold("touch")

    async def fails_meanwhile(shut_down: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shut_down)
            await anyio.wait_all_tasks_blocked()
            touch.fail(StoreUnavailable("the connection broke"))

    replace_shutdown(monkeypatch, fails_meanwhile)
    async with instance(store) as one:
        await one.first_poll()
        client = one.client()
        await client.initialize()
        await client.notify("notifications/initialized")
        await client.request("tools/list")
        await touch.wait_entered()
        store.up()
        # It has left memory: nothing but the report that hangs knows of its activity.
        await one.terminate(str(client.session_id))
        await until(lambda: one.residents == 0)
    assert await store.expiry(client.session_id) == DAY


# The interval


@pytest.mark.parametrize(
    ("requested", "idle", "interval"),
    [
        (None, DAY, 15.0),
        (None, timedelta(seconds=20), 5.0),
        (None, None, 15.0),
        (900, None, 900.0),
        (5, timedelta(seconds=20), 5.0),
        (0.5, DAY, 0.5),
    ],
)
def test_the_interval_fits_the_idle_time(requested: float | None, idle: timedelta | None, interval: float) -> None:
    assert checked_interval(requested, RetentionPolicy(idle=idle)) == interval


@pytest.mark.parametrize("interval", [5.01, 0, -1, float("nan"), float("inf"), True, "5"])
def test_an_interval_that_cannot_work_is_refused_by_name(store: FaultyStore, interval: Any) -> None:
    store.retention = RetentionPolicy(idle=timedelta(seconds=20))
    with pytest.raises(ConfigurationError, match="activity_interval"):
        manager_module.DurableSessionManager(Notes().server, store, activity_interval=interval)


def test_an_interval_is_checked_against_the_idle_time_that_is_given_with_it(store: FaultyStore) -> None:
    with pytest.raises(ConfigurationError, match="quarter"):
        manager_module.DurableSessionManager(Notes().server, store, session_idle_timeout=8, activity_interval=2.5)
    manager_module.DurableSessionManager(Notes().server, store, session_idle_timeout=8)
    assert checked_interval(None, store.retention) == 2.0


async def test_the_interval_follows_a_policy_that_another_app_on_the_store_has_set(store: FaultyStore) -> None:
    notes = Notes()
    first = durable_app(notes.server, store)
    durable_app(Notes().server, store, session_idle_timeout=8)
    async with running(first):
        manager = notes.server.session_manager
        assert isinstance(manager, manager_module.DurableSessionManager)
        assert activity_of(manager).interval == 2.0
