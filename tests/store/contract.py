"""The contract on a SQL database, however it is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.tables import sessions_table
from mcp_session_store.testing import MakeStore, SessionStoreConformance
from tests.store.databases import age_tombstone, execute, expire, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from mcp_session_store.store import SessionStore

__all__ = ["SqlStoreConformance"]


class SqlStoreConformance(SessionStoreConformance):
    """Subclass it, and give the fixture `contract_url`."""

    @pytest.fixture
    def contract_url(self) -> str:
        """The URL of a migrated database, whose sessions each test removes."""
        raise NotImplementedError("override the fixture contract_url")

    @pytest.fixture
    async def make_store(self, anyio_backend: str, contract_url: str) -> AsyncIterator[MakeStore]:
        await execute(contract_url, sa.delete(sessions_table()))
        stores: list[SqlSessionStore] = []

        def make(namespace: str) -> SessionStore:
            stores.append(SqlSessionStore(contract_url, namespace=namespace))
            return stores[-1]

        yield make
        for store in stores:
            await settled(store)
            await store.aclose()

    async def expire(self, store: SessionStore, key: UUID) -> None:
        await expire(store, key)

    async def age_tombstone(self, store: SessionStore, key: UUID) -> None:
        await age_tombstone(store, key)
