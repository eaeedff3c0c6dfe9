"""`migrations.upgrade` on a connection of an application: within its transaction, which the application ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store import migrations
from mcp_session_store.errors import ConfigurationError, SchemaAhead
from mcp_session_store.sql.schema.version import HEAD
from tests.support.databases import execute, migrated

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.anyio


def engine_for(url: str, **options: Any) -> AsyncEngine:
    return create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), **options)


async def test_a_rollback_of_the_callers_undoes_the_upgrade_and_a_commit_keeps_it(database_url: str) -> None:
    engine = engine_for(database_url)
    async with engine.connect() as connection:
        await connection.execute(sa.text("CREATE TABLE users (id INTEGER)"))
        await connection.commit()
        await migrations.upgrade(connection)
        await connection.execute(sa.text("INSERT INTO users VALUES (1)"))
        await connection.rollback()
    assert await migrations.current(engine) is None
    assert await execute(database_url, "SELECT id FROM users") == []
    async with engine.begin() as connection:
        await connection.execute(sa.text("INSERT INTO users VALUES (2)"))
        await migrations.upgrade(connection)
        # As a start-up of a deployment does it, that also has it in a migration.
        await migrations.upgrade(connection)
    assert await migrations.current(engine) == HEAD
    assert [tuple(row) for row in await execute(database_url, "SELECT id FROM users")] == [(2,)]
    await engine.dispose()


async def test_several_start_at_once_in_transactions_of_their_own(database_url: str) -> None:
    # On SQLite the seconds that each waits for those before it.
    engine = engine_for(database_url, connect_args={"timeout": 60})

    async def start() -> None:
        async with engine.begin() as connection:
            await migrations.upgrade(connection)

    await asyncio.gather(*(start() for _ in range(4)), migrations.upgrade(database_url))
    await migrations.check(engine)
    await engine.dispose()


async def test_a_connection_in_autocommit_has_no_transaction_to_join(database_url: str) -> None:
    engine = engine_for(database_url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="no transaction to join"):
            await migrations.upgrade(connection)
    assert await migrations.current(engine) is None
    await engine.dispose()


async def test_settings_of_the_callers_transaction_stay(postgres_url: str) -> None:
    engine = engine_for(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("SET LOCAL lock_timeout = '4321ms'"))
        await migrations.upgrade(connection, schema="sessions")
        assert (await connection.execute(sa.text("SHOW lock_timeout"))).scalar_one() == "4321ms"
    await migrations.check(engine, schema="sessions")
    await engine.dispose()


async def test_a_newer_schema_is_left_as_it_is_and_one_of_another_major_version_refused(database_url: str) -> None:
    await migrated(database_url)
    engine = engine_for(database_url)
    for revision in ("1_9999_later", "2_0001_other"):
        await execute(database_url, f"UPDATE mcp_session_version SET version_num = '{revision}'")
        async with engine.begin() as connection:
            if revision.startswith("1_"):
                await migrations.upgrade(connection)
                continue
            with pytest.raises(SchemaAhead):
                await migrations.upgrade(connection)
    await engine.dispose()


async def test_a_schema_translate_map_is_refused(postgres_url: str) -> None:
    engine = engine_for(postgres_url).execution_options(schema_translate_map={None: "other"})
    async with engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="schema_translate_map"):
            await migrations.upgrade(connection)
    await engine.dispose()


@pytest.mark.parametrize("begins", ["by_the_driver", "by_a_listener", "by_hand", "never"])
async def test_sqlite_joins_whichever_way_transactions_begin(sqlite_url: str, begins: str) -> None:
    engine = sa.create_engine(sqlite_url.replace("+aiosqlite", ""))
    if begins != "by_the_driver":

        @sa.event.listens_for(engine, "connect")
        def off(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None

    if begins == "by_a_listener":

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN")

    with engine.connect() as connection:
        if begins == "never":
            with pytest.raises(ConfigurationError, match="BEGIN IMMEDIATE"):
                migrations.upgrade(connection)
        for ends in () if begins == "never" else (connection.rollback, connection.commit):
            if begins == "by_hand":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            migrations.upgrade(connection)
            ends()
            expected = None if ends == connection.rollback else HEAD
            assert await migrations.current(sqlite_url) == expected
    engine.dispose()
