"""Cases of the suite for stores of state: sessions of other namespaces."""

from __future__ import annotations

from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, sweep_state, texts


class Namespaces(StateSuite):
    """Sessions of other namespaces."""

    async def test_the_state_of_another_namespace_does_not_exist(self, make_state: MakeState) -> None:
        (store, mine), (_, theirs) = make_state("mine"), make_state("theirs")
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        key = await self._opened(store)
        await self._put(mine, key, "a")
        assert await theirs.get(key) is None
        assert await theirs.put(key, new_state("a", "2")) is None
        assert await theirs.delete(key, "a") is None
        assert await texts(mine, key) == {"a": "1"}

    async def test_a_sweep_leaves_other_namespaces_alone(self, make_state: MakeState) -> None:
        (store, mine), (_, theirs) = make_state("mine"), make_state("theirs")
        key = await self._opened(store)
        await self._put(mine, key, "a", ttl=60.0)
        await self.age_state(mine, key, 61)
        assert (await sweep_state(theirs)).removed == 0
        assert (await sweep_state(mine)).removed == 1
