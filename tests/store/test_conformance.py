"""The contract, on everything that implements it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.memory import MemorySessionStore
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.tables import sessions_table
from mcp_session_store.testing import MakeStore, SessionStoreConformance
from tests.store.databases import age_tombstone, execute, expire, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
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


class TestSql(SessionStoreConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    async def make_store(self, anyio_backend: str, migrated_url: str) -> AsyncIterator[MakeStore]:
        await execute(migrated_url, sa.delete(sessions_table()))
        stores: list[SqlSessionStore] = []

        def make(namespace: str) -> SessionStore:
            stores.append(SqlSessionStore(migrated_url, namespace=namespace))
            return stores[-1]

        yield make
        for store in stores:
            await settled(store)
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        await age_tombstone(store, key)
