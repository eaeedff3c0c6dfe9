"""Why a session is not live: known from the query for its record."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from mcp_session_store import MemorySessionStore, SqlSessionStore
from mcp_session_store.memory.data import Row
from mcp_session_store.records import EndReason
from mcp_session_store.store import Absence
from mcp_session_store.testing.factories import new_session
from tests.support.rows import insert_rows, session_row

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)


async def test_a_database_says_why_a_session_is_not_live(migrated_url: str) -> None:
    expired, swept, ended, foreign = (
        session_row(expires=-HOUR),
        session_row(ended=HOUR, end_reason="expired"),
        # A tombstone cannot be unreadable.
        session_row(ended=HOUR, end_reason="operator", principal_digest="no digest"),
        session_row(namespace="other"),
    )
    await insert_rows(migrated_url, [expired, swept, ended, foreign])
    async with SqlSessionStore(migrated_url) as store:
        found = [await store.find(row["key"]) for row in (expired, swept, ended, foreign)]
        assert found == [Absence.EXPIRED, Absence.EXPIRED, Absence.ENDED, Absence.UNKNOWN]
        assert await store.find(uuid4()) is Absence.UNKNOWN
        assert await store.load(ended["key"]) is None
        report = await store.sweep()
        assert len(report.lives) == report.expired
        assert report.lives
        assert (report + report).lives == ()
        assert all(300 < life < 400 for life in report.lives)


async def test_a_store_in_memory_says_it_too() -> None:
    store = MemorySessionStore()
    session = new_session()
    await store.create(session)
    assert isinstance(store.data.rows[session.key], Row)
    await store.end(session.key, reason=EndReason.OPERATOR)
    assert await store.find(session.key) is Absence.ENDED
