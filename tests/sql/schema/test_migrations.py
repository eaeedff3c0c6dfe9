"""The migrations: linear, equal to the tables that the statements use, and safe for many at once."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import uuid
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.activity import Activity
from mcp_session_store.errors import (
    ConfigurationError,
    SchemaAhead,
    SchemaBehind,
    SchemaMissing,
    StoreUnavailable,
)
from mcp_session_store.retention import RetentionPolicy, SweepReport
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.sql.admin.partitions import EventPartitions
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.tables import VERSION_TABLE, make_tables, sessions_table
from mcp_session_store.sql.schema.version import HEAD, check_revision
from mcp_session_store.testing import new_message, new_presence, new_session
from tests.support.databases import execute, migrated, settled
from tests.support.forking import ForkedProcess, run_forked

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from typing import Any

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[3]


def scripts() -> ScriptDirectory:
    return ScriptDirectory(str(ROOT / "migrations"))


def test_there_is_one_head_and_the_package_knows_it() -> None:
    assert scripts().get_heads() == [HEAD]


def test_the_migrations_are_one_line_from_the_first_to_the_last() -> None:
    revisions = list(scripts().walk_revisions())
    assert [revision.down_revision for revision in revisions] == [
        *(revision.revision for revision in revisions[1:]),
        None,
    ]
    assert all(not revision.dependencies and not revision.branch_labels for revision in revisions)


def test_a_revision_is_named_by_its_schema_version_its_number_and_what_it_brings() -> None:
    revisions = [revision.revision for revision in scripts().walk_revisions()][::-1]
    for number, revision in enumerate(revisions, 1):
        major, own_number, name = revision.split("_", 2)
        assert major.isdecimal()
        assert own_number == f"{number:04d}"
        assert name
        assert len(revision) <= 32  # the width of Alembic's column
        path = ROOT / "migrations" / "versions" / f"{revision}.py"
        assert path.exists()


def test_no_migration_imports_what_may_change_later() -> None:
    for path in (ROOT / "migrations" / "versions").glob("*.py"):
        assert "mcp_session_store" not in path.read_text(), path


async def _differences(url: str, schema: str | None) -> list[Any]:
    def compare(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_schemas": schema is not None,
                "include_name": lambda name, kind, _: name == schema if kind == "schema" else name != VERSION_TABLE,
            },
        )
        return list(compare_metadata(context, make_tables(schema)))

    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(compare)
    finally:
        await engine.dispose()


async def test_the_tables_of_the_statements_are_those_of_the_migrations(database_url: str) -> None:
    assert await _differences(database_url, None) != []
    await migrate.upgrade(database_url)
    assert await _differences(database_url, None) == []


async def test_the_printed_migrations_make_the_database_that_an_upgrade_makes(database_url: str) -> None:
    if sa.make_url(database_url).get_backend_name() == "sqlite":
        what = "SELECT name, sql FROM sqlite_master ORDER BY name"
    else:
        what = (
            "SELECT CAST(attrelid AS regclass), attname, format_type(atttypid, atttypmod), attnotnull, attcompression"
            " FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE relname LIKE '%mcp_session%'"
            " AND attnum > 0 AND NOT attisdropped ORDER BY relname, attnum"
        )

    async def described() -> list[list[str]]:
        rows = await execute(database_url, what)
        return [[" ".join(str(value).split()) for value in row] for row in rows]

    await migrated(database_url)
    printed = await described()
    await migrate.downgrade(database_url, revision="base")
    await migrate.upgrade(database_url)
    assert printed == await described()
    assert len(printed) > 5
    assert await migrate.current(database_url) == HEAD


async def test_the_tables_in_a_schema_are_those_of_the_migrations(postgres_url: str) -> None:
    await migrate.upgrade(postgres_url, schema="sessions")
    assert await _differences(postgres_url, "sessions") == []
    tables = await execute(
        postgres_url, "SELECT schemaname, tablename FROM pg_tables WHERE tablename LIKE 'mcp_session%'"
    )
    assert {row.schemaname for row in tables} == {"sessions"}
    assert {row.tablename for row in tables} == {VERSION_TABLE, *(table.name for table in make_tables().sorted_tables)}


async def test_a_database_goes_up_down_and_up_again_with_sessions_in_it(database_url: str) -> None:
    for _ in range(2):
        await migrate.upgrade(database_url)
        await migrate.upgrade(database_url)
        assert await migrate.current(database_url) == HEAD
        await migrate.check(database_url)
        async with SqlSessionStore(database_url) as store:
            session = new_session()
            await store.create(session)
        # To where it is already: the sessions stay.
        await migrate.downgrade(database_url, revision=HEAD)
        async with SqlSessionStore(database_url) as store:
            assert await store.load(session.key) is not None
        await migrate.downgrade(database_url, revision="base")
        assert await migrate.current(database_url) is None
        with pytest.raises(SchemaMissing):
            await migrate.check(database_url)


async def test_sessions_from_before_there_was_retention_get_an_expiry(database_url: str) -> None:
    await migrate.upgrade(database_url, revision="1_0001_sessions")
    table, session = sessions_table(), new_session()
    row = {
        "key": session.key,
        "namespace": "default",
        "initialize_params": session.initialize_params,
        "protocol_version": session.protocol_version,
        "client_name": session.client_name,
        "client_version": session.client_version,
        "instance_hint": session.instance,
        "created_at": StoreClock(-7200.0),
        "last_seen_at": StoreClock(-3600.0),
        "restores": 3,
        "revision": 1,
    }
    await execute(database_url, sa.insert(table).values(row))
    await migrate.upgrade(database_url)
    async with SqlSessionStore(database_url, retention=RetentionPolicy(idle=timedelta(hours=2))) as store:
        before = await store.load(session.key)
        assert before is not None
        assert (before.expires_at, before.restores) == (None, 3)
        assert await store.sweep() == SweepReport()
        after = await store.load(session.key)
        assert after is not None
        # Nobody knows when it was last used, only when it first was: so it counts as used now.
        assert after.expires_at is not None
        assert timedelta(hours=3) <= after.expires_at - after.last_seen_at < timedelta(hours=3, minutes=5)
        store.retention = RetentionPolicy(idle=timedelta(minutes=30))
        await store.touch([Activity(key=session.key, first_age=0.0, last_age=3600.0)])
        assert await store.sweep() == SweepReport(expired=1)
    await migrate.downgrade(database_url, revision="1_0001_sessions")
    assert len(await execute(database_url, "SELECT key FROM mcp_session")) == 1


@pytest.mark.parametrize("schema", [None, "My sessions"])
async def test_a_partitioned_database_is_not_downgraded_and_is_otherwise_as_the_migrations_make_it(
    postgres_url: str, schema: str | None
) -> None:
    await migrate.upgrade(postgres_url, schema=schema)
    async with EventPartitions(postgres_url, schema=schema) as events:
        await events.partition(timedelta(hours=1), max_age=timedelta(hours=1))
        await migrate.check(postgres_url, schema=schema)
        await migrate.upgrade(postgres_url, schema=schema)
        # Partitions are tables to whoever looks.
        differences = await _differences(postgres_url, schema)
        assert {(kind, table.name.startswith("mcp_session_event_")) for kind, table in differences} == {
            ("remove_table", True)
        }
        for revision in ("1_0002_retention", "base"):
            with pytest.raises(ConfigurationError, match=r"events are partitioned.*events unpartition"):
                await migrate.downgrade(postgres_url, schema=schema, revision=revision)
        assert await migrate.current(postgres_url, schema=schema) == HEAD
        await events.unpartition()
    assert await _differences(postgres_url, schema) == []
    await migrate.downgrade(postgres_url, schema=schema, revision="base")


async def _indexes(url: str) -> dict[str, list[str | None]]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = await connection.run_sync(lambda sync: sa.inspect(sync).get_indexes("mcp_session"))
    await engine.dispose()
    return {str(index["name"]): index["column_names"] for index in found}


async def test_a_downgrade_restores_the_indexes_that_an_upgrade_has_dropped(database_url: str) -> None:
    await migrate.upgrade(database_url, revision="1_0003_events")
    before = await _indexes(database_url)
    await migrate.upgrade(database_url)
    assert before.keys() - (await _indexes(database_url)).keys() == {
        "ix_mcp_session_client",
        "ix_mcp_session_instance",
    }
    await migrate.downgrade(database_url, revision="1_0003_events")
    assert await _indexes(database_url) == before


async def test_an_upgrade_gives_up_before_statements_queue_behind_it_for_long(postgres_url: str) -> None:
    await migrate.upgrade(postgres_url, revision="1_0003_events")
    engine = create_async_engine(postgres_url)
    async with engine.connect() as reader:
        await reader.exec_driver_sql("SELECT count(*) FROM mcp_session")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await migrate.upgrade(postgres_url)
    await engine.dispose()
    assert await migrate.current(postgres_url) == "1_0003_events"
    await migrate.upgrade(postgres_url)
    assert await migrate.current(postgres_url) == HEAD


async def test_an_upgrade_waits_shortly_for_the_table_of_instances(postgres_url: str) -> None:
    await migrate.upgrade(postgres_url, revision="1_0006_instance_locks")
    engine = create_async_engine(postgres_url)
    async with engine.connect() as reader:
        await reader.exec_driver_sql("SELECT count(*) FROM mcp_session_instance")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await migrate.upgrade(postgres_url)
    await engine.dispose()
    assert await migrate.current(postgres_url) == "1_0006_instance_locks"


async def test_instances_of_the_version_before_run_beside_those_with_a_mailbox(database_url: str) -> None:
    await migrate.upgrade(database_url, revision="1_0006_instance_locks")
    clock = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
    if database_url.startswith("postgresql"):
        clock = "clock_timestamp()"
    # As that version writes its first heartbeat, and the next.
    beat = "INSERT INTO mcp_session_instance (name, instance, started_at, beat_at, lock_epoch) VALUES "
    await execute(database_url, f"{beat} ('old', 'host_1_old', {clock}, {clock}, NULL)")
    await migrate.upgrade(database_url)
    async with SqlMailbox(database_url, namespace="mine") as mailbox, SqlMailbox(database_url) as other:
        assert await mailbox.beat(new_presence(1))
        await execute(database_url, f"{beat} ('older', 'host_1_older', {clock}, {clock}, NULL)")
        for name in ("old", "older"):
            await execute(database_url, f"UPDATE mcp_session_instance SET beat_at = {clock} WHERE name = '{name}'")
        assert (await mailbox.last_beats(["old", "older"])).keys() == {"old", "older"}
        assert {running.number for running in await mailbox.instances()} == {None, 1}
        assert {running.instance for running in await other.instances()} == {"host_1_old", "host_1_older"}
        # They are sent nothing.
        assert await mailbox.post([new_message(1, recipient=None, sender=1)]) == set()
        assert await execute(database_url, "SELECT sequence FROM mcp_session_message") == []
        await settled(mailbox)
        await settled(other)
    await migrate.downgrade(database_url, revision="1_0006_instance_locks")
    assert len(await execute(database_url, "SELECT name, lock_epoch FROM mcp_session_instance")) == 3


async def _compressions(url: str, schema: str) -> set[tuple[str, str]]:
    """Return the name of the table of events and of each partition, with the code of their messages' compression."""
    found = await execute(
        url,
        "SELECT relname, CAST(attcompression AS text) AS method "
        "FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid "
        f"WHERE relname LIKE 'mcp_session_event%' AND attname = 'message' AND relnamespace = '{schema}'::regnamespace",
    )
    return {(row.relname, row.method) for row in found}


