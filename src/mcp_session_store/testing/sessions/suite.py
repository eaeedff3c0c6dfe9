"""Fixtures, methods to override and steps that all parts of the suite for session stores use."""

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
"""Function that makes a store for a namespace. All stores that one function makes share their data."""

UNLIMITED = RetentionPolicy(idle=None, absolute=None)
SHORT = RetentionPolicy(idle=timedelta(milliseconds=40))
"""Policy with a grace so short that a sweep ends a session as soon as `expire` made it expire."""

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
    """Sweep until there is no more to do, and return the report of all steps."""
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
    """The store under test."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Name of the event loop. Override it for a store that needs another than asyncio."""
        return "asyncio"

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """Function that makes stores over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_store")

    @pytest.fixture
    def store(self, make_store: MakeStore) -> SessionStore:
        return make_store("default")

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Set the expiry of a session of the store to one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        """Set the end of an ended session of the store to two days ago."""
        raise NotImplementedError("override the method age_tombstone")

    async def _ended_two_days_ago(self, store: SessionStore, **changes: Any) -> NewSession:
        session = new_session(**changes)
        await store.create(session)
        assert await store.end(session.key, reason=EndReason.CLIENT)
        await self.age_tombstone(store, session.key)
        return session
