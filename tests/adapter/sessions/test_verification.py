"""What this process may not have heard of: sessions that ended while it was paused, cut off, or when a clock jumped."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EndReason, RetentionPolicy, session_key
from mcp_session_store.adapter import clock, routing
from mcp_session_store.adapter.sessions import changes
from tests.support.asgi import PATIENCE, until
from tests.support.instances import instance
from tests.support.internals import changes_of, has_polled
from tests.support.stateful import Stateful, set_level

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.asgi import Client
    from tests.support.faulty_stores import FaultyStore, Sessions
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

WITHIN = 1000.0
"""`end_within` of the instances, so long that they tick and poll when the test says so."""
DAY = timedelta(days=1)


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for a process that does not run; nothing else looks at this clock."""
    ahead = 0.0
    real = clock.now

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    for module in (changes, routing):
        monkeypatch.setattr(module, "now", lambda: real() + ahead)
    return advance


async def is_served(client: Client) -> bool:
    """Whether a session is served; if not, it is refused as in an outage."""
    answer = await client.ping()
    assert answer.status in (200, 503)
    return answer.status == 200 and "error" not in answer.messages[0]


async def settled(one: Instance) -> None:
    """Wait for the first poll, which would otherwise come in between."""
    await one.at_rest()
    await until(lambda: has_polled(one.manager))


async def test_a_session_is_verified_before_it_is_served_after_a_pause(
    store: FaultyStore, other_store: FaultyStore, advance: Callable[[float], None]
) -> None:
    store.hints = False  # a notification makes it poll
    async with instance(store, end_within=WITHIN) as one:
        ended, live = one.client(), one.client()
        ended_id = await ended.handshake()
        await live.handshake()
        await settled(one)
        store.calls.clear()
        assert await other_store.end(session_key(ended_id), reason=EndReason.OPERATOR)
        advance(WITHIN - 1)
        assert (await ended.ping()).status == (await live.ping()).status == 200
        assert "load" not in store.calls
        advance(2)
        # Before anything else of this process runs.
        assert (await ended.ping()).status == 404
        assert (await live.ping()).status == 200
        assert store.counts()["load"] == 2
        # Until a poll has succeeded that began after the pause. The tick has one begin soon.
        held = store.hold("changes")
        await changes_of(one.manager).tick()
        assert (await live.ping()).status == 200
        assert store.counts()["load"] == 3
        held.release()
        await changes_of(one.manager).poll()
        assert (await live.ping()).status == 200
        assert store.counts()["load"] == 3
        await until(lambda: one.residents == 1)


async def test_a_copy_that_missed_a_change_in_a_pause_is_restored(
    store: FaultyStore, other_store: FaultyStore, advance: Callable[[float], None]
) -> None:
    store.hints = False  # a notification makes it poll
    async with (
        instance(store, Stateful(), end_within=WITHIN) as one,
        instance(other_store, Stateful(), end_within=WITHIN) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        await settled(one)
        await set_level(two.client(session_id), "debug")
        advance(WITHIN + 1)
        assert (await client.ping()).status == 200
        assert len(one.notes.replayed("logging/setLevel")) == 1
        one.assert_seats_match()


async def test_a_poll_that_was_under_way_in_a_pause_verifies_nothing(
    store: FaultyStore, advance: Callable[[float], None]
) -> None:
    async with instance(store, end_within=WITHIN) as one:
        client = one.client()
        await client.handshake()
        await settled(one)

        async def pause() -> None:
            advance(WITHIN + 1)

        store.before("changes", pause)
        await changes_of(one.manager).poll()
        # Another one begins soon.
        store.hold("changes")
        store.calls.clear()
        assert (await client.ping()).status == 200
        assert store.counts()["load"] == 1


async def test_an_outage_alone_is_no_pause_and_one_after_a_pause_refuses(
    store: FaultyStore, advance: Callable[[float], None]
) -> None:
    async with instance(store, end_within=WITHIN, outage_patience=0) as one:
        client = one.client()
        await client.handshake()
        await settled(one)
        store.down()
        for _ in range(20):
            advance(WITHIN / 2)
            await changes_of(one.manager).tick()
            assert (await client.ping()).status == 200
        advance(WITHIN + 1)
        assert not await is_served(client)
        store.up()
        assert await is_served(client)


async def test_copies_that_could_not_be_verified_for_long_wait_where_that_is_set(
    store: FaultyStore, advance: Callable[[float], None]
) -> None:
    async with instance(store, end_within=WITHIN, serve_unverified_for=3 * WITHIN, outage_patience=0) as one:
        client = one.client()
        await client.handshake()
        await settled(one)
        store.down()
        for _ in range(5):
            advance(WITHIN / 2)
            await changes_of(one.manager).tick()
            assert await is_served(client)
        advance(WITHIN / 2 + 1)
        assert not await is_served(client)
        store.up()
        await changes_of(one.manager).poll()
        store.down()
        assert await is_served(client)


async def test_a_jump_of_the_stores_clock_ends_what_expired_by_it(
    store: FaultyStore, other_store: FaultyStore, sessions: Sessions
) -> None:
    async with instance(store, end_within=WITHIN) as one, instance(other_store, end_within=WITHIN) as other:
        client, unused = one.client(), other.client()
        await client.handshake()
        await unused.handshake()
        assert (await client.ping()).status == 200
        await settled(one)
        await changes_of(one.manager).poll()
        sessions.ahead += 2 * DAY
        while (await other_store.sweep()).more:
            pass
        # No change tells of it, because it was used too long ago.
        assert (await client.ping()).status == 200
        await changes_of(one.manager).poll()
        assert one.residents == 0
        assert (await client.ping()).status == 404


async def test_a_clock_that_goes_back_or_drifts_a_little_costs_nothing(store: FaultyStore, sessions: Sessions) -> None:
    async with instance(store, end_within=WITHIN) as one:
        client = one.client()
        await client.handshake()
        await settled(one)
        await changes_of(one.manager).poll()
        store.calls.clear()
        for jump in (timedelta(seconds=0.5), -DAY, timedelta(seconds=0.5)):
            sessions.ahead += jump
            await changes_of(one.manager).poll()
        assert "touch" not in store.calls
        sessions.ahead += DAY
        await changes_of(one.manager).poll()
        assert "touch" in store.calls
        assert (await client.ping()).status == 200


async def test_a_session_that_was_swept_by_a_shorter_policy_ends_here(
    store: FaultyStore, other_store: FaultyStore, sessions: Sessions
) -> None:
    async with instance(store, end_within=WITHIN) as one:
        client = one.client()
        session_id = await client.handshake()
        await settled(one)
        other_store.inner.retention = RetentionPolicy(idle=timedelta(seconds=0.04))
        assert await other_store.claim(session_key(session_id), instance="other", restores=0) is not None
        with anyio.fail_after(PATIENCE):
            while not (await other_store.inner.sweep()).expired:
                await anyio.sleep(0.01)
        await changes_of(one.manager).poll()
        assert (await client.ping()).status == 404
