"""A new session lives ten minutes, and as the policy says from its first real use on: a ping is none."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.retention import NEW_SESSION_LIFETIME
from tests.support.instances import instance
from tests.support.internals import changes_of, ender_of

if TYPE_CHECKING:
    from datetime import datetime

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

QUIET: dict[str, Any] = {"end_within": 1000.0, "sweep_interval": None}
"""Options of instances that poll and sweep when the test says so."""
DAY = timedelta(hours=24)
SECOND = timedelta(seconds=1)


async def lives_for(store: FaultyStore, session_id: str) -> timedelta:
    record = await store.record(session_id)
    assert record is not None
    expires_at: datetime | None = record.expires_at
    assert expires_at is not None
    return expires_at - record.created_at


async def report(one: Instance) -> None:
    await one.at_rest()
    await ender_of(one.manager).report()


async def test_a_ping_extends_no_life_and_a_request_does(store: FaultyStore) -> None:
    async with instance(store, **QUIET) as one:
        client = one.client()
        session_id = await client.handshake()
        await client.notify("notifications/roots/list_changed")
        for _ in range(3):
            assert (await client.ping()).status == 200
        await report(one)
        await ender_of(one.manager).verify()
        assert await lives_for(store, session_id) == NEW_SESSION_LIFETIME
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        await report(one)
        assert await lives_for(store, session_id) >= DAY
        # From now on a ping is activity as any request.
        record = await store.record(session_id)
        assert record is not None
        assert (await client.ping()).status == 200
        await ender_of(one.manager).verify()
        later = await store.record(session_id)
        assert later is not None
        assert later.last_seen_at > record.last_seen_at


async def test_a_restore_by_a_ping_is_claimed_and_extends_no_life(store: FaultyStore) -> None:
    async with instance(store, **QUIET) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, **QUIET) as one:
        client = one.client(session_id)
        assert (await client.ping()).status == 200
        await report(one)
        record = await store.record(session_id)
        assert record is not None
        assert (record.restores, record.instance_hint) == (1, one.manager.instance)
        assert await lives_for(store, session_id) == NEW_SESSION_LIFETIME
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        await report(one)
        assert await lives_for(store, session_id) >= DAY
    async with instance(store, **QUIET) as one:
        # It was used before.
        assert (await one.client(session_id).ping()).status == 200


async def test_a_session_that_is_only_pinged_expires(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, **QUIET) as one:
        client = one.client()
        await client.handshake()
        await changes_of(one.manager).poll()
        for _ in range(4):
            clock.advance(NEW_SESSION_LIFETIME / 4 + timedelta(seconds=20))
            assert (await client.ping()).status == 200
            await report(one)
        await ender_of(one.manager).sweep()
        await changes_of(one.manager).poll()
        assert (await client.ping()).status == 404


async def test_a_stream_that_stays_open_is_a_use(store: FaultyStore, clock: Clock) -> None:
    async with instance(store, **QUIET) as one:
        client = one.client()
        session_id = await client.handshake()
        stream = await client.get_stream()
        await report(one)
        assert await lives_for(store, session_id) == NEW_SESSION_LIFETIME
        clock.advance(NEW_SESSION_LIFETIME / 2 + SECOND)
        await report(one)
        assert await lives_for(store, session_id) >= DAY
        stream.disconnect()
