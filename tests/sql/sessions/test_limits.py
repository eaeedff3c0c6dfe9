"""The limit on sessions without a principal, where they are so many that to count them takes long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import SessionLimitReached
from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.sql.sessions import limits
from mcp_session_store.testing import new_session
from tests.support.databases import execute, migrated

if TYPE_CHECKING:
    from uuid import UUID

pytestmark = pytest.mark.anyio

LIMIT: Final = 6
POLICY: Final = RetentionPolicy(anonymous=LIMIT)


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take three sessions for many."""
    monkeypatch.setattr(limits, "MANY", 3)


async def fill(store: SqlSessionStore) -> list[UUID]:
    """Store as many sessions as the policy allows, and return their keys."""
    sessions = [new_session(principal=None) for _ in range(LIMIT)]
    for session in sessions:
        await store.create(session)
    return [session.key for session in sessions]


async def test_a_full_store_refuses_for_a_moment_without_counting(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FULL_FOR", 1000.0)
    await migrated(database_url)
    table = sessions_table()
    async with SqlSessionStore(database_url, retention=POLICY) as store:
        keys = await fill(store)
        with pytest.raises(SessionLimitReached):
            await store.create(new_session(principal=None))
        await execute(database_url, sa.delete(table).where(table.c.key == keys[0]))
        with pytest.raises(SessionLimitReached):
            await store.create(new_session(principal=None))
    async with SqlSessionStore(database_url, retention=POLICY) as store:
        await store.create(new_session(principal=None))


async def test_room_is_made_for_some_more_at_once(database_url: str) -> None:
    await migrated(database_url)
    table = sessions_table()
    async with SqlSessionStore(database_url, retention=POLICY) as store:
        for key in await fill(store):
            await store.end(key, reason=EndReason.CLIENT)
        await execute(database_url, sa.update(table).values(ended_at=StoreClock(-3600.0)))
        await store.create(new_session(principal=None))
        ((stored,),) = await execute(database_url, sa.select(sa.func.count()).select_from(table))
        assert stored == LIMIT - (1 + LIMIT // limits.MANY) + 1
