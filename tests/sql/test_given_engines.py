"""Engines as their owners set them up: whichever way they control transactions, ours and theirs both work."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mcp_session_store import ConfigurationError, SqlEventLog, SqlSessionStore, durable_app
from mcp_session_store.records import EventKind, NewEvent
from mcp_session_store.sql.admin.session_list import SessionFilter
from mcp_session_store.sql.admin.sessions import SessionDirectory
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session
from tests.support.asgi import Client
from tests.support.instances import running

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

pytestmark = pytest.mark.anyio


def plain(url: str) -> AsyncEngine:
    return create_async_engine(url)


def one_connection(url: str) -> AsyncEngine:
    return create_async_engine(url, pool_size=1, max_overflow=0)


def no_pool(url: str) -> AsyncEngine:
    return create_async_engine(url, poolclass=NullPool)


def begin_by_listeners(url: str) -> AsyncEngine:
    """As SQLAlchemy's manual says for SQLite on all versions of Python."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def begin_by_the_driver(url: str) -> AsyncEngine:
    """As SQLAlchemy's manual says for SQLite since Python 3.12."""
    return create_async_engine(url, connect_args={"autocommit": False})


def begin_immediate_by_listeners(url: str) -> AsyncEngine:
    """As many do, so that two writers wait for each other instead of failing."""
    engine = create_async_engine(url, connect_args={"isolation_level": None})
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def other_isolation_levels(url: str) -> AsyncEngine:
    """One for the driver, which begins by it, and another by SQLAlchemy's name."""
    return create_async_engine(url, isolation_level="SERIALIZABLE", connect_args={"isolation_level": "EXCLUSIVE"})


def pragmas_by_listeners(url: str) -> AsyncEngine:
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()

    return engine


ENGINES = [
    plain,
    begin_immediate_by_listeners,
    other_isolation_levels,
    pragmas_by_listeners,
    one_connection,
    no_pool,
    begin_by_listeners,
    # Python before 3.12 has no `autocommit` of SQLite's connections.
    *([begin_by_the_driver] if sys.version_info >= (3, 12) else []),
]


async def theirs_works(engine: AsyncEngine) -> None:
    """Check that transactions of the owner's begin and are rolled back, whatever ran on the connections before."""
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE IF NOT EXISTS notes (note TEXT)"))
        await connection.execute(sa.text("INSERT INTO notes VALUES ('kept')"))
    connection = await engine.connect()
    await connection.execute(sa.text("INSERT INTO notes VALUES ('rolled back')"))
    await connection.rollback()
    assert set((await connection.execute(sa.text("SELECT note FROM notes"))).scalars()) == {"kept"}
    await connection.close()


@pytest.mark.parametrize("make", ENGINES)
async def test_a_given_engine_of_sqlite_serves_its_owner_and_this_package(
    sqlite_url: str, make: Callable[[str], AsyncEngine]
) -> None:
    engine = make(sqlite_url)
    await theirs_works(engine)
    await migrate.upgrade(engine)
    await theirs_works(engine)
    for _ in range(2):
        async with SqlSessionStore(engine) as store:
            session = new_session()
            assert await store.create(session) == await store.load(session.key)
            log = SqlEventLog(store)
            await log.append(session.key, [NewEvent(stream="s", position=0, kind=EventKind.PRIMING, message=None)])
            await theirs_works(engine)
            async with SessionDirectory(engine) as directory:
                assert await directory.count(SessionFilter()) >= 1
            await log.aclose()
        await theirs_works(engine)
        # Its owner may do so at any time, and the engine has a new pool then.
        await engine.dispose()
    await migrate.check(engine)
    assert await migrate.current(engine) is not None
    await engine.dispose()


async def test_an_engine_whose_options_would_begin_transactions_is_refused(postgres_url: str) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+asyncpg://")
    engine = plain(url).execution_options(isolation_level="REPEATABLE READ")
    for use in (SqlSessionStore, SqlEventLog, partial(durable_app, MCPServer("notes"))):
        with pytest.raises(ConfigurationError, match=r"isolation_level='REPEATABLE READ'.*without them"):
            use(engine)
    with pytest.raises(ConfigurationError, match="isolation_level"):
        await migrate.upgrade(engine)
    for works in (
        create_async_engine(url, isolation_level="REPEATABLE READ"),
        plain(url).execution_options(isolation_level="AUTOCOMMIT"),
    ):
        await migrate.upgrade(works)
        async with SqlSessionStore(works) as store:
            session = new_session()
            assert await store.create(session) == await store.load(session.key)
        await works.dispose()


async def test_an_engine_goes_to_durable_app_as_it_does_to_a_store(database_url: str) -> None:
    engine = begin_by_listeners(database_url) if "sqlite" in database_url else plain(database_url)
    app = durable_app(MCPServer("notes"), engine, auto_upgrade=True)
    for _ in range(2):
        async with running(app) as host:
            client = Client(app, host)
            await client.handshake()
            assert (await client.ping()).status == 200
        async with engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1
    await engine.dispose()
