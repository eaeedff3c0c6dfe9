"""The contract, on everything that implements it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.memory import MemorySessionStore
from mcp_session_store.testing import MakeStore, SessionStoreConformance
from tests.store.contract import SqlStoreConformance

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.store import SessionStore


class TestMemory(SessionStoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        first = MemorySessionStore()
        return lambda namespace: MemorySessionStore(namespace=namespace, shared_with=first)

    async def expire(self, store: SessionStore, key: UUID) -> None:
        assert isinstance(store, MemorySessionStore)
        row = store._data.rows[key]
        row.record = replace(row.record, expires_at=datetime.now(UTC) - timedelta(seconds=1))

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        assert isinstance(store, MemorySessionStore)
        row = store._data.rows[key]
        assert row.ended is not None
        row.ended_at = datetime.now(UTC) - timedelta(days=2)


class TestSql(SqlStoreConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    def contract_url(self, migrated_url: str) -> str:
        return migrated_url
