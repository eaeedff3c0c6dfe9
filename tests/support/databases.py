"""SQL stores for tests: each on a migrated database, and checked at the end for connections left behind."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from mcp_session_store.retention import EventSweepReport
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore, SqlStateStore
from mcp_session_store.sql.connections import Connections
from mcp_session_store.sql.dialects.functions import After, StoreClock
from mcp_session_store.sql.engine import checked_url, make_migration_engine
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.tables import (
    events_table,
    instances_table,
    logs_table,
    make_tables,
    messages_table,
    sessions_table,
    state_table,
    stream_messages_table,
)
from tests.support.faults import FaultProxy
from tests.support.internals import database_of, drains_of, idle_connections_of, listening_of, opening_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.event_log import EventLog
    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


def engine_of(store: SessionStore | EventLog | Mailbox | StateStore) -> AsyncEngine:
    assert isinstance(store, SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore)
    return database_of(store).engine


def connections_checked_out(store: SessionStore | EventLog | Mailbox | StateStore) -> int:
    assert isinstance(store, SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore)
    return database_of(store).connections.in_use


async def kept_connections(store: SessionStore | EventLog | Mailbox | StateStore) -> list[Any]:
    """The driver's own connections that a store keeps, and that no call uses."""
    assert isinstance(store, SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore)
    connections = idle_connections_of(database_of(store))
    return [(await connection.get_raw_connection()).driver_connection for connection in connections]


async def keep_connections(store: SessionStore, number: int) -> None:
    """Have a store keep so many open connections, as after as many calls at once."""
    assert isinstance(store, SqlSessionStore)
    connections = database_of(store).connections
    assert isinstance(connections, Connections)
    taken = [await connections.take() for _ in range(number)]
    # All of them, because so many are kept as were in use at once.
    while (idle := connections.take_idle()) is not None:
        taken.append(idle)
    kept = [connections.give_back(connection) for connection in taken]
    assert all(kept)


async def settled(*stores: SessionStore | EventLog | Mailbox | StateStore) -> None:
    """Wait until stores on one engine have finished their work, and check that no connection is in use."""
    for store in stores:
        assert isinstance(store, SqlSessionStore | SqlEventLog | SqlMailbox | SqlStateStore)
        # A listener that was cancelled does not wait until its connection is closed.
        leaving = [task for task in listening_of(store) if task.cancelling()]
        for task in (*drains_of(store), *leaving):
            await asyncio.wait({task})
        # One that was wanted for a call that another connection came free for.
        for task in opening_of(database_of(store)):
            await asyncio.wait({task})
        for task in tuple(database_of(store).closing):
            await asyncio.wait({task})
    for store in stores:
        assert connections_checked_out(store) == 0


async def migrated(url: str, *, schema: str | None = None) -> None:
    """Migrate a database by the printed SQL of all migrations, which costs a third of Alembic and ends in the same.

    A database that is migrated already is left to `migrate.upgrade`, as one is that only an engine can reach.

    Args:
        url: The database.
        schema: Postgres: the schema for the tables.
    """
    target, _ = checked_url(url)
    script = _script(target.get_backend_name(), schema)
    try:
        if target.query or target.database is None:
            await migrate.upgrade(url, schema=schema)
        elif target.get_backend_name() == "sqlite":
            with closing(sqlite3.connect(target.database, isolation_level=None)) as connection:
                connection.executescript(script)
        else:
            dsn = target.set(drivername="postgresql").render_as_string(hide_password=False)
            postgres = await asyncpg.connect(dsn, timeout=60)
            try:
                await postgres.execute(script)
            finally:
                await postgres.close()
    except (sqlite3.OperationalError, asyncpg.DuplicateTableError):
        await migrate.upgrade(url, schema=schema)


@functools.cache
def _script(backend: str, schema: str | None) -> str:
    return migrate.upgrade_sql(f"{backend}:///sessions.db", schema=schema)


@asynccontextmanager
async def sql_store(url: str, **options: Any) -> AsyncIterator[SqlSessionStore]:
    """Migrate a database and open a store on it; at the end no connection may be checked out."""
    await migrated(url, schema=options.get("schema"))
    async with SqlSessionStore(url, **options) as store:
        yield store
        await settled(store)


