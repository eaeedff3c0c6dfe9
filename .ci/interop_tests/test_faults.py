"""PgBouncer, or Postgres behind it, goes away and comes back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store import StoreUnavailable
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session
from tests.support.clients import until
from tests.support.databases import settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from interop_tests.pgbouncer import PgBouncer
    from mcp_session_store.records import SessionRecord
    from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def stoppable_url(stoppable_pgbouncer: PgBouncer, stoppable_postgres: PostgresServer) -> Iterator[str]:
    with stoppable_postgres.database() as url:
        yield stoppable_pgbouncer.url_of(url)


@pytest.fixture
async def store(anyio_backend: str, stoppable_url: str) -> AsyncIterator[SqlSessionStore]:
    await migrate.upgrade(stoppable_url)
    async with SqlSessionStore(stoppable_url) as store:
        yield store
        await settled(store)


async def some_sessions(store: SqlSessionStore) -> list[SessionRecord]:
    """Sessions, and a pool with as many connections as kinds of calls at once."""
    records = await asyncio.gather(*(store.create(new_session()) for _ in range(10)))
    await asyncio.gather(
        *(store.load(record.key) for record in records), *(store.create(new_session()) for _ in range(10))
    )
    return records


async def is_served(store: SqlSessionStore, records: list[SessionRecord]) -> bool:
    """Return whether the database answers the store again; then it must hold what it held, and store more."""
    try:
        loaded = await asyncio.gather(*(store.load(record.key) for record in records))
        await store.create(new_session())
    except StoreUnavailable:
        return False
    assert loaded == records
    return True


async def test_pgbouncer_is_killed_and_started_again(store: SqlSessionStore, stoppable_pgbouncer: PgBouncer) -> None:
    records = await some_sessions(store)
    stoppable_pgbouncer.kill()
    with pytest.raises(StoreUnavailable):
        await store.load(records[0].key)
    stoppable_pgbouncer.start()
    await until(lambda: is_served(store, records), "the store has its database again")


async def test_pgbouncer_restarts_between_two_calls(store: SqlSessionStore, stoppable_pgbouncer: PgBouncer) -> None:
    records = await some_sessions(store)
    stoppable_pgbouncer.restart()
    # Each pooled connection is broken, and a call is tried once more.
    assert await is_served(store, records)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_postgres_is_stopped_and_started_again(
    store: SqlSessionStore, stoppable_postgres: PostgresServer, mode: str
) -> None:
    assert mode in ("fast", "immediate")
    records = await some_sessions(store)
    stoppable_postgres.stop("fast" if mode == "fast" else "immediate")
    with pytest.raises(StoreUnavailable):
        await store.load(records[0].key)
    stoppable_postgres.start()
    await until(lambda: is_served(store, records), "the store has its database again")
