"""What a store does when it meets a database for the first time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from mcp_session_store.errors import SchemaAhead, SchemaBehind, SchemaMissing
from mcp_session_store.sql import SqlSessionStore, contact
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD, is_empty
from mcp_session_store.testing import new_session
from tests.support.databases import execute
from tests.support.internals import database_of

pytestmark = pytest.mark.anyio


async def test_an_empty_sqlite_file_is_migrated(sqlite_url: str) -> None:
    async with SqlSessionStore(sqlite_url, timeout=30) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
    assert await migrate.current(sqlite_url) == HEAD


async def test_an_empty_sqlite_file_behind_a_given_engine_is_migrated(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    async with SqlSessionStore(engine, timeout=30) as store:
        assert await store.load(uuid.uuid4()) is None
    await engine.dispose()


async def test_a_sqlite_file_that_another_process_migrates_meanwhile_is_used(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def looked_late(connection: AsyncConnection) -> bool:
        await migrate.upgrade(sqlite_url)
        return await is_empty(connection)

    monkeypatch.setattr(contact, "is_empty", looked_late)
    async with SqlSessionStore(sqlite_url, timeout=30) as store:
        assert await store.load(uuid.uuid4()) is None


async def test_a_sqlite_file_with_somebodys_tables_is_left_alone(sqlite_url: str) -> None:
    await execute(sqlite_url, "CREATE TABLE somebodys (id INTEGER)")
    store = SqlSessionStore(sqlite_url)
    with pytest.raises(SchemaMissing):
        await store.open()
    await store.aclose()
    tables = await execute(sqlite_url, "SELECT name FROM sqlite_master")
    assert [tuple(row) for row in tables] == [("somebodys",)]


async def test_a_server_database_is_never_migrated_unasked(postgres_url: str) -> None:
    store = SqlSessionStore(postgres_url)
    for call in (store.open(), store.load(uuid.uuid4()), store.create(new_session())):
        with pytest.raises(SchemaMissing):
            await call
    await store.aclose()
    tables = await execute(postgres_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert tables == []


async def test_a_server_database_is_migrated_when_asked(postgres_url: str) -> None:
    stores = [SqlSessionStore(postgres_url, auto_upgrade=True, timeout=60) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    session = new_session()
    assert await stores[0].create(session) == await stores[1].load(session.key)
    for store in stores:
        await store.aclose()


async def test_a_store_goes_on_by_itself_when_the_database_has_been_migrated(postgres_url: str) -> None:
    store = SqlSessionStore(postgres_url)
    with pytest.raises(SchemaMissing):
        await store.open()
    await migrate.upgrade(postgres_url)
    assert await store.load(uuid.uuid4()) is None
    await store.aclose()


async def test_a_schema_that_is_taken_away_later_is_named(database_url: str) -> None:
    await migrate.upgrade(database_url)
    await execute(database_url, "CREATE TABLE somebodys (id INTEGER)")
    async with SqlSessionStore(database_url) as store:
        assert await store.load(uuid.uuid4()) is None
        await migrate.downgrade(database_url, revision="base")
        with pytest.raises(SchemaMissing, match="mcp-session-store upgrade"):
            await store.load(uuid.uuid4())
        await migrate.upgrade(database_url)
        assert await store.load(uuid.uuid4()) is None


async def test_the_tables_may_be_in_a_schema(postgres_url: str) -> None:
    await migrate.upgrade(postgres_url, schema="My Sessions")
    async with SqlSessionStore(postgres_url, schema="My Sessions") as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        assert await store.claim(session.key, instance="b", restores=0) is not None
    async with SqlSessionStore(postgres_url, schema="My Sessions") as store:
        assert await store.load(session.key) is not None
    with pytest.raises(SchemaMissing, match="--schema other"):
        await migrate.check(postgres_url, schema="other")


async def _set_revision(url: str, revision: str) -> None:
    await migrate.upgrade(url)
    await execute(url, f"UPDATE mcp_session_version SET version_num = '{revision}'")


async def test_a_missing_schema_is_an_error_that_names_the_command(postgres_url: str) -> None:
    store = SqlSessionStore(postgres_url)
    with pytest.raises(SchemaMissing) as failure:
        await store.open()
    message = str(failure.value)
    shown = database_of(store).shown_url
    assert f"mcp-session-store upgrade --url {shown}" in message
    assert "alembic" not in message
    password = database_of(store).engine.url.password
    assert password is not None
    assert password not in message
    await store.aclose()


async def test_a_schema_that_is_behind_is_an_error_that_names_the_command(database_url: str) -> None:
    await _set_revision(database_url, "0_0009_before")
    store = SqlSessionStore(database_url)
    with pytest.raises(SchemaBehind, match=r"0_0009_before.*mcp-session-store upgrade --url"):
        await store.open()
    await store.aclose()


@pytest.mark.parametrize("revision", ["2_0007_later", "somebodys"])
async def test_a_schema_of_a_later_major_version_is_an_error_that_says_what_to_upgrade(
    database_url: str, revision: str
) -> None:
    await _set_revision(database_url, revision)
    store = SqlSessionStore(database_url, auto_upgrade=True)
    with pytest.raises(SchemaAhead, match=rf"{revision}.*pip install --upgrade mcp-session-store"):
        await store.open()
    await store.aclose()


async def test_a_newer_schema_of_the_same_major_version_works_with_a_warning(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await _set_revision(database_url, "1_9999_added_a_column")
    await execute(database_url, "ALTER TABLE mcp_session ADD COLUMN added TEXT")
    async with SqlSessionStore(database_url) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        await store.load(session.key)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in warnings if "1_9999_added_a_column" in text]) == 1


async def test_several_processes_may_meet_an_empty_file_at_once(sqlite_url: str) -> None:
    code = (
        "import asyncio, sys, uuid\n"
        "from mcp_session_store.sql import SqlSessionStore\n"
        "from mcp_session_store.testing import new_session\n"
        "async def main():\n"
        "    async with SqlSessionStore(sys.argv[1], timeout=60) as store:\n"
        "        session = new_session()\n"
        "        assert await store.create(session) == await store.load(session.key)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, sqlite_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        process.communicate(b"go\n", timeout=120)
    assert [process.returncode for process in processes] == [0] * 6
    assert [tuple(row) for row in await execute(sqlite_url, "SELECT count(*) FROM mcp_session")] == [(6,)]


def test_alembic_stays_out_where_nothing_is_to_be_migrated(sqlite_url: str) -> None:
    asyncio.run(migrate.upgrade(sqlite_url))
    code = (
        "import asyncio, sys\n"
        "from mcp_session_store.sql import SqlSessionStore\n"
        "async def main():\n"
        "    async with SqlSessionStore(sys.argv[1]):\n"
        "        pass\n"
        "asyncio.run(main())\n"
        "assert 'alembic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, sqlite_url], check=True, timeout=120)