@pytest.mark.parametrize("schema", [None, "My sessions"])
async def test_long_messages_are_compressed_by_lz4_where_the_server_knows_it(
    postgres_url: str, schema: str | None
) -> None:
    namespace = '"My sessions"' if schema else "public"
    await migrate.upgrade(postgres_url, schema=schema)
    lz4 = "SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)"
    expected = "l" if await execute(postgres_url, lz4) else ""
    assert await _compressions(postgres_url, namespace) == {("mcp_session_event", expected)}
    async with EventPartitions(postgres_url, schema=schema) as events:
        await events.partition(timedelta(days=1), max_age=timedelta(days=7))
    partitioned = await _compressions(postgres_url, namespace)
    assert len(partitioned) > 1
    assert {code for _, code in partitioned} == {expected}
    await migrate.downgrade(postgres_url, schema=schema, revision="1_0004_fewer_indexes")
    assert {code for _, code in await _compressions(postgres_url, namespace)} == {""}
    await migrate.upgrade(postgres_url, schema=schema)
    assert await _compressions(postgres_url, namespace) == partitioned


async def test_a_transaction_on_partitioned_events_is_no_deadlock_for_an_upgrade(postgres_url: str) -> None:
    await migrate.upgrade(postgres_url)
    async with EventPartitions(postgres_url) as events:
        await events.partition(timedelta(days=1), max_age=timedelta(days=7))
    await migrate.downgrade(postgres_url, revision="1_0004_fewer_indexes")
    before = await _compressions(postgres_url, "public")
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = CAST('mcp_session_event' AS regclass)"
    engine = create_async_engine(postgres_url)
    async with engine.connect() as reader, asyncio.timeout(60):
        await reader.exec_driver_sql("LOCK TABLE ONLY mcp_session_event IN ACCESS SHARE MODE")
        upgrade = asyncio.create_task(migrate.upgrade(postgres_url))
        while not upgrade.done() and not await execute(postgres_url, waits):
            await asyncio.sleep(0.01)
        await reader.exec_driver_sql("SELECT count(*) FROM mcp_session_event")
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await upgrade
    await engine.dispose()
    assert await migrate.current(postgres_url) == "1_0004_fewer_indexes"
    assert await _compressions(postgres_url, "public") == before
    await migrate.upgrade(postgres_url)
    assert await migrate.current(postgres_url) == HEAD


