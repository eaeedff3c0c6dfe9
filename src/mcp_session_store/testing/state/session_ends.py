"""Cases of the suite for stores of state: the state of sessions that end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.sessions.suite import SHORT, sweep_sessions
from mcp_session_store.testing.state.suite import MakeState, StateSuite, sweep_state, texts

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class SessionEnds(StateSuite):
    """The state of sessions that end."""

    async def left(self, state: StateStore, key: UUID) -> int:
        """Return how many values of a session are stored, live or not; override it to look into the database."""
        return len(await state.get(key) or ())

    async def test_a_session_that_ends_loses_its_state(self, store: SessionStore, state: StateStore) -> None:
        other = await self._opened(store)
        keys = {reason: await self._opened(store) for reason in EndReason}
        for key in (other, *keys.values()):
            await self._put(state, key, "a")
            await self._put(state, key, "b", watched=True)
        for reason, key in keys.items():
            assert await store.end(key, reason=reason)
            assert await self.left(state, key) == 0
        assert await texts(state, other) == {"a": "1", "b": "1"}

    async def test_a_session_that_a_sweep_ends_loses_its_state(self, store: SessionStore, state: StateStore) -> None:
        expired, live = await self._opened(store), await self._opened(store)
        for key in (expired, live):
            await self._put(state, key, "a")
        await self.expire(store, expired)
        store.retention = SHORT
        assert (await sweep_sessions(store)).expired == 1
        assert await self.left(state, expired) == 0
        assert await texts(state, live) == {"a": "1"}
        assert (await sweep_state(state)).removed == 0

    async def test_a_session_that_ends_for_the_limit_loses_its_state(self, make_state: MakeState) -> None:
        store, state = make_state()
        store.retention = RetentionPolicy(per_principal=1)
        first = await self._opened(store)
        await self._put(state, first, "a")
        second = await self._opened(store, state=(new_state("b"),))
        assert await self.left(state, first) == 0
        assert await texts(state, second) == {"b": "1"}

    async def test_no_write_outlives_a_session_that_ends_meanwhile(self, make_state: MakeState) -> None:
        made = [make_state() for _ in range(2)]
        for _ in range(5):
            key = await self._opened(made[0][0])
            await self._put(made[0][1], key, "a")
            await asyncio.gather(
                *(made[number % 2][1].put(key, new_state(str(number))) for number in range(4)),
                made[1][0].end(key, reason=EndReason.CLIENT),
            )
            assert await self.left(made[0][1], key) == 0
