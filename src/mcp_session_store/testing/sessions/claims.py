"""Cases of the suite for session stores: claims of sessions by the instances that restore them."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import POLICIES, MakeStore, StoreSuite, assert_expires_by, with_policy

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.store import SessionStore


def _claiming(key: UUID, *, restores: int, instance: str = "instance-b", age: float = 0.0) -> Activity:
    return Activity(key=key, first_age=age, last_age=age, claimed_by=instance, restores=restores)


class Claims(StoreSuite):
    """Claims of sessions by the instances that restore them."""

    async def test_a_claim_counts_the_restore_and_names_the_instance(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        claimed = await store.claim(created.key, instance="instance-b", restores=0)
        assert claimed is not None
        assert (claimed.instance_hint, claimed.restores, claimed.revision) == ("instance-b", 1, 0)
        assert claimed.last_seen_at >= created.last_seen_at
        assert claimed.created_at == created.created_at
        assert await store.load(created.key) == claimed

    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    async def test_a_claimed_session_expires_as_the_policy_says(
        self, make_store: MakeStore, policy: RetentionPolicy
    ) -> None:
        store = with_policy(make_store, policy)
        created = await store.create(new_session())
        claimed = await store.claim(created.key, instance="instance-b", restores=0)
        assert claimed is not None
        assert_expires_by(policy, claimed)

    async def test_a_claim_that_is_repeated_counts_once(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for _ in range(3):
            claimed = await store.claim(created.key, instance="instance-b", restores=0)
            assert claimed is not None
            assert claimed.restores == 1

    async def test_a_later_restore_on_the_same_instance_counts(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for restores in range(3):
            claimed = await store.claim(created.key, instance="instance-a", restores=restores)
            assert claimed is not None
            assert claimed.restores == restores + 1

    async def test_each_of_several_instances_that_claim_at_once_counts(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        created = await stores[0].create(new_session())
        claims = [
            stores[number % 2].claim(created.key, instance=f"instance {number}", restores=0) for number in range(10)
        ]
        claimed = await asyncio.gather(*claims)
        assert sorted(record.restores for record in claimed if record is not None) == list(range(1, 11))
        last = await stores[0].load(created.key)
        assert last is not None
        assert last in claimed
        assert last.restores == 10

    async def test_an_unknown_ended_or_expired_session_cannot_be_claimed(self, store: SessionStore) -> None:
        ended, expired = await store.create(new_session()), await store.create(new_session())
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        for key in (ended.key, expired.key, uuid.uuid4()):
            assert await store.claim(key, instance="instance-b", restores=0) is None
            assert await store.load(key) is None

    async def test_an_activity_that_claims_counts_the_restore_and_names_the_instance(self, store: SessionStore) -> None:
        created, other = await store.create(new_session()), await store.create(new_session())
        plain = Activity(key=other.key, first_age=0.0, last_age=0.0)
        assert (await store.touch([_claiming(created.key, restores=1), plain])).not_live == set()
        claimed, touched = await store.load(created.key), await store.load(other.key)
        assert claimed is not None
        assert (claimed.instance_hint, claimed.restores, claimed.revision) == ("instance-b", 1, 0)
        assert claimed.last_seen_at >= created.last_seen_at
        assert_expires_by(store.retention, claimed)
        assert touched is not None
        assert (touched.instance_hint, touched.restores) == (other.instance_hint, 0)

    async def test_an_activity_without_a_claim_leaves_instance_and_restores_as_they_are(
        self, store: SessionStore
    ) -> None:
        created = await store.create(new_session())
        await store.claim(created.key, instance="instance-b", restores=0)
        await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])
        record = await store.load(created.key)
        assert record is not None
        assert (record.instance_hint, record.restores) == ("instance-b", 1)

    async def test_a_report_with_a_claim_that_is_repeated_counts_once(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for _ in range(3):
            await store.touch([_claiming(created.key, restores=1)])
        record = await store.load(created.key)
        assert record is not None
        assert record.restores == 1

    async def test_later_claims_of_the_same_instance_count(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        for restores in (1, 2, 4):  # two restores were in the last report
            await store.touch([_claiming(created.key, restores=restores)])
            record = await store.load(created.key)
            assert record is not None
            assert record.restores == restores
        claimed = await store.claim(created.key, instance="instance-b", restores=4)
        assert claimed is not None
        assert claimed.restores == 5

    async def test_reports_of_several_instances_that_claim_one_session_count_each(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        created = await stores[0].create(new_session())
        reports = [
            stores[number % 2].touch([_claiming(created.key, restores=1, instance=f"instance {number}")])
            for number in range(10)
        ]
        assert [touched.not_live for touched in await asyncio.gather(*reports)] == [set()] * 10
        record = await stores[0].load(created.key)
        assert record is not None
        assert record.restores == 10

    async def test_activities_of_one_session_are_one_claim(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        claims = [_claiming(created.key, restores=restores) for restores in (1, 2)]
        plain = Activity(key=created.key, first_age=0.0, last_age=0.0)
        await store.touch([plain, *claims, plain])
        record = await store.load(created.key)
        assert record is not None
        assert (record.instance_hint, record.restores) == ("instance-b", 2)

    async def test_a_reported_claim_is_judged_by_its_age(self, store: SessionStore) -> None:
        in_time, late, ended = [await store.create(new_session()) for _ in range(3)]
        await store.end(ended.key, reason=EndReason.CLIENT)
        for key in (in_time.key, late.key):
            await self.expire(store, key)
        report = [
            _claiming(in_time.key, restores=1, age=60.0),
            _claiming(late.key, restores=1),
            _claiming(ended.key, restores=1, age=60.0),
        ]
        # The session in time was used within its life, and so lives on from that use.
        assert (await store.touch(report)).not_live == {late.key, ended.key}
        record = await store.load(in_time.key)
        assert record is not None
        assert (record.instance_hint, record.restores) == ("instance-b", 1)
        assert await store.load(late.key) is None

    async def test_a_load_says_the_time_by_the_clock_of_the_store(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        assert (await store.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])).not_live == set()
        times = []
        for _ in range(2):
            record = await store.load(created.key)
            assert record is not None
            assert record.loaded_at is not None
            assert record.expires_at is not None
            assert record.last_seen_at <= record.loaded_at < record.expires_at
            times.append(record.loaded_at)
            await asyncio.sleep(0.01)
        assert times[0] < times[1]
