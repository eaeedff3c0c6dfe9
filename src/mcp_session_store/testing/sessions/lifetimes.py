"""Cases of the suite for session stores: expiry, activity that extends a session, and ends."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason, SessionRecord
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.store import Absence
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import (
    POLICIES,
    UNLIMITED,
    MakeStore,
    StoreSuite,
    assert_expires_by,
    with_policy,
)

if TYPE_CHECKING:
    from mcp_session_store.store import SessionStore


class Lifetimes(StoreSuite):
    """Expiry, activity that extends a session, and ends."""

    async def test_an_expired_session_is_not_found(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        assert await store.load(session.key) is None

    async def test_an_ended_session_is_not_found(self, store: SessionStore) -> None:
        session, other = new_session(), new_session()
        await store.create(session)
        created = await store.create(other)
        assert await store.end(session.key, reason=EndReason.CLIENT) is True
        assert await store.load(session.key) is None
        assert await store.load(other.key) == created

    async def test_a_store_says_why_a_session_is_not_live_or_nothing(self, store: SessionStore) -> None:
        live, ended, expired = new_session(), new_session(), new_session()
        for session in (live, ended, expired):
            await store.create(session)
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        assert await store.find(uuid.uuid4()) is Absence.UNKNOWN
        assert await store.find(ended.key) in (Absence.ENDED, Absence.UNKNOWN)
        assert await store.find(expired.key) in (Absence.EXPIRED, Absence.UNKNOWN)
        found = await store.find(live.key)
        assert isinstance(found, SessionRecord)
        assert found == await store.load(live.key)

    async def test_a_session_ends_once(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        assert await store.end(session.key, reason=EndReason.CLIENT) is True
        assert await store.end(session.key, reason=EndReason.OPERATOR) is False

    async def test_of_many_who_end_a_session_at_once_one_ended_it(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        outcomes = await asyncio.gather(*(store.end(session.key, reason=EndReason.CLIENT) for _ in range(20)))
        assert sum(outcomes) == 1

    async def test_an_unknown_or_expired_session_cannot_be_ended(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await self.expire(store, session.key)
        assert await store.end(session.key, reason=EndReason.CLIENT) is False
        assert await store.end(uuid.uuid4(), reason=EndReason.CLIENT) is False

    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    async def test_after_activity_a_session_expires_as_the_policy_says(
        self, make_store: MakeStore, policy: RetentionPolicy
    ) -> None:
        store = with_policy(make_store, policy)
        created = await store.create(new_session())
        assert (await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])).not_live == set()
        record = await store.load(created.key)
        assert record is not None
        assert_expires_by(policy, record)
        assert record.last_seen_at >= created.last_seen_at
        assert record.created_at == created.created_at

    async def test_an_activity_without_a_use_claims_and_extends_nothing(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(idle=timedelta(days=1)))
        created = await store.create(new_session())
        claim = Activity(key=created.key, first_age=0.0, last_age=0.0, claimed_by="instance-b", restores=1, used=False)
        assert (await store.touch([claim])).not_live == set()
        record = await store.load(created.key)
        assert record is not None
        assert (record.instance_hint, record.restores) == ("instance-b", 1)
        assert (record.last_seen_at, record.expires_at) == (created.last_seen_at, created.expires_at)

    async def test_a_report_that_comes_later_than_the_idle_time_extends_nothing_to_now(
        self, make_store: MakeStore
    ) -> None:
        store = with_policy(make_store, RetentionPolicy(idle=timedelta(milliseconds=40)))
        unlimited = with_policy(make_store, UNLIMITED)
        created = await unlimited.create(new_session())
        await asyncio.sleep(0.05)
        assert (await store.touch([Activity(key=created.key, first_age=0.05, last_age=0.05)])).not_live == {created.key}
        assert await store.load(created.key) is None

    async def test_no_activity_extends_a_session_beyond_its_absolute_lifetime(self, make_store: MakeStore) -> None:
        unlimited = with_policy(make_store, UNLIMITED)
        store = with_policy(make_store, RetentionPolicy(idle=None, absolute=timedelta(milliseconds=20)))
        created = await unlimited.create(new_session())
        await asyncio.sleep(0.03)
        assert (await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])).not_live == {created.key}
        assert await store.load(created.key) is None

    async def test_activity_before_the_expiry_counts_when_it_is_reported_after(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert (await store.touch([Activity(key=created.key, first_age=60.0, last_age=0.0)])).not_live == set()
        assert await store.load(created.key) is not None

    async def test_activity_after_the_expiry_revives_nothing(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await self.expire(store, created.key)
        assert (await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])).not_live == {created.key}
        assert await store.load(created.key) is None

    async def test_last_seen_never_goes_back(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await store.touch([Activity(key=created.key, first_age=7200.0, last_age=3600.0)])
        record = await store.load(created.key)
        assert record is not None
        assert record.last_seen_at == created.last_seen_at

    async def test_activity_is_dated_by_its_age(self, store: SessionStore) -> None:
        older, newer = await store.create(new_session()), await store.create(new_session())
        await asyncio.sleep(0.1)  # last_seen_at never goes back, so there must be some past to point to
        await store.touch(
            [
                Activity(key=older.key, first_age=0.05, last_age=0.05),
                Activity(key=newer.key, first_age=0.05, last_age=0.0),
            ]
        )
        seen_older, seen_newer = await store.load(older.key), await store.load(newer.key)
        assert seen_older is not None
        assert seen_newer is not None
        assert seen_older.last_seen_at > older.last_seen_at
        assert seen_newer.last_seen_at - seen_older.last_seen_at > timedelta(milliseconds=40)

    async def test_a_touch_tells_which_sessions_are_not_live(self, store: SessionStore) -> None:
        live, ended, expired = [await store.create(new_session()) for _ in range(3)]
        await store.end(ended.key, reason=EndReason.OPERATOR)
        await self.expire(store, expired.key)
        unknown = uuid.uuid4()
        keys = [live.key, ended.key, expired.key, unknown]
        touched = await store.touch([Activity(key=key, first_age=0.0, last_age=0.0) for key in keys])
        assert touched == ({ended.key, expired.key, unknown}, {})

    async def test_a_touch_takes_any_number_of_sessions(self, store: SessionStore) -> None:
        assert await store.touch([]) == (set(), {})
        live = [record.key for record in await asyncio.gather(*(store.create(new_session()) for _ in range(30)))]
        unknown = [uuid.uuid4() for _ in range(1200)]
        activities = [Activity(key=key, first_age=0.0, last_age=0.0) for key in [*unknown, *live]]
        assert (await store.touch(activities)).not_live == set(unknown)
        for key in live:
            record = await store.load(key)
            assert record is not None
            assert_expires_by(store.retention, record)