async def test_other_peoples_tables_and_alembic_are_left_alone(database_url: str) -> None:
    await execute(database_url, "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    await execute(database_url, "INSERT INTO alembic_version VALUES ('theirs')")
    await migrate.upgrade(database_url)
    await migrate.downgrade(database_url, revision="base")
    assert [tuple(row) for row in await execute(database_url, "SELECT * FROM alembic_version")] == [("theirs",)]


async def test_a_migration_that_fails_leaves_nothing_behind(database_url: str) -> None:
    # In the way of the first migration, after Alembic has made its own table.
    await execute(database_url, "CREATE TABLE mcp_session (id INTEGER)")
    with pytest.raises(StoreUnavailable):
        await migrate.upgrade(database_url)
    assert await migrate.current(database_url) is None
    await execute(database_url, "DROP TABLE mcp_session")
    await migrate.upgrade(database_url)
    assert await migrate.current(database_url) == HEAD


async def test_a_given_engine_migrates_and_is_not_disposed(database_url: str) -> None:
    engine = create_async_engine(database_url, isolation_level="SERIALIZABLE")
    await migrate.upgrade(engine)
    assert await migrate.current(engine) == HEAD
    await migrate.check(engine)
    await migrate.downgrade(engine, revision="base")
    assert await migrate.current(engine) is None
    assert engine.pool.checkedin() > 0  # type: ignore[attr-defined]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()


async def test_a_role_that_may_not_create_schemas_migrates_within_one_that_is_there(postgres_url: str) -> None:
    role = f"role_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password'")
    await execute(postgres_url, f"CREATE SCHEMA sessions AUTHORIZATION {role}")
    url = sa.make_url(postgres_url).set(username=role, password="password")
    await migrate.upgrade(url, schema="sessions")
    assert await migrate.current(url, schema="sessions") == HEAD
    await execute(postgres_url, f"DROP OWNED BY {role}")
    await execute(postgres_url, f"DROP ROLE {role}")


