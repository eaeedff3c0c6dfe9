"""Cases of the suite for session stores: sweeps of expired sessions and old tombstones."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.errors import SessionConflict
from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy, SweepReport
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import (
    SHORT,
    UNLIMITED,
    MakeStore,
    StoreSuite,
    assert_expires_by,
    sweep_sessions,
    with_policy,
)


class Sweeping(StoreSuite):
    """Sweeps of expired sessions and old tombstones."""

    async def test_a_sweep_ends_what_has_expired_and_nothing_else(self, make_store: MakeStore) -> None:
        store = make_store("default")
        live, expired = await store.create(new_session()), await store.create(new_session())
        await self.expire(store, expired.key)
        store.retention = SHORT
        assert await sweep_sessions(store) == SweepReport(expired=1)
        assert await sweep_sessions(store) == SweepReport()
        assert await store.load(live.key) == live
        assert await store.load(expired.key) is None

    async def test_what_a_sweep_ended_never_lives_again(self, make_store: MakeStore) -> None:
        store = make_store("default")
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        store.retention = SHORT
        await sweep_sessions(store)
        # Activity from before the expiry would have extended it until the sweep.
        assert (await store.touch([Activity(key=session.key, first_age=60.0, last_age=0.0)])).not_live == {session.key}
        assert await store.claim(session.key, instance="instance-b", restores=0) is None
        with pytest.raises(SessionConflict):
            await store.create(session)
        assert await store.load(session.key) is None

    async def test_a_sweep_leaves_alone_what_expired_a_moment_ago(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(idle=timedelta(hours=1)))
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert await sweep_sessions(store) == SweepReport()
        assert (await store.touch([Activity(key=created.key, first_age=60.0, last_age=0.0)])).not_live == set()
        assert await store.load(created.key) is not None

    async def test_a_sweep_removes_old_tombstones_for_good(self, make_store: MakeStore) -> None:
        store = make_store("default")
        old = await self._ended_two_days_ago(store)
        recent = new_session()
        await store.create(recent)
        await store.end(recent.key, reason=EndReason.CLIENT)
        assert await sweep_sessions(store) == SweepReport(purged=1)
        with pytest.raises(SessionConflict):
            await store.create(recent)
        assert (await store.create(old)).key == old.key

    async def test_tombstones_are_kept_for_ever_when_the_policy_says_so(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(tombstone=None))
        old = await self._ended_two_days_ago(store)
        assert await sweep_sessions(store) == SweepReport()
        with pytest.raises(SessionConflict):
            await store.create(old)

    async def test_even_without_tombstones_an_end_is_kept_until_all_have_learned_of_it(
        self, make_store: MakeStore
    ) -> None:
        store = with_policy(make_store, RetentionPolicy(tombstone=timedelta(0)))
        created = await store.create(new_session())
        since = (await store.changes(None)).until
        await store.end(created.key, reason=EndReason.CLIENT)
        assert await sweep_sessions(store) == SweepReport()
        assert [change.key for change in (await store.changes(since)).changes] == [created.key]

    async def test_a_sweep_gives_sessions_without_an_expiry_the_one_that_they_would_have(
        self, make_store: MakeStore
    ) -> None:
        unlimited = with_policy(make_store, UNLIMITED)
        created = [await unlimited.create(new_session()) for _ in range(3)]
        await unlimited.touch([Activity(key=record.key, first_age=0.0, last_age=0.0) for record in created])
        before = [await unlimited.load(record.key) for record in created]
        assert [record and record.expires_at for record in before] == [None] * 3
        policy = RetentionPolicy(idle=timedelta(hours=2), absolute=timedelta(hours=1))
        store = with_policy(make_store, policy)
        assert await sweep_sessions(store, limit=2) == SweepReport()
        for record in created:
            loaded = await store.load(record.key)
            assert loaded is not None
            assert_expires_by(policy, loaded)

    async def test_a_step_of_a_sweep_takes_no_more_than_its_limit(self, make_store: MakeStore) -> None:
        store = make_store("default")
        for _ in range(5):
            await self.expire(store, (await store.create(new_session())).key)
            await self._ended_two_days_ago(store)
        store.retention = SHORT
        assert await store.sweep(limit=3) == SweepReport(expired=3, purged=3, more=True)
        assert await store.sweep(limit=3) == SweepReport(expired=2, purged=2)

    async def test_several_who_sweep_at_once_handle_each_session_once(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(3)]
        for _ in range(20):
            await self.expire(stores[0], (await stores[0].create(new_session())).key)
            await self._ended_two_days_ago(stores[0])
        reports: list[SweepReport] = []
        for store in stores:
            store.retention = SHORT
        for _ in range(100):
            round_of_all = await asyncio.gather(*(store.sweep(limit=4) for store in stores))
            reports += round_of_all
            if round_of_all == [SweepReport()] * 3:
                break
        assert sum(report.expired for report in reports) == 20
        assert sum(report.purged for report in reports) == 20
