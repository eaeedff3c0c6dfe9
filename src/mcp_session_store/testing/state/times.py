"""Cases of the suite for stores of state: values that live for a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import StateConflict
from mcp_session_store.state_store import NO_VALUE
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, sweep_state, texts

if TYPE_CHECKING:
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class Times(StateSuite):
    """Values that live for a time."""

    async def test_a_value_is_gone_when_its_time_is_over(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        await self._put(state, key, "short", ttl=0.05)
        await self._put(state, key, "long", ttl=3600.0)
        await self._put(state, key, "ever")
        assert {"long", "ever"} <= set(await state.get(key) or ())
        await asyncio.sleep(0.1)
        assert set(await state.get(key) or ()) == {"long", "ever"}
        assert set(await state.get(key, ["short", "long"]) or ()) == {"long"}

    async def test_a_value_whose_time_is_over_is_none(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        version = await self._put(state, key, "a", ttl=60.0)
        await self.age_state(state, key, 61)
        with pytest.raises(StateConflict):
            await state.put(key, new_state("a", "2"), expected=version)
        assert await state.delete(key, "a", expected=5) == 0
        assert await state.put(key, new_state("a", "3"), expected=NO_VALUE) == 0
        assert await texts(state, key) == {"a": "3"}

    async def test_the_latest_write_says_the_time(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        for name, first, then in (("a", 60.0, None), ("b", 60.0, 3600.0), ("c", None, 60.0)):
            await self._put(state, key, name, "1", ttl=first)
            await self._put(state, key, name, "2", ttl=then)
        await self.age_state(state, key, 61)
        assert await texts(state, key) == {"a": "2", "b": "2"}

    async def test_a_sweep_removes_what_is_over_and_nothing_else(self, make_state: MakeState) -> None:
        store, state = make_state()
        over, other = await self._opened(store), await self._opened(store)
        for number in range(5):
            await self._put(state, over, f"short {number}", ttl=60.0)
        await self._put(state, over, "long", ttl=3600.0)
        await self._put(state, over, "ever")
        await self._put(state, other, "short", ttl=60.0)
        assert (await sweep_state(state)).removed == 0
        await self.age_state(state, over, 61)
        first = await state.sweep(limit=2)
        assert (first.removed, first.more) == (2, True)
        assert (await sweep_state(state, limit=2)).removed == 3
        assert set(await state.get(over) or ()) == {"long", "ever"}
        assert set(await state.get(other) or ()) == {"short"}

    async def test_sweeps_at_once_remove_each_value_once(self, make_state: MakeState) -> None:
        made = [make_state() for _ in range(3)]
        key = await self._opened(made[0][0])
        for number in range(12):
            await self._put(made[0][1], key, str(number), ttl=60.0)
        await self.age_state(made[0][1], key, 61)
        reports = await asyncio.gather(*(sweep_state(state, limit=3) for _, state in made))
        reports.append(await sweep_state(made[0][1]))
        assert sum(report.removed for report in reports) == 12
