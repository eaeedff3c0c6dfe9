"""Cases of the suite for session stores: claims of streams by the instances on which they are opened."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from mcp_session_store.activity import Activity, StreamClaim
from mcp_session_store.records import EndReason
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import MakeStore, StoreSuite

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.activity import StreamHolder
    from mcp_session_store.store import SessionStore

Held = tuple[int, int, "int | None"]
"""Number, term and former holder."""


async def claim_stream(
    store: SessionStore, key: UUID, number: int, *, age: float = 0.0, term: int = 0, used: bool = True
) -> StreamHolder | None:
    """Report that an instance has the stream of a session, and return who has it then."""
    await asyncio.sleep(0.002)  # a clock may show whole milliseconds
    claim = StreamClaim(number=number, age=age, term=term)
    touched = await store.touch([Activity(key=key, first_age=age, last_age=0.0, used=used, stream=claim)])
    assert touched.streams.keys() | touched.not_live == {key}
    return touched.streams.get(key)


class Streams(StoreSuite):
    """Claims of streams by the instances on which they are opened."""

    async def _held(self, store: SessionStore, key: UUID, number: int, *, age: float = 0.0, term: int = 0) -> Held:
        holder = await claim_stream(store, key, number, age=age, term=term)
        assert holder is not None
        return holder[:3]

    async def test_the_instance_that_claims_a_stream_first_has_it(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        assert await self._held(store, key, 7) == (7, 1, None)

    async def test_a_stream_that_is_opened_later_elsewhere_is_taken(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        assert await self._held(store, key, 7, age=5.0) == (7, 1, None)
        assert await self._held(store, key, 8, age=4.0) == (8, 2, 7)
        assert await self._held(store, key, 9, age=3.0) == (9, 3, 8)
        assert await self._held(store, key, 7, age=2.0) == (7, 4, 9)

    async def test_a_claim_that_is_repeated_has_the_same_answer(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 7, age=5.0)
        for age in (4.0, 4.01, 3.99):  # ages are not exact
            assert await self._held(store, key, 8, age=age) == (8, 2, 7)

    async def test_a_stream_that_is_opened_again_on_the_same_instance_is_not_taken(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 7, age=90.0)
        for age in (80.0, 50.0, 10.0):
            assert await self._held(store, key, 8, age=age) == (8, 2, 7)
        # It counts as opened then all the same.
        assert await self._held(store, key, 9, age=30.0) == (8, 2, 7)
        assert await self._held(store, key, 9, age=0.0) == (9, 3, 8)

    async def test_a_claim_that_comes_late_takes_no_stream_that_was_opened_later(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 8, age=1.0)
        assert await self._held(store, key, 7, age=30.0) == (8, 1, None)
        assert await self._held(store, key, 8, age=1.0) == (8, 1, None)

    async def test_the_holder_of_the_present_term_may_change_its_number(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 7, age=9.0)
        await claim_stream(store, key, 8, age=8.0)
        assert await self._held(store, key, 18, age=8.0, term=2) == (18, 2, 7)
        # The stream was opened when it was.
        assert await self._held(store, key, 9, age=7.0) == (9, 3, 18)

    async def test_a_claim_of_a_former_term_takes_nothing(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 7, age=9.0)
        await claim_stream(store, key, 8, age=8.0)
        for number in (7, 17):
            assert await self._held(store, key, number, age=0.0, term=1) == (8, 2, 7)
        assert await self._held(store, key, 8, age=8.0, term=2) == (8, 2, 7)

    async def test_activity_without_a_claim_leaves_the_holder(self, store: SessionStore) -> None:
        key, other = [(await store.create(new_session())).key for _ in range(2)]
        await claim_stream(store, key, 7)
        plain = Activity(key=key, first_age=0.0, last_age=0.0)
        assert await store.touch([plain]) == (set(), {})
        claim = Activity(key=other, first_age=0.0, last_age=0.0, stream=StreamClaim(number=8, age=0.0))
        touched = await store.touch([plain, claim])
        assert touched.streams.keys() == {other}
        assert await self._held(store, key, 7) == (7, 1, None)

    async def test_a_claim_of_a_stream_claims_a_restore_as_well(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        activity = Activity(
            key=key,
            first_age=0.0,
            last_age=0.0,
            claimed_by="instance-b",
            restores=1,
            stream=StreamClaim(number=7, age=0.0),
        )
        for _ in range(2):
            touched = await store.touch([activity])
            assert touched.streams[key][:3] == (7, 1, None)
        record = await store.load(key)
        assert record is not None
        assert (record.instance_hint, record.restores) == ("instance-b", 1)

    async def test_a_claim_of_a_stream_without_a_use_extends_nothing(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await claim_stream(store, created.key, 7, used=False)
        record = await store.load(created.key)
        assert record is not None
        assert (record.last_seen_at, record.expires_at) == (created.last_seen_at, created.expires_at)
        assert await self._held(store, created.key, 8) == (8, 2, 7)

    async def test_several_activities_of_one_session_claim_the_newest_stream(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        claims = [None, StreamClaim(number=7, age=5.0), StreamClaim(number=8, age=2.0), None]
        touched = await store.touch([Activity(key=key, first_age=9.0, last_age=0.0, stream=claim) for claim in claims])
        assert touched.streams[key][:3] == (8, 1, None)

    async def test_a_session_that_is_not_live_has_no_holder(self, store: SessionStore) -> None:
        ended, expired = [(await store.create(new_session())).key for _ in range(2)]
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        for key in (ended, expired, uuid.uuid4()):
            assert await claim_stream(store, key, 7) is None

    async def test_of_many_claims_at_once_each_stream_has_one_holder(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        keys = [(await stores[0].create(new_session())).key for _ in range(20)]

        async def claim(number: int) -> dict[UUID, StreamHolder]:
            stream = StreamClaim(number=number, age=90.0 - 10 * number)
            activities = [Activity(key=key, first_age=90.0, last_age=0.0, stream=stream) for key in keys]
            return dict((await stores[number % 2].touch(activities)).streams)

        claimed = await asyncio.gather(*(claim(number) for number in range(1, 7)))
        for key in keys:
            holders = [streams[key] for streams in claimed]
            # The one that was opened last took it at some time, and each term has had one holder.
            assert holders[-1].number == 6
            assert len({(holder.term, holder.number) for holder in holders}) == len({holder.term for holder in holders})
            assert await self._held(stores[0], key, 6) == holders[-1][:3]

    async def test_a_stream_of_another_namespace_is_not_claimed(self, make_store: MakeStore) -> None:
        mine, theirs = make_store("mine"), make_store("theirs")
        key = (await theirs.create(new_session())).key
        assert await claim_stream(mine, key, 7) is None
        assert await self._held(theirs, key, 8) == (8, 1, None)
