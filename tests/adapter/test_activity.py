"""The first activity after the handshake: until then a record lives on borrowed time."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.retention import NEW_SESSION_LIFETIME
from tests.adapter.asgi import until
from tests.adapter.instances import instance
from tests.adapter.stores import FaultyStore, Sessions

if TYPE_CHECKING:
    from datetime import datetime

pytestmark = pytest.mark.anyio


async def expiry(store: FaultyStore, session_id: str | None) -> datetime | None:
    assert session_id is not None
    record = await store.record(session_id)
    assert record is not None
    return record.expires_at


async def test_a_new_record_lives_ten_minutes(store: FaultyStore) -> None:
    async with instance(store) as one:
        session_id = (await one.client().initialize()).session_id
        assert session_id is not None
        record = await store.record(session_id)
        assert record is not None
        assert record.expires_at == record.created_at + NEW_SESSION_LIFETIME
        assert timedelta(minutes=10) == NEW_SESSION_LIFETIME
    # Shutdown is no activity.
    assert await expiry(store, session_id) is not None


@pytest.mark.parametrize("activity", ["initialized", "call", "stream"])
async def test_the_first_activity_makes_a_record_live_on(store: FaultyStore, activity: str) -> None:
    async with instance(store) as one:
        client = one.client()
        await client.initialize()
        if activity == "initialized":
            await client.notify("notifications/initialized")
        elif activity == "call":
            await client.call("add", {"a": 1, "b": 2})
        else:
            await client.get_stream()
        await until(lambda: store.counts()["touch"] == 1)
        assert await expiry(store, client.session_id) is None
        for _ in range(20):
            await client.ping()
    assert store.counts()["touch"] == 1


async def test_first_activities_are_reported_together(store: FaultyStore) -> None:
    async with instance(store) as one:
        clients = [one.client() for _ in range(20)]
        for client in clients:
            await client.initialize()
        exchanges = [client.open_request("ping") for client in clients]
        for exchange in exchanges:
            await exchange.answer()
        await until(lambda: store.counts()["touch"] > 0)
        for client in clients:
            assert await expiry(store, client.session_id) is None
        assert store.counts()["touch"] == 1


@pytest.mark.parametrize("fault", ["down", "bug", "lost"])
async def test_an_activity_that_cannot_be_reported_is_logged_and_reported_again(
    store: FaultyStore, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store) as one:
        client = one.client()
        {"down": store.down, "bug": store.broken, "lost": store.lose_the_answer_of}[fault]("touch")
        await client.handshake()
        await until(lambda: store.counts()["touch"] == 2)
        assert (await client.ping()).status == 200
        failures = [record for record in caplog.records if "activity" in record.getMessage()]
        assert failures
        assert {record.levelname for record in failures} == {"ERROR" if fault == "bug" else "WARNING"}
        later = one.client()
        await later.handshake()
        store.up()
        await until(lambda: not one.manager._first_activities)
        for each in (client, later):
            assert await expiry(store, each.session_id) is None
        # It has recovered: the next one is reported at once.
        another = one.client()
        await another.handshake()
        touches = store.counts()["touch"]
        await until(lambda: store.counts()["touch"] > touches)


async def test_shutdown_reports_what_has_not_been_reported(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        store.down("touch")
        await client.handshake()
        await until(lambda: store.counts()["touch"] > 0)
        store.up()
    assert await expiry(store, client.session_id) is None


async def test_an_activity_of_a_session_that_has_left_memory_is_reported(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        await client.initialize()
        touch = store.hold("touch")
        await client.notify("notifications/initialized")
        await one.terminate(str(client.session_id))
        await until(lambda: one.residents == 0)
        touch.release()
        await until(lambda: not one.manager._first_activities)
    assert await expiry(store, client.session_id) is None


async def test_an_activity_in_time_counts_when_it_is_reported_late() -> None:
    sessions = Sessions()
    store = FaultyStore(sessions)
    async with instance(store) as one:
        client = one.client()
        await client.initialize()
        store.down("touch")
        await client.notify("notifications/initialized")
        await until(lambda: store.counts()["touch"] > 0)
        # A database that was down, not one whose clock has moved: the age of the activity is told.
        (key,) = one.manager._first_activities
        first, last = one.manager._first_activities[key]
        one.manager._first_activities[key] = (first - 720, last - 720)
        sessions.ahead = timedelta(minutes=12)
        store.up()
        await until(lambda: not one.manager._first_activities)
        assert await expiry(store, client.session_id) is None


async def test_the_copy_of_a_session_that_turns_out_to_be_over_leaves_memory(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        await client.initialize()
        store.inner.ahead = timedelta(minutes=11)  # type: ignore[attr-defined]
        assert (await client.notify("notifications/initialized")).status == 202
        await until(lambda: one.residents == 0)
        assert (await client.ping()).status == 404
