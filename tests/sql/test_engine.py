"""What a store is made with, and what it makes of it."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool

from mcp_session_store.errors import ConfigurationError, StoreClosed, StoreUnavailable
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.dialects import DIALECTS
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.engine import checked_url, shown_url
from mcp_session_store.sql.failures import failure_kind, summary_of
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session
from tests.support.databases import connections_checked_out, engine_of, execute, settled, sql_store
from tests.support.internals import pool_timeout_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("postgres://u:p@host/db", "postgresql+asyncpg://u:p@host/db"),
        ("postgresql://u:p@host:5433/db", "postgresql+asyncpg://u:p@host:5433/db"),
        ("postgresql+asyncpg://host/db", "postgresql+asyncpg://host/db"),
        ("postgresql://host/db?sslmode=require", "postgresql+asyncpg://host/db?ssl=require"),
        ("postgresql://host/db?pgbouncer=true", "postgresql+asyncpg://host/db?pgbouncer=true"),
        ("sqlite:///sessions.db", "sqlite+aiosqlite:///sessions.db"),
        ("sqlite:////var/lib/sessions.db", "sqlite+aiosqlite:////var/lib/sessions.db"),
        ("sqlite+aiosqlite:///sessions.db", "sqlite+aiosqlite:///sessions.db"),
    ],
)
def test_a_url_gets_the_driver_of_this_package(given: str, made: str) -> None:
    url, _ = checked_url(given)
    assert url.render_as_string(hide_password=False) == made


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:hunter2@host/db", "postgresql://"),
        ("postgresql+psycopg://u:hunter2@host/db", r"postgresql\+asyncpg://"),
        ("sqlite+pysqlite:///x.db", r"sqlite\+aiosqlite://"),
        ("no url hunter2", "cannot be read"),
        ("postgresql://u:hunter2@host:hunter2/db", "cannot be read"),
        ("postgresql://u:hunter2@host/db?colour=blue", "colour"),
        ("postgresql://u:hunter2@host/db?pgbouncer=yes", "pgbouncer='yes' .* true or false"),
        ("postgresql://u:hunter2@host/db?pgbouncer=true&pgbouncer=false", "pgbouncer=.* true or false"),
        ("sqlite://", "MemorySessionStore"),
        ("sqlite:///", "MemorySessionStore"),
        ("sqlite:///:memory:", "MemorySessionStore"),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", "MemorySessionStore"),
        ("sqlite+aiosqlite:///file:x?mode=memory&uri=true", "MemorySessionStore"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_remedy_and_without_the_password(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as failure:
        SqlSessionStore(url)
    assert "hunter2" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.0}, r"timeout=-1\.0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"namespace": ""}, "namespace=''"),
        ({"namespace": None}, "namespace=None"),
        ({"schema": "sessions"}, "sqlite has no schemas"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SqlSessionStore("sqlite:///sessions.db", **options)


@pytest.mark.parametrize("schema", ["", "x" * 64, "a\0b"])
def test_a_schema_that_is_no_name_is_refused(schema: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a schema"):
        SqlSessionStore("postgresql://host/db", schema=schema)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (lambda: sa.create_engine("sqlite:///x.db"), "create_async_engine"),
        (lambda: object(), "neither a database URL nor an AsyncEngine"),
        (lambda: None, "neither a database URL nor an AsyncEngine"),
        (lambda: create_async_engine("sqlite+aiosqlite:///:memory:"), "MemorySessionStore"),
        (
            lambda: create_async_engine(
                "postgresql+asyncpg://host/db", execution_options={"schema_translate_map": {None: "sessions"}}
            ),
            "by schema= instead",
        ),
    ],
    ids=["not async", "no engine", "nothing", "in memory", "another schema"],
)
def test_an_engine_that_cannot_work_is_refused(engine: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SqlSessionStore(engine())


def test_a_shown_url_has_no_password_no_driver_and_no_options() -> None:
    url, _ = checked_url("postgresql://user:hunter2@host:5433/db?passfile=hunter2")
    assert shown_url(url) == "postgresql://user@host:5433/db"


async def test_an_engine_of_ours_waits_for_nothing_longer_than_the_timeout(postgres_url: str) -> None:
    async with sql_store(postgres_url, timeout=0.5) as store:
        engine = engine_of(store)
        assert engine.sync_engine.hide_parameters
        assert pool_timeout_of(engine) == 0.5
        async with asyncio.timeout(20):
            async with engine.connect() as connection:
                with pytest.raises(TimeoutError):
                    await connection.exec_driver_sql("SELECT pg_sleep(3600)")
                await connection.invalidate()


async def test_operators_can_tell_the_connections_of_a_store(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store:
        await store.load(uuid.uuid4())
        rows = await execute(postgres_url, "SELECT DISTINCT application_name FROM pg_stat_activity")
        assert ("mcp-session-store",) in [tuple(row) for row in rows]


@asynccontextmanager
async def _pooled_connections(store: SqlSessionStore) -> AsyncIterator[list[asyncpg.Connection]]:
    """The driver's own connections in the store's pool."""
    pool = engine_of(store).pool
    assert isinstance(pool, QueuePool)
    async with AsyncExitStack() as stack:
        count = pool.checkedin()
        connections = [await stack.enter_async_context(engine_of(store).connect()) for _ in range(count)]
        yield [(await connection.get_raw_connection()).driver_connection for connection in connections]


@pytest.mark.parametrize(("option", "prepares"), [("true", False), ("false", True), (None, True)])
async def test_behind_pgbouncer_a_store_prepares_no_statements(
    postgres_url: str, option: str | None, prepares: bool
) -> None:
    url = postgres_url if option is None else f"{postgres_url}?pgbouncer={option}"
    async with SqlSessionStore(url, auto_upgrade=True) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        await settled(store)
        async with _pooled_connections(store) as connections:
            rows = [
                await connection.fetch("SELECT statement FROM pg_prepared_statements") for connection in connections
            ]
        prepared = ["clock_timestamp" in row["statement"] for found in rows for row in found]
        assert any(prepared) == prepares


async def test_a_prepared_statement_that_is_gone_is_answered_with_what_to_do_behind_pgbouncer(
    postgres_url: str,
) -> None:
    async with sql_store(postgres_url) as store:
        for _ in range(10):
            # On each connection of the pool, of which the one that came back first is taken next.
            await store.load(uuid.uuid4())
            await settled(store)
        # As when PgBouncer puts another server connection in the place of the one before.
        async with _pooled_connections(store) as connections:
            for connection in connections:
                await connection.execute("DEALLOCATE ALL")
        with pytest.raises(StoreUnavailable, match=r"InvalidSQLStatementNameError: .*\?pgbouncer=true"):
            await store.load(uuid.uuid4())


@pytest.mark.parametrize("kind", [asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError])
def test_both_errors_of_a_pooled_prepared_statement_name_the_remedy(kind: type[asyncpg.PostgresError]) -> None:
    error = kind('prepared statement "__asyncpg_stmt_1__" is not what it was')
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.UNAVAILABLE
    assert "?pgbouncer=true" in summary_of(error, DIALECTS["postgresql"])


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("got result for unknown protocol state"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_connection_that_the_driver_itself_finds_in_a_wrong_state_is_broken(error: Exception) -> None:
    """As it is raised where SQLAlchemy makes a new connection ready, and where statements go to the driver."""
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.BROKEN


def test_a_connection_that_aiosqlite_is_closing_is_broken() -> None:
    assert failure_kind(ValueError("Connection closed"), DIALECTS["sqlite"]) is FailureKind.BROKEN
    assert failure_kind(ValueError("embedded null character"), DIALECTS["sqlite"]) is FailureKind.INVALID_VALUE


def test_a_value_that_the_driver_cannot_send_is_an_invalid_value() -> None:
    error = asyncpg.DataError("invalid input for query argument $1")
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.INVALID_VALUE


async def test_a_given_engine_is_used_and_not_disposed(database_url: str) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url)
    async with SqlSessionStore(engine) as store:
        session = new_session()
        assert await store.create(session) == await store.load(session.key)
        await settled(store)
        assert engine_of(store) is engine
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedin() > 0
    async with engine.connect() as connection:
        assert (await connection.execute(sa.text("SELECT count(*) FROM mcp_session"))).scalar_one() == 1
        # Nobody else finds the store's isolation level on the connection.
        assert await connection.get_isolation_level() != "AUTOCOMMIT"
    await engine.dispose()


async def test_on_a_given_engine_no_pragma_is_set(sqlite_url: str) -> None:
    await migrate.upgrade(sqlite_url)
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as connection:
        before = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    async with SqlSessionStore(engine) as store:
        await store.create(new_session())
        await settled(store)
        async with engine.connect() as connection:
            after = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
    assert before == after
    assert before[0] == "delete"
    await engine.dispose()


async def test_an_engine_of_ours_writes_ahead_and_syncs_normally(sqlite_url: str) -> None:
    async with sql_store(sqlite_url) as store, engine_of(store).connect() as connection:
        pragmas = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
        assert pragmas == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1}


async def test_a_given_engine_whose_connections_are_all_in_use_makes_the_store_unavailable(
    database_url: str,
) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    store = SqlSessionStore(engine, timeout=2)
    async with engine.connect():
        with pytest.raises(StoreUnavailable):
            await store.load(uuid.uuid4())
    assert await store.load(uuid.uuid4()) is None
    await store.aclose()
    await engine.dispose()


async def test_a_pool_of_one_connection_serves_all_kinds_of_calls(database_url: str) -> None:
    await migrate.upgrade(database_url)
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    async with SqlSessionStore(engine) as store:
        for _ in range(5):
            sessions = [new_session() for _ in range(20)]
            await asyncio.gather(*map(store.create, sessions))
            calls = [
                *(store.load(session.key) for session in sessions),
                *(store.claim(session.key, instance="b", restores=0) for session in sessions),
                *map(store.create, [new_session() for _ in range(20)]),
            ]
            assert None not in await asyncio.gather(*calls)
        await settled(store)
    await engine.dispose()


async def test_a_closed_store_refuses_calls_until_it_is_opened_again(database_url: str) -> None:
    await migrate.upgrade(database_url)
    store = SqlSessionStore(database_url)
    session = new_session()
    await store.create(session)
    await store.aclose()
    assert connections_checked_out(store) == 0
    with pytest.raises(StoreClosed, match=r"open\(\)"):
        await store.load(session.key)
    await store.open()
    assert await store.load(session.key) is not None
    await store.aclose()


def test_a_store_that_is_used_in_a_second_event_loop_says_so(sqlite_url: str) -> None:
    store = SqlSessionStore(sqlite_url)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(store.open())
        with pytest.raises(ConfigurationError, match="event loop"):
            second.run(store.load(uuid.uuid4()))
        first.run(store.aclose())
        second.run(store.open())
        assert second.run(store.load(uuid.uuid4())) is None
        second.run(store.aclose())
