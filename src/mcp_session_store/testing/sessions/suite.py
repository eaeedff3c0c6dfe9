"""What the parts of the suite for session stores share: fixtures, methods to override, and helpers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.records import Change, EndReason, NewSession, SessionRecord
from mcp_session_store.retention import RetentionPolicy, SweepReport
from mcp_session_store.store import SessionStore
from mcp_session_store.testing.factories import new_session

if TYPE_CHECKING:
    from uuid import UUID

MakeStore = Callable[[str], SessionStore]
"""Makes a store for a namespace. All that one function makes share their data."""

UNLIMITED = RetentionPolicy(idle=None, absolute=None)
SHORT = RetentionPolicy(idle=timedelta(milliseconds=40))
"""With a grace so short that a sweep takes at once what `expire` made."""

POLICIES = [
    RetentionPolicy(idle=timedelta(hours=1)),
    RetentionPolicy(idle=timedelta(hours=2), absolute=timedelta(hours=1)),
    RetentionPolicy(idle=timedelta(hours=1), absolute=timedelta(hours=2)),
    RetentionPolicy(idle=None, absolute=timedelta(hours=1)),
    UNLIMITED,
]


def with_policy(make_store: MakeStore, policy: RetentionPolicy, *, namespace: str = "default") -> SessionStore:
    store = make_store(namespace)
    store.retention = policy
    return store


def assert_expires_by(policy: RetentionPolicy, record: SessionRecord) -> None:
    expected = policy.expiry(created_at=record.created_at, last_seen_at=record.last_seen_at)
    if expected is None or record.expires_at is None:
        assert record.expires_at == expected
    else:
        assert abs(record.expires_at - expected) < timedelta(seconds=1)


async def sweep_sessions(store: SessionStore, *, limit: int = 500) -> SweepReport:
    """Sweep for as long as there is more."""
    report = SweepReport(more=True)
    for _ in range(100):
        if not report.more:
            return report
        report += await store.sweep(limit=limit)
    raise AssertionError("a sweep has no end")


def ordered(changes: Sequence[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: change.key)


@pytest.mark.anyio
class StoreSuite:
    """The store under test: what a subclass gives, and what all parts of the suite use."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The event loop: asyncio. Override it for a store that needs another."""
        return "asyncio"

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """A function that makes stores over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_store")

    @pytest.fixture
    def store(self, make_store: MakeStore) -> SessionStore:
        return make_store("default")

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Make a session of the store have expired one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        """Make a session of the store that has ended have done so two days ago."""
        raise NotImplementedError("override the method age_tombstone")

    async def _ended_two_days_ago(self, store: SessionStore, **changes: Any) -> NewSession:
        session = new_session(**changes)
        await store.create(session)
        assert await store.end(session.key, reason=EndReason.CLIENT)
        await self.age_tombstone(store, session.key)
        return session
