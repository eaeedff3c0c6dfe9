"""The contract, on everything that implements it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.memory import MemorySessionStore
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.testing import MakeStore, SessionStoreConformance
from tests.store.databases import expire, settled

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


class TestSql(SessionStoreConformance):
    """On Postgres and SQLite."""

    @pytest.fixture
    async def make_store(self, anyio_backend: str, migrated_url: str) -> AsyncIterator[MakeStore]:
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
