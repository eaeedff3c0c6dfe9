"""Whether a store can be used now, as `ping` finds it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import SchemaBehind, SchemaMissing, StoreClosed, StoreUnavailable
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.schema.version import HEAD
from tests.support.databases import behind_proxy, engine_of, execute, sql_store
from tests.support.faulty_stores import FaultyStore

if TYPE_CHECKING:
    from typing import Any

pytestmark = pytest.mark.anyio


async def test_pings_at_once_share_a_statement(database_url: str) -> None:
    async with sql_store(database_url) as store:
        statements: list[str] = []

        def count(_connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
            statements.append(statement)

        sa.event.listen(engine_of(store).sync_engine, "before_cursor_execute", count)
        await asyncio.gather(*(store.ping() for _ in range(50)))
        # The first one goes alone.
        assert 1 <= len(statements) <= 2


async def test_a_ping_finds_that_the_schema_does_not_fit_any_more(database_url: str) -> None:
    async with sql_store(database_url) as store:
        await store.ping()
        await execute(database_url, "UPDATE mcp_session_version SET version_num = '1_0001_sessions'")
        # Every other call says so as well, until the schema fits.
        for call in (store.ping(), store.ping(), store.load(uuid.uuid4())):
            with pytest.raises(SchemaBehind, match="mcp-session-store upgrade --url"):
                await call
        await execute(database_url, f"UPDATE mcp_session_version SET version_num = '{HEAD}'")
        await store.ping()
        await store.load(uuid.uuid4())
        await execute(database_url, "DROP TABLE mcp_session_version")
        with pytest.raises(SchemaMissing):
            await store.ping()


async def test_a_ping_on_a_newer_schema_warns_no_more_than_the_first_contact(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with sql_store(database_url) as store:
        await execute(database_url, "UPDATE mcp_session_version SET version_num = '1_0999_later'")
        with caplog.at_level(logging.WARNING, "mcp_session_store"):
            await store.ping()
    # Not those below: whether they are made depends on what an earlier test configured.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_ping_fails_while_the_database_is_silent_or_the_store_closed(postgres_url: str) -> None:
    async with behind_proxy(postgres_url, timeout=3) as (store, proxy):
        await store.ping()
        proxy.hang()
        with pytest.raises(StoreUnavailable):
            await store.ping()
        proxy.resume()
        await store.ping()
    with pytest.raises(StoreClosed):
        await store.ping()


async def test_a_ping_finds_a_database_that_was_never_migrated(postgres_url: str) -> None:
    store = SqlSessionStore(postgres_url)
    with pytest.raises(SchemaMissing):
        await store.ping()
    await store.aclose()


async def test_a_store_without_a_ping_of_its_own_asks_for_changes() -> None:
    store = FaultyStore()
    await store.ping()
    assert store.background["changes"] == 1
    store.down("changes")
    with pytest.raises(StoreUnavailable):
        await store.ping()
