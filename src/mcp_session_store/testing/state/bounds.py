"""Cases of the suite for stores of state: the bounds of the policy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import StateFull
from mcp_session_store.retention import StatePolicy
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, sweep_state, texts

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.state_store import StateStore

FEW = StatePolicy(max_value_bytes=500, max_values_per_session=3, max_bytes_per_session=1024)


def text_of(size: int) -> str:
    return '"' + "x" * (size - 2) + '"'


class Bounds(StateSuite):
    """The bounds of the policy."""

    async def _begun(self, make_state: MakeState) -> tuple[StateStore, UUID]:
        store, state = make_state(policy=FEW)
        return state, await self._opened(store)

    async def test_a_value_is_as_large_as_the_policy_allows(self, make_state: MakeState) -> None:
        state, key = await self._begun(make_state)
        await self._put(state, key, "a", text_of(500))
        with pytest.raises(StateFull, match="max_value_bytes is 500"):
            await state.put(key, new_state("b", text_of(501)))
        with pytest.raises(StateFull):
            await state.put(key, new_state("b", '"' + "é" * 250 + '"'))
        assert set(await state.get(key) or ()) == {"a"}

    async def test_a_session_has_as_many_values_as_the_policy_allows(self, make_state: MakeState) -> None:
        state, key = await self._begun(make_state)
        for name in ("a", "b", "c"):
            await self._put(state, key, name)
        with pytest.raises(StateFull, match="max_values_per_session is 3"):
            await state.put(key, new_state("d"))
        # One that takes the place of another is no more.
        await self._put(state, key, "c", "2")
        await state.delete(key, "a")
        await self._put(state, key, "d")
        assert await texts(state, key) == {"b": "1", "c": "2", "d": "1"}

    async def test_a_session_has_as_many_bytes_as_the_policy_allows(self, make_state: MakeState) -> None:
        state, key = await self._begun(make_state)
        await self._put(state, key, "a", text_of(500))
        await self._put(state, key, "b", text_of(500))
        with pytest.raises(StateFull, match="max_bytes_per_session is 1024"):
            await state.put(key, new_state("c", text_of(22)))
        await self._put(state, key, "c", text_of(21))
        # A smaller one makes room for as much as it is smaller.
        await self._put(state, key, "a", text_of(400))
        await self._put(state, key, "c", text_of(121))
        with pytest.raises(StateFull):
            await state.put(key, new_state("c", text_of(122)))
        await state.delete(key, "a")
        await state.delete(key, "b")
        await state.delete(key, "c")
        await self._put(state, key, "ab", text_of(500))
        await self._put(state, key, "cd", text_of(500))
        assert set(await state.get(key) or ()) == {"ab", "cd"}

    async def test_other_sessions_have_room_of_their_own(self, make_state: MakeState) -> None:
        store, state = make_state(policy=FEW)
        keys = [await self._opened(store) for _ in range(2)]
        for key in keys:
            for name in ("a", "b", "c"):
                await self._put(state, key, name)

    async def test_the_bounds_hold_whoever_writes_at_once(self, make_state: MakeState) -> None:
        made = [make_state(policy=FEW) for _ in range(3)]
        key = await self._opened(made[0][0])

        async def write(number: int) -> bool:
            try:
                await made[number % 3][1].put(key, new_state(str(number)))
            except StateFull:
                return False
            return True

        written = await asyncio.gather(*map(write, range(9)))
        assert written.count(True) == 3
        assert set(await made[0][1].get(key) or ()) == {str(n) for n, is_written in enumerate(written) if is_written}
        # What was refused was not counted.
        await made[1][1].delete(key, str(written.index(True)))
        await self._put(made[2][1], key, "new")

    async def test_what_is_over_makes_room(self, make_state: MakeState) -> None:
        state, key = await self._begun(make_state)
        for name in ("a", "b"):
            await self._put(state, key, name, text_of(500), ttl=60.0)
        with pytest.raises(StateFull):
            await state.put(key, new_state("c", text_of(500)))
        await self.age_state(state, key, 61)
        await self._put(state, key, "c", text_of(500))
        await self._put(state, key, "d", text_of(500))
        assert set(await state.get(key) or ()) == {"c", "d"}
        await sweep_state(state)
        with pytest.raises(StateFull):
            await state.put(key, new_state("e", text_of(500)))
        assert set(await state.get(key) or ()) == {"c", "d"}
