"""Cases of the suite for stores of state: values that the record carries, and whose changes copies learn of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_session_store.records import Change
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class Watching(StateSuite):
    """Values that the record carries, and whose changes copies learn of."""

    async def _watched(self, store: SessionStore, key: UUID) -> tuple[dict[str, str] | None, int]:
        record = await store.load(key)
        assert record is not None
        return None if record.watched is None else dict(record.watched), record.revision

    async def test_a_load_carries_the_watched_values(self, make_state: MakeState) -> None:
        (here, state), (there, _) = make_state(), make_state()
        key, other = await self._opened(here), await self._opened(here)
        assert await self._watched(there, key) == (None, 0)
        await self._put(state, key, "plain", "0")
        assert await self._watched(there, key) == (None, 0)
        await self._put(state, key, "a", '{"x": "\\u0000"}', watched=True)
        await self._put(state, key, "é", "2", watched=True)
        assert await self._watched(there, key) == ({"a": '{"x": "\\u0000"}', "é": "2"}, 2)
        await state.delete(key, "a")
        assert await self._watched(there, key) == ({"é": "2"}, 3)
        claimed = await there.claim(key, instance="instance-b", restores=0)
        assert claimed is not None
        assert (claimed.watched, claimed.revision) == ({"é": "2"}, 3)
        await state.delete(key, "plain")
        await state.delete(key, "a")
        assert await self._watched(there, key) == ({"é": "2"}, 3)
        assert await self._watched(there, other) == (None, 0)

    async def test_a_write_returns_the_revision_that_it_makes(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        assert await store.write_journal(key, method="m", subject="", params="{}") == 1
        assert await state.put(key, new_state("plain")) == 1
        assert await state.put(key, new_state("a", watched=True)) == 2
        assert await state.put(key, new_state("a", watched=True)) == 3
        # No longer watched: the record carries it no more, which is a change of the record.
        assert await state.put(key, new_state("a")) == 4
        assert await state.put(key, new_state("a")) == 4
        assert await self._watched(store, key) == (None, 4)
        assert await state.delete(key, "a") == 4

    async def test_a_change_of_a_watched_value_is_a_change_of_the_session(self, make_state: MakeState) -> None:
        (store, state), (there, _) = make_state(), make_state()
        plain, watched = await self._opened(store), await self._opened(store)
        since = (await there.changes(None)).until
        await self._put(state, plain, "a")
        await self._put(state, watched, "a", watched=True)
        assert list((await there.changes(since)).changes) == [Change(key=watched, revision=1, ended=None)]
        await state.delete(watched, "a")
        assert Change(key=watched, revision=2, ended=None) in (await there.changes(since)).changes

    async def test_a_watched_value_whose_time_is_over_is_not_carried(
        self, store: SessionStore, state: StateStore
    ) -> None:
        key = await self._opened(store)
        await self._put(state, key, "a", watched=True, ttl=60.0)
        await self._put(state, key, "b", watched=True)
        await self.age_state(state, key, 61)
        assert await self._watched(store, key) == ({"b": "1"}, 2)
