"""Store of session state in memory, the reference of its contract."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mcp_session_store.errors import StateConflict
from mcp_session_store.memory.sessions import MemorySessionStore
from mcp_session_store.retention import StatePolicy, StateSweepReport
from mcp_session_store.settings import checked_type
from mcp_session_store.state_store import (
    NO_VALUE,
    STATE_SWEEP_LIMIT,
    StateStore,
    StoredState,
    check_bounds,
    check_name,
    check_state,
    state_bytes,
    state_full,
)
from mcp_session_store.store import check_keys

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from mcp_session_store.memory.data import Data, Row, State
    from mcp_session_store.records import NewState

__all__ = ["MemoryStateStore"]


class MemoryStateStore(StateStore):
    """State of the sessions of a `MemorySessionStore`, in a dictionary.

    No method awaits anything, so that each call takes effect as a whole.

    Args:
        store: Store of the sessions.
        policy: See `StateStore`.
    """

    def __init__(self, store: MemorySessionStore, *, policy: StatePolicy | None = None) -> None:
        checked_type("store", store, MemorySessionStore, "a MemorySessionStore")
        super().__init__(policy=policy)
        self._store = store
        self._data = store.data

    @property
    def namespace(self) -> str:
        return self._store.namespace

    @property
    def data(self) -> Data:
        """State of all stores that share it, and the sessions."""
        return self._data

    def _row(self, key: UUID) -> Row | None:
        check_keys(key)
        return self._data.live(key, namespace=self.namespace)

    def _values(self, key: UUID) -> dict[str, State]:
        """Return the values of a session whose time is not over."""
        now = self._data.now()
        return {name: kept for name, kept in self._data.states.get(key, {}).items() if not kept.over_at(now)}

    async def get(self, key: UUID, names: Collection[str] | None = None) -> dict[str, StoredState] | None:
        for name in names or ():
            check_name(name)
        if self._row(key) is None:
            return None
        return {
            name: StoredState(kept.state.value, kept.state.version)
            for name, kept in sorted(self._values(key).items())
            if names is None or name in names
        }

    async def put(self, key: UUID, state: NewState, *, expected: int | None = None) -> int | None:
        check_state(state)
        check_bounds(self.policy, [state])
        row = self._row(key)
        if row is None:
            return None
        values = self._values(key)
        old = values.get(state.name)
        if old is not None and old.state.version == state.version:
            return row.record.revision
        if expected is not None and (NO_VALUE if old is None else old.state.version) != expected:
            raise StateConflict("the value has another version than the write expects")
        others = [kept.state for name, kept in values.items() if name != state.name]
        size = sum(map(state_bytes, others)) + state_bytes(state)
        if len(others) + 1 > self.policy.max_values_per_session or size > self.policy.max_bytes_per_session:
            raise state_full(self.policy, values=len(others) + 1, size=size)
        self._data.put(key, state)
        return self._written(row, state.watched or (old is not None and old.state.watched))

    async def delete(self, key: UUID, name: str, *, expected: int | None = None) -> int | None:
        check_name(name)
        row = self._row(key)
        if row is None:
            return None
        old = self._values(key).get(name)
        if old is None:
            return row.record.revision
        if expected is not None and old.state.version != expected:
            raise StateConflict("the value has another version than the removal expects")
        del self._data.states[key][name]
        return self._written(row, old.state.watched)

    def _written(self, row: Row, watched: bool) -> int:
        """Return the revision of a session after a write, which raises it where the value is or was watched."""
        if watched:
            row.record = replace(row.record, revision=row.record.revision + 1)
            self._data.changed(row)
        return row.record.revision

    async def sweep(self, *, limit: int = STATE_SWEEP_LIMIT) -> StateSweepReport:
        now = self._data.now()
        over = [
            (key, name)
            for key, states in self._data.states.items()
            if self._data.row(key, namespace=self.namespace) is not None
            for name, kept in states.items()
            if kept.over_at(now)
        ]
        for key, name in over[:limit]:
            del self._data.states[key][name]
        return StateSweepReport(removed=len(over[:limit]), more=len(over) > limit)
