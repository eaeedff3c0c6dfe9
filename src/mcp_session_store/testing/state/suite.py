"""Fixtures, methods to override and steps that all parts of the suite for stores of state use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

from mcp_session_store.retention import StateSweepReport
from mcp_session_store.store import DEFAULT_NAMESPACE
from mcp_session_store.testing.factories import new_session, new_state

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.retention import StatePolicy
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class MakeState(Protocol):
    """Function that makes a store of state, and the store of the sessions beside it, for a namespace.

    All that one function makes share their data.
    """

    def __call__(
        self, namespace: str = DEFAULT_NAMESPACE, *, policy: StatePolicy | None = None
    ) -> tuple[SessionStore, StateStore]: ...


async def texts(state: StateStore, key: UUID) -> dict[str, str] | None:
    """Return all values of a session by name."""
    values = await state.get(key)
    return None if values is None else {name: stored.value for name, stored in values.items()}


async def sweep_state(state: StateStore, *, limit: int = 100) -> StateSweepReport:
    """Sweep until there is no more to do, and return the report of all steps."""
    report = StateSweepReport()
    for _ in range(200):
        report += await state.sweep(limit=limit)
        if not report.more:
            return report
    raise AssertionError("a sweep has no end")


@pytest.mark.anyio
class StateSuite:
    """The store of state under test, and the store of the sessions beside it."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Name of the event loop. Override it for a store that needs another than asyncio."""
        return "asyncio"

    @pytest.fixture
    def make_state(self) -> MakeState:
        """Function that makes stores over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_state")

    @pytest.fixture
    def made(self, make_state: MakeState) -> tuple[SessionStore, StateStore]:
        return make_state()

    @pytest.fixture
    def store(self, made: tuple[SessionStore, StateStore]) -> SessionStore:
        return made[0]

    @pytest.fixture
    def state(self, made: tuple[SessionStore, StateStore]) -> StateStore:
        return made[1]

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Set the expiry of a session of the store to one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_state(self, state: StateStore, key: UUID, by: float) -> None:
        """Move the ends of the times of a session's values that many seconds back."""
        raise NotImplementedError("override the method age_state")

    async def _opened(self, store: SessionStore, **changes: Any) -> UUID:
        return (await store.create(new_session(**changes))).key

    async def _put(self, state: StateStore, key: UUID, name: str, value: str = "1", **changes: Any) -> int:
        """Store a value, and return its version."""
        new = new_state(name, value, **changes)
        assert await state.put(key, new) is not None
        return new.version
