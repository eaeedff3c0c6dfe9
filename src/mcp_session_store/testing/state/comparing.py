"""Cases of the suite for stores of state: writes that compare, and writes that are repeated."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import StateConflict
from mcp_session_store.state_store import NO_VALUE
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, texts

if TYPE_CHECKING:
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class Comparing(StateSuite):
    """Writes that compare, and writes that are repeated."""

    async def test_a_write_that_expects_the_version_there_is_takes_effect(
        self, store: SessionStore, state: StateStore
    ) -> None:
        key = await self._opened(store)
        first, second = new_state("a", "1"), new_state("a", "2")
        assert await state.put(key, first, expected=NO_VALUE) == 0
        assert await state.put(key, second, expected=first.version) == 0
        assert await texts(state, key) == {"a": "2"}
        assert await state.delete(key, "a", expected=second.version) == 0
        assert await texts(state, key) == {}

    async def test_a_write_that_expects_another_version_changes_nothing(
        self, store: SessionStore, state: StateStore
    ) -> None:
        key = await self._opened(store)
        with pytest.raises(StateConflict):
            await state.put(key, new_state("a", "0"), expected=1)
        version = await self._put(state, key, "a", "1")
        other = await self._put(state, key, "b", "1")
        for expected in (NO_VALUE, version - 1 or 2, other):
            with pytest.raises(StateConflict):
                await state.put(key, new_state("a", "2"), expected=expected)
        for expected in (version - 1 or 2, other):
            with pytest.raises(StateConflict):
                await state.delete(key, "a", expected=expected)
        assert await texts(state, key) == {"a": "1", "b": "1"}

    async def test_a_removal_of_what_is_not_there_expects_nothing(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        assert await state.delete(key, "a", expected=7) == 0

    async def test_a_value_that_was_removed_and_put_again_has_another_version(
        self, store: SessionStore, state: StateStore
    ) -> None:
        key = await self._opened(store)
        version = await self._put(state, key, "a", "1")
        await state.delete(key, "a")
        await self._put(state, key, "a", "1")
        with pytest.raises(StateConflict):
            await state.put(key, new_state("a", "2"), expected=version)

    async def test_a_write_that_is_repeated_takes_effect_once(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        for revision, compares in enumerate((False, True), 1):
            before = await self._put(state, key, "a", "1")
            new = new_state("a", "2", watched=revision == 1)
            expected = before if compares else None
            for _ in range(2):
                # The one that is watched raises it once, and so does the one that takes its place.
                assert await state.put(key, new, expected=expected) == revision
            assert await texts(state, key) == {"a": "2"}
        await self._put(state, key, "a", "3")
        with pytest.raises(StateConflict):
            await state.put(key, new, expected=expected)
        assert await texts(state, key) == {"a": "3"}

    async def test_of_several_writes_that_expect_one_version_one_takes_effect(self, make_state: MakeState) -> None:
        made = [make_state() for _ in range(3)]
        store = made[0][0]
        key = await self._opened(store)

        async def write(number: int) -> bool:
            try:
                await made[number % 3][1].put(key, new_state("a", str(number)), expected=NO_VALUE)
            except StateConflict:
                return False
            return True

        written = await asyncio.gather(*map(write, range(9)))
        assert written.count(True) == 1
        assert await texts(made[0][1], key) == {"a": str(written.index(True))}

    async def test_no_update_is_lost_whatever_the_instances(self, make_state: MakeState) -> None:
        made = [make_state() for _ in range(3)]
        key = await self._opened(made[0][0])

        async def add(number: int) -> None:
            state = made[number % 3][1]
            for _ in range(200):
                stored = (await state.get(key, ["sum"]) or {}).get("sum")
                total = 0 if stored is None else json.loads(stored.value)
                try:
                    await state.put(
                        key,
                        new_state("sum", json.dumps(total + 1)),
                        expected=NO_VALUE if stored is None else stored.version,
                    )
                except StateConflict:
                    continue
                return
            raise AssertionError("an update never took effect")

        await asyncio.gather(*map(add, range(18)))
        assert await texts(made[1][1], key) == {"sum": "18"}

    async def test_a_put_that_is_cancelled_disturbs_no_other(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        tasks = [asyncio.ensure_future(state.put(key, new_state(str(number)))) for number in range(12)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        stored = await state.get(key) or {}
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                assert number % 3 == 0
            else:
                assert str(number) in stored