async def execute(store_or_url: SessionStore | str, statement: str | sa.Executable) -> Sequence[sa.Row[Any]]:
    """Run a statement beside the store, on a connection of its own."""
    url = store_or_url if isinstance(store_or_url, str) else engine_of(store_or_url).url
    engine = make_migration_engine(*checked_url(url))
    try:
        async with engine.begin() as connection:
            result = await connection.execute(sa.text(statement) if isinstance(statement, str) else statement)
            return result.all() if result.returns_rows else []
    finally:
        await engine.dispose()


async def events_swept(log: EventLog) -> int:
    """Sweep until no more is left; return the number of events that were removed."""
    report = EventSweepReport(more=True)
    for _ in range(50):
        if not report.more:
            return report.removed
        report += await log.sweep()
    raise AssertionError("a sweep has no end")


async def empty(url: str) -> None:
    """Remove all that is stored in a database."""
    engine = make_migration_engine(*checked_url(url))
    try:
        async with engine.begin() as connection:
            for table in reversed(make_tables().sorted_tables):
                await connection.execute(sa.delete(table))
    finally:
        await engine.dispose()


async def age_tombstone(store: SessionStore, key: UUID) -> None:
    """Make an ended session have ended two days ago, by the database's clock."""
    table = sessions_table()
    ended = table.c.ended_at.is_not(None)
    statement = sa.update(table).where(table.c.key == key, ended).values(ended_at=StoreClock(-2 * 86_400.0))
    async with engine_of(store).begin() as connection:
        await connection.execute(statement)


async def expire(store: SessionStore, key: UUID, *, ago: float = 1.0) -> None:
    """Make a session have expired some seconds ago, by the database's clock."""
    table = sessions_table()
    statement = sa.update(table).where(table.c.key == key).values(expires_at=StoreClock(-ago))
    async with engine_of(store).begin() as connection:
        await connection.execute(statement)


async def age_events(log: EventLog, key: UUID) -> None:
    """Make all events that a session has have been stored two days ago, by the database's clock."""
    logs, events = logs_table(), events_table()
    long_ago = StoreClock(-2 * 86_400.0)
    async with engine_of(log).begin() as connection:
        await connection.execute(sa.update(events).where(events.c.key == key).values(created_at=long_ago))
        has_events = logs.c.oldest_at.is_not(None)
        await connection.execute(sa.update(logs).where(logs.c.key == key, has_events).values(oldest_at=long_ago))


async def age_state(state: StateStore, key: UUID, by: float) -> None:
    """Move the ends of the times of a session's values that many seconds back."""
    table = state_table()
    statement = sa.update(table).where(table.c.key == key, table.c.expires_at.is_not(None))
    async with engine_of(state).begin() as connection:
        await connection.execute(statement.values(expires_at=After(table.c.expires_at, -by)))


async def stored_state(state: StateStore, key: UUID) -> list[tuple[str, str]]:
    """Return the rows of a session's values, of whatever session, by name."""
    table = state_table()
    statement = sa.select(table.c.name, table.c.value).where(table.c.key == key).order_by(table.c.name)
    async with engine_of(state).begin() as connection:
        return [(row.name, row.value) for row in await connection.execute(statement)]


async def age_instance(mailbox: Mailbox, instance: str, by: timedelta) -> None:
    """Set the last heartbeat of an instance to that long before it was."""
    table = instances_table()
    statement = sa.update(table).where(table.c.instance == instance)
    async with engine_of(mailbox).begin() as connection:
        await connection.execute(statement.values(beat_at=After(table.c.beat_at, -by.total_seconds())))


async def age_messages(mailbox: Mailbox, by: timedelta) -> None:
    """Set the times of all messages and stream messages to that long before they were."""
    async with engine_of(mailbox).begin() as connection:
        for table in (messages_table(), stream_messages_table()):
            earlier = After(table.c.created_at, -by.total_seconds())
            await connection.execute(sa.update(table).values(created_at=earlier))


@asynccontextmanager
async def behind_proxy(url: str, **options: Any) -> AsyncIterator[tuple[SqlSessionStore, FaultProxy]]:
    """Open a store whose database is reached through a network that fails on command."""
    await migrated(url)
    target = make_url(url)
    assert target.host is not None
    assert target.port is not None
    async with FaultProxy(target.host, target.port) as proxy:
        there = target.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        store = SqlSessionStore(there, **options)
        try:
            yield store, proxy
            await settled(store)
        finally:
            await store.aclose()