async def test_eight_processes_may_upgrade_at_once(database_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        (their_input, start), (ready, their_output) = (
            (stack.enter_context(open(read, "rb")), stack.enter_context(open(write, "wb")))
            for read, write in (os.pipe(), os.pipe())
        )
        errors = stack.enter_context(open(tmp_path / "errors", "w+b"))
        files = {"stdin": their_input.fileno(), "stdout": their_output.fileno(), "stderr": errors.fileno()}
        processes = [
            ForkedProcess("tests.support.upgrading", [database_url], cwd=ROOT, env=os.environ, **files)
            for _ in range(8)
        ]
        for _ in processes:
            assert ready.readline() == b"ready\n"
        start.close()
        codes = [process.wait(120) for process in processes]
        assert codes == [0] * 8, (tmp_path / "errors").read_text()
    await migrate.check(database_url)
    rows = await execute(database_url, f"SELECT version_num FROM {VERSION_TABLE}")
    assert [tuple(row) for row in rows] == [(HEAD,)]


async def test_an_upgrade_waits_for_another_and_finds_it_done_on_postgres(postgres_url: str) -> None:
    dsn = sa.make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
    other = await asyncpg.connect(dsn)
    try:
        # Where a transaction's snapshot is as old as its first statement, which is what waits.
        name = sa.make_url(postgres_url).database
        await other.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
        await other.execute(migrate.upgrade_sql(postgres_url).replace("COMMIT;", ""))
        upgrade = asyncio.ensure_future(migrate.upgrade(postgres_url))
        while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            await asyncio.sleep(0)
        assert not upgrade.done()
        await other.execute("COMMIT")
        await upgrade
    finally:
        await other.close()
    await migrate.check(postgres_url)


async def test_an_upgrade_waits_for_another_and_finds_it_done_on_sqlite(sqlite_url: str) -> None:
    path = sa.make_url(sqlite_url).database
    assert path is not None
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        text = migrate.upgrade_sql(sqlite_url)
        statements = [part for part in text.split(";") if part.strip() not in ("", "BEGIN", "COMMIT")]
        other.execute("BEGIN IMMEDIATE")
        upgrade = asyncio.ensure_future(migrate.upgrade(sqlite_url))
        # SQLite does not tell who waits. One that did not would have failed by now.
        await asyncio.wait({upgrade}, timeout=0.5)
        assert not upgrade.done()
        for statement in statements:
            other.execute(statement)
        other.execute("COMMIT")
        await upgrade
    await migrate.check(sqlite_url)


# As SQL


async def test_the_printed_sql_makes_the_same_tables_on_postgres(postgres_url: str) -> None:
    for schema in (None, "My sessions"):
        text = migrate.upgrade_sql(postgres_url, schema=schema)
        assert text.index("BEGIN") < text.index("pg_advisory_xact_lock") < text.index("CREATE TABLE")
        connection = await asyncpg.connect(
            sa.make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
        )
        try:
            await connection.execute(text)
        finally:
            await connection.close()
        await migrate.check(postgres_url, schema=schema)
        assert await _differences(postgres_url, schema) == []


async def test_the_printed_sql_makes_the_same_tables_on_sqlite(sqlite_url: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "sessions.db")) as connection:
        connection.executescript(migrate.upgrade_sql(sqlite_url))
    await migrate.check(sqlite_url)
    assert await _differences(sqlite_url, None) == []


