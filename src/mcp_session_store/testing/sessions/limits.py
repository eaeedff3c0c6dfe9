"""Cases of the suite for session stores: limits on the number of sessions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.errors import SessionConflict, SessionLimitReached
from mcp_session_store.records import Change, EndReason, Principal, SessionRecord
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import MakeStore, StoreSuite, with_policy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.store import SessionStore


class Limits(StoreSuite):
    """Limits on the number of sessions."""

    async def _open_in_order(self, store: SessionStore, count: int, **changes: Any) -> list[UUID]:
        keys = []
        for _ in range(count):
            keys.append((await store.create(new_session(**changes))).key)
            await asyncio.sleep(0.002)  # a clock may show whole milliseconds
        return keys

    async def _live_among(self, store: SessionStore, keys: Sequence[UUID]) -> list[UUID]:
        return [key for key in keys if await store.load(key) is not None]

    async def test_a_principals_session_too_many_ends_the_one_that_was_not_seen_for_longest(
        self, make_store: MakeStore
    ) -> None:
        store = with_policy(make_store, RetentionPolicy(per_principal=3))
        others = await self._open_in_order(store, 3, principal=Principal.of(client_id="another"))
        nobodys = await self._open_in_order(store, 4, principal=None)
        keys = await self._open_in_order(store, 3)
        await store.touch([Activity(key=keys[0], first_age=0.0, last_age=0.0)])
        since = (await store.changes(None)).until
        (newest,) = await self._open_in_order(store, 1)
        assert await self._live_among(store, [*keys, newest]) == [keys[0], keys[2], newest]
        assert (await store.changes(since)).changes == [Change(key=keys[1], revision=0, ended=EndReason.LIMIT)]
        assert await self._live_among(store, [*others, *nobodys]) == [*others, *nobodys]

    async def test_a_limit_that_was_lowered_is_kept_from_the_next_session_on(self, make_store: MakeStore) -> None:
        keys = await self._open_in_order(make_store("default"), 5)
        store = with_policy(make_store, RetentionPolicy(per_principal=2))
        (newest,) = await self._open_in_order(store, 1)
        assert await self._live_among(store, [*keys, newest]) == [keys[4], newest]

    async def test_a_principals_session_too_many_is_refused_when_the_policy_says_so(
        self, make_store: MakeStore
    ) -> None:
        store = with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess="refuse"))
        keys = await self._open_in_order(store, 2)
        refused = new_session()
        with pytest.raises(SessionLimitReached):
            await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == keys
        await store.create(new_session(principal=Principal.of(client_id="another")))
        await store.create(new_session(principal=None))
        await store.end(keys[0], reason=EndReason.CLIENT)
        await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == [keys[1], refused.key]

    @pytest.mark.parametrize("excess", ["end_oldest", "refuse"])
    async def test_ended_and_expired_sessions_do_not_count_for_a_principal(
        self, make_store: MakeStore, excess: Any
    ) -> None:
        store = with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess=excess))
        ended, expired = await self._open_in_order(store, 2)
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        keys = await self._open_in_order(store, 2)
        assert await self._live_among(store, keys) == keys

    @pytest.mark.parametrize("excess", ["end_oldest", "refuse"])
    async def test_to_create_the_same_session_again_ends_nobody(self, make_store: MakeStore, excess: Any) -> None:
        store = with_policy(make_store, RetentionPolicy(per_principal=2, per_principal_excess=excess))
        sessions = [new_session(), new_session()]
        for session in sessions:
            await store.create(session)
        for _ in range(3):
            await asyncio.gather(*map(store.create, sessions))
        keys = [session.key for session in sessions]
        assert await self._live_among(store, keys) == keys

    async def test_of_many_sessions_that_a_principal_opens_at_once_as_many_live_as_may(
        self, make_store: MakeStore
    ) -> None:
        stores = [with_policy(make_store, RetentionPolicy(per_principal=3)) for _ in range(2)]
        sessions = [new_session(principal=Principal.of(client_id=str(number % 2))) for number in range(20)]
        records = await asyncio.gather(
            *(stores[number // 2 % 2].create(session) for number, session in enumerate(sessions))
        )
        assert [record.key for record in records] == [session.key for session in sessions]
        for client in range(2):
            live = await self._live_among(stores[0], [session.key for session in sessions[client::2]])
            assert len(live) == 3

    async def test_of_many_sessions_that_are_opened_at_once_those_too_many_are_refused(
        self, make_store: MakeStore
    ) -> None:
        policy = RetentionPolicy(per_principal=3, per_principal_excess="refuse", anonymous=4)
        stores = [with_policy(make_store, policy) for _ in range(2)]
        sessions = [new_session(principal=Principal.of(client_id="a") if number % 2 else None) for number in range(20)]
        outcomes = await asyncio.gather(
            *(stores[number // 2 % 2].create(session) for number, session in enumerate(sessions)),
            return_exceptions=True,
        )
        refused = [isinstance(outcome, SessionLimitReached) for outcome in outcomes]
        assert (refused[0::2].count(False), refused[1::2].count(False)) == (4, 3)
        live = await self._live_among(stores[0], [session.key for session in sessions])
        assert live == [outcome.key for outcome in outcomes if isinstance(outcome, SessionRecord)]

    async def test_sessions_without_a_principal_are_limited_with_their_tombstones(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(anonymous=3))
        keys = await self._open_in_order(store, 3, principal=None)
        await store.end(keys[0], reason=EndReason.CLIENT)
        await self.expire(store, keys[1])
        session = new_session(principal=None)
        with pytest.raises(SessionLimitReached):
            await store.create(session)
        assert await self._live_among(store, [*keys, session.key]) == [keys[2]]
        await store.create(new_session())
        assert await store.load(keys[2]) == await store.create(new_session(key=keys[2], principal=None))

    async def test_old_tombstones_make_room_for_sessions_without_a_principal(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(anonymous=3, tombstone=None))
        theirs = await self._ended_two_days_ago(store)
        for _ in range(2):
            await self._ended_two_days_ago(store, principal=None)
        keys = await self._open_in_order(store, 3, principal=None)
        refused = new_session(principal=None)
        with pytest.raises(SessionLimitReached):
            await store.create(refused)
        assert await self._live_among(store, [*keys, refused.key]) == keys
        with pytest.raises(SessionConflict):
            await store.create(theirs)

    async def test_a_limit_of_no_sessions_without_a_principal_lets_none_in(self, make_store: MakeStore) -> None:
        store = with_policy(make_store, RetentionPolicy(anonymous=0))
        with pytest.raises(SessionLimitReached):
            await store.create(new_session(principal=None))
        await store.create(new_session())
