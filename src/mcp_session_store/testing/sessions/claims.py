"""Cases of the suite for session stores: claims of sessions by the instances that restore them."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.records import EndReason
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import POLICIES, MakeStore, StoreSuite, assert_expires_by, with_policy

if TYPE_CHECKING:
    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.store import SessionStore


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