def test_printed_sql_needs_no_database() -> None:
    text = migrate.upgrade_sql("postgresql://somebody:hunter2@nowhere.invalid/db")
    assert "CREATE TABLE mcp_session (" in text
    assert "hunter2" not in text
    assert migrate.upgrade_sql("postgresql://nowhere.invalid/db", from_revision=HEAD).count("CREATE TABLE") == 0


# What goes wrong is said


def _advice(command: str) -> str:
    return f"run: mcp-session-store {command} --url postgresql://user@host/db"


@pytest.mark.parametrize(
    ("revision", "error", "parts"),
    [
        (None, SchemaMissing, ["no tables", _advice("upgrade")]),
        ("0_0004_old", SchemaBehind, ["0_0004_old", HEAD, _advice("upgrade")]),
        ("1_0000_older", SchemaBehind, ["1_0000_older", HEAD, _advice("upgrade")]),
        (
            "2_0001_new",
            SchemaAhead,
            ["2_0001_new", HEAD, "pip install --upgrade mcp-session-store", _advice(f"downgrade {HEAD}")],
        ),
        (
            "4ae5bb",
            SchemaAhead,
            ["4ae5bb", HEAD, "pip install --upgrade mcp-session-store", _advice(f"downgrade {HEAD}")],
        ),
    ],
)
def test_each_schema_that_does_not_fit_has_its_error(
    revision: str | None, error: type[Exception], parts: Sequence[str]
) -> None:
    with pytest.raises(error) as failure:
        check_revision(revision, advice=_advice)
    for part in parts:
        assert part in str(failure.value)


