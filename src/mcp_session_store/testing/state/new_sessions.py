"""Cases of the suite for stores of state: state that comes with a new session."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import InvalidValue, SessionConflict, StateFull
from mcp_session_store.retention import StatePolicy
from mcp_session_store.state_store import StoredState
from mcp_session_store.testing.factories import new_session, new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, texts

if TYPE_CHECKING:
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class NewSessions(StateSuite):
    """State that comes with a new session."""

    async def test_state_is_stored_with_the_session(self, store: SessionStore, state: StateStore) -> None:
        a, b = new_state("a", "1"), new_state("b", "2", ttl=3600.0)
        with_state = new_session(state=(a, b))
        without = new_session()
        records = await asyncio.gather(store.create(with_state), store.create(without))
        assert [record.revision for record in records] == [0, 0]
        assert await state.get(with_state.key) == {"a": StoredState("1", a.version), "b": StoredState("2", b.version)}
        assert await state.get(without.key) == {}
        await self.age_state(state, with_state.key, 3601)
        assert await texts(state, with_state.key) == {"a": "1"}

    async def test_state_of_many_new_sessions_at_once_does_not_mix(
        self, store: SessionStore, state: StateStore
    ) -> None:
        sessions = [
            new_session(state=tuple(new_state(str(n), str(number)) for n in range(number % 3))) for number in range(20)
        ]
        await asyncio.gather(*map(store.create, sessions))
        for number, session in enumerate(sessions):
            assert await texts(state, session.key) == {str(n): str(number) for n in range(number % 3)}

    async def test_watched_state_is_carried_from_the_first_load_on(self, store: SessionStore) -> None:
        session = new_session(state=(new_state("a", "1", watched=True), new_state("b", "2")))
        await store.create(session)
        record = await store.load(session.key)
        assert record is not None
        assert record.watched == {"a": "1"}

    async def test_a_session_that_is_created_again_keeps_its_state(
        self, store: SessionStore, state: StateStore
    ) -> None:
        session = new_session(state=(new_state("a", "1"),))
        await store.create(session)
        await self._put(state, session.key, "a", "2")
        await store.create(session)
        assert await texts(state, session.key) == {"a": "2"}

    async def test_a_session_that_cannot_be_created_leaves_no_state(
        self, store: SessionStore, state: StateStore
    ) -> None:
        first = new_session()
        await store.create(first)
        second = new_session(key=first.key, instance="instance-b", state=(new_state("a"),))
        with pytest.raises(SessionConflict):
            await store.create(second)
        assert await state.get(first.key) == {}
        wrong = new_session(state=(new_state("a"), new_state("b", "\0")))
        with pytest.raises(InvalidValue):
            await store.create(wrong)
        assert await store.load(wrong.key) is None
        assert await state.get(wrong.key) is None

    async def test_state_of_a_new_session_counts_for_its_bounds(self, make_state: MakeState) -> None:
        store, state = make_state(policy=StatePolicy(max_values_per_session=2))
        session = new_session(state=(new_state("a"), new_state("b")))
        await store.create(session)
        with pytest.raises(StateFull):
            await state.put(session.key, new_state("c"))
        await state.delete(session.key, "a")
        await self._put(state, session.key, "c")