def test_the_head_and_what_only_adds_to_it_fit(caplog: pytest.LogCaptureFixture) -> None:
    check_revision(HEAD, advice=_advice)
    assert caplog.records == []
    check_revision("1_9999_much_later", advice=_advice)
    assert "1_9999_much_later" in caplog.text


async def test_a_revision_that_does_not_exist_is_refused(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="1_9999_none"):
        await migrate.upgrade(sqlite_url, revision="1_9999_none")
    assert await migrate.current(sqlite_url) is None


async def test_to_look_at_a_sqlite_file_that_is_not_there_does_not_make_it(sqlite_url: str, tmp_path: Path) -> None:
    for look in (migrate.current, migrate.check):
        with pytest.raises(ConfigurationError, match="there is no file"):
            await look(sqlite_url)
    assert list(tmp_path.iterdir()) == []


async def test_a_schema_that_sqlite_does_not_have_is_refused(sqlite_url: str) -> None:
    for call in (migrate.upgrade, migrate.current, migrate.check):
        with pytest.raises(ConfigurationError, match="no schemas"):
            await call(sqlite_url, schema="sessions")
    with pytest.raises(ConfigurationError, match="no schemas"):
        migrate.upgrade_sql(sqlite_url, schema="sessions")


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable) as failure:
        await migrate.upgrade("postgresql://somebody:hunter2@127.0.0.1:1/db")
    assert "hunter2" not in str(failure.value)


# The alembic command


def _alembic(*arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MCP_SESSION_STORE_URL"}
    if url is not None:
        environment["MCP_SESSION_STORE_URL"] = url
    return run_forked("alembic", arguments, cwd=ROOT, env=environment, stdin="", timeout=120)


async def test_alembic_upgrades_from_the_root_of_the_checkout(database_url: str) -> None:
    assert _alembic("upgrade", "head", url=database_url).returncode == 0
    await migrate.check(database_url)
    assert _alembic("-x", f"url={database_url}", "downgrade", "base").returncode == 0
    assert await migrate.current(database_url) is None


async def test_alembic_takes_the_schema(postgres_url: str) -> None:
    done = _alembic("-x", "schema=sessions", "upgrade", "head", url=postgres_url)
    assert done.returncode == 0, done.stderr
    await migrate.check(postgres_url, schema="sessions")
    printed = _alembic("-x", "schema=sessions", "upgrade", "head", "--sql", url=postgres_url)
    assert printed.stdout == migrate.upgrade_sql(postgres_url, schema="sessions")


def test_alembic_asks_for_the_database_when_there_is_none() -> None:
    done = _alembic("upgrade", "head")
    assert done.returncode != 0
    assert "MCP_SESSION_STORE_URL" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
