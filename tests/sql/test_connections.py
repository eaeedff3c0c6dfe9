"""The connections of a process: how many it takes, and what it does when the database has no room for more."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.activity import Activity
from mcp_session_store.errors import ConfigurationError, StoreUnavailable
from mcp_session_store.event_log import LARGE_APPEND
from mcp_session_store.records import EndReason, EventKind, NewEvent
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore, connections
from mcp_session_store.sql.dialects import DIALECTS
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.failures import failure_kind, summary_of
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_message, new_presence, new_session
from tests.support.databases import (
    connections_checked_out,
    engine_of,
    execute,
    kept_connections,
    migrated,
    settled,
    sql_store,
)
from tests.support.internals import listen_anew, waits_of
from tests.support.roles import limited

pytestmark = pytest.mark.anyio


async def _connections_of(postgres_url: str, url: str) -> int:
    user = make_url(url).username
    rows = await execute(postgres_url, f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'")
    return int(rows[0][0])


async def _connections_are_gone(postgres_url: str, url: str) -> None:
    """Wait until the database counts none of a role's connections: it ends a closed one a little later."""
    async with asyncio.timeout(20):
        while await _connections_of(postgres_url, url):
            await asyncio.sleep(0.02)


async def _use(store: SqlSessionStore) -> None:
    """Open, restore and end a session."""
    session = new_session()
    await store.create(session)
    assert await store.load(session.key) is not None
    await asyncio.gather(
        store.read_journal(session.key),
        store.changes(None),
        store.touch([Activity(key=session.key, first_age=0.0, last_age=0.0)]),
    )
    assert await store.end(session.key, reason=EndReason.CLIENT)


async def test_stores_that_share_few_connections_fail_no_call(postgres_url: str) -> None:
    async with (
        limited(postgres_url, limit=5) as url,
        # More patience than they need, for a machine that has more to do; so in the next test.
        SqlSessionStore(url, timeout=15) as one,
        SqlSessionStore(url, timeout=15) as other,
    ):
        await asyncio.gather(*(_use(store) for store in (one, other) for _ in range(100)))
        await settled(one, other)


async def test_a_store_works_with_a_single_connection_of_the_database(postgres_url: str) -> None:
    async with limited(postgres_url, limit=1) as url:
        async with SqlSessionStore(url, timeout=15) as store, asyncio.timeout(60):
            listening = asyncio.create_task(store.listen(lambda _: None))
            await asyncio.gather(*(_use(store) for _ in range(50)))
            assert not listening.done()  # it goes without
            listening.cancel()
            await settled(store)
        await _connections_are_gone(postgres_url, url)


@pytest.mark.parametrize("kind", ["url", "engine"])
async def test_everything_works_on_one_connection(database_url: str, kind: str) -> None:
    await migrated(database_url)
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    store = SqlSessionStore(database_url, pool_size=1) if kind == "url" else SqlSessionStore(engine)
    async with store, SqlEventLog(store) as log, SqlMailbox(store) as mailbox, asyncio.timeout(60):
        session = new_session()
        await store.create(session)
        events = [NewEvent(stream="s", position=n, kind=EventKind.NOTIFICATION, message="m") for n in (1, 2)]
        large = [NewEvent(stream="l", position=1, kind=EventKind.NOTIFICATION, message="m" * (LARGE_APPEND + 1))]
        await asyncio.gather(
            *(_use(store) for _ in range(20)),
            log.append(session.key, events),
            log.append(session.key, large),
            mailbox.beat(new_presence(1)),
            mailbox.post([new_message(1, recipient=None, sender=2)]),
            mailbox.receive(1, delivered={2: 0}),
            log.sweep(),
            mailbox.sweep(),
            store.sweep(),
        )
        await settled(store, log, mailbox)
        assert connections_checked_out(store) == 0
    await engine.dispose()


async def test_a_store_takes_no_more_connections_than_its_pool_has(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GROW_AFTER", 0.0)
    async with limited(postgres_url, limit=20) as url, SqlSessionStore(url, pool_size=3) as store:
        most = 0
        calls = asyncio.gather(*(_use(store) for _ in range(50)))
        while not calls.done():
            most = max(most, await _connections_of(postgres_url, url))
        await calls
        # Once more, because they are kept: all calls may have ended during the first look.
        most = max(most, await _connections_of(postgres_url, url))
        assert 1 < most <= 3


async def test_connections_that_are_no_longer_needed_are_closed_but_one(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GROW_AFTER", 0.0)
    monkeypatch.setattr(connections, "NEEDED_FOR", 0.3)
    async with sql_store(migrated_url) as store:
        while len(await kept_connections(store)) < 2:
            await asyncio.gather(*(_use(store) for _ in range(5)))
            await settled(store)
        async with asyncio.timeout(20):
            while len(await kept_connections(store)) > 1:
                await store.load(uuid.uuid4())
                await settled(store)
                await asyncio.sleep(0.1)
        await store.load(uuid.uuid4())
        await settled(store)
        assert len(await kept_connections(store)) == 1


async def test_a_database_without_room_for_the_first_connection_is_waited_for(postgres_url: str) -> None:
    async with limited(postgres_url, limit=1) as url, SqlSessionStore(url) as store:
        dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        await store.aclose()
        await _connections_are_gone(postgres_url, url)
        other = await asyncpg.connect(dsn)
        opening = asyncio.create_task(store.open())
        await asyncio.sleep(0.3)
        assert not opening.done()
        await other.close()
        await opening


async def test_a_database_without_room_is_away_after_the_timeout_and_says_what_to_do(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with limited(postgres_url, limit=1) as url, SqlSessionStore(url):
        store = SqlSessionStore(url, timeout=3)
        with pytest.raises(StoreUnavailable, match=r"too many connections for role .*; allow more connections there"):
            await store.load(uuid.uuid4())
        await store.aclose()
    assert caplog.text.count("refuses this process another connection") == 1


async def test_a_migration_on_first_contact_needs_no_second_connection(postgres_url: str) -> None:
    async with limited(postgres_url, limit=1) as url:
        await migrate.downgrade(postgres_url, revision="base")
        await execute(postgres_url, f"GRANT CREATE ON SCHEMA public TO {make_url(url).username}")
        async with SqlSessionStore(url, auto_upgrade=True, timeout=30) as store:
            await _use(store)


async def test_a_connection_that_listens_is_given_up_for_those_for_queries(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GROW_AFTER", 0.0)
    async with limited(postgres_url, limit=3) as url, SqlSessionStore(url) as store:
        heard = asyncio.Event()
        listening = asyncio.create_task(store.listen(lambda _: heard.set()))
        await heard.wait()
        while not listening.done():
            await asyncio.gather(*(_use(store) for _ in range(5)))
        with pytest.raises(StoreUnavailable, match="no room for a connection that listens"):
            listening.result()
        await settled(store)


async def test_a_connection_listens_only_where_there_is_room_for_another_after_it(postgres_url: str) -> None:
    async with limited(postgres_url, limit=2) as url, SqlSessionStore(url) as store:
        listen_anew(store, without_for=(0.05, 0.05))
        heard = asyncio.Event()
        listening = asyncio.create_task(store.listen(lambda _: heard.set()))
        await asyncio.sleep(0.3)
        assert not heard.is_set()
        await execute(postgres_url, f"ALTER ROLE {make_url(url).username} CONNECTION LIMIT 3")
        await asyncio.wait_for(heard.wait(), 20)
        listening.cancel()


async def test_a_connection_that_broke_on_its_way_to_a_cancelled_call_goes_to_no_other(database_url: str) -> None:
    await migrated(database_url)
    async with SqlSessionStore(database_url) as store:
        pool = connections.Connections(engine_of(store), store.database.dialect, most=1)
        first = await pool.take()
        waiting = asyncio.create_task(pool.take())
        await asyncio.sleep(0)
        assert pool.give_back(first)
        assert pool.note_break() == []
        waiting.cancel()
        await asyncio.wait({waiting})
        async with asyncio.timeout(20):
            second = await pool.take()
        assert second is not first
        assert first.closed
        await pool.close(second, broken=False)
        await pool.aclose(timeout=5)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("53300", "sorry, too many clients already"),
        ("53300", "remaining connection slots are reserved for roles with the SUPERUSER attribute"),
        (
            "XX000",
            "MaxClientsInSessionMode: max clients reached - in Session mode",
        ),
        ("XX000", "Max client connections reached"),
        ("08P01", "no more connections allowed (max_client_conn)"),
    ],
)
def test_a_refusal_for_want_of_room_is_known_by_its_code_or_by_the_words_of_a_pooler(code: str, text: str) -> None:
    error = asyncpg.PostgresError.new({"C": code, "M": text})
    assert failure_kind(error, DIALECTS["postgresql"]) is FailureKind.NO_ROOM
    assert "pool_size" in summary_of(error, DIALECTS["postgresql"])


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("08P01", "password authentication failed", "refuses the user or the password"),
        ("08P01", "no such user: app", "refuses the user or the password"),
        (
            "08P01",
            'server login has been failing, cached error: FATAL: password authentication failed for user "app"',
            "refuses the user or the password",
        ),
        ("08P01", 'database "nodb" does not exist', "no such database"),
        ("08P01", "no such database: nodb", "no such database"),
        ("08P01", "unsupported startup parameter: options", "does not take the parameter 'options'"),
        ("XX000", "Tenant or user not found", "the pooler knows no such user"),
        ("XX000", "The requested endpoint could not be found, or you don't have access to it", "names no endpoint"),
        ("08P01", "server login has been failing, try again later (server_login_retry)", None),
        ("08P01", "query_wait_timeout", None),
        ("57P01", "pgbouncer cannot connect to server", None),
    ],
)
def test_what_a_pooler_says_of_a_url_that_cannot_work_is_final(code: str, text: str, expected: str | None) -> None:
    error = asyncpg.PostgresError.new({"C": code, "M": text, "S": "FATAL"})
    reason = DIALECTS["postgresql"].misconfiguration(error, make_url("postgresql://app@pooler/nodb"))
    assert (reason is None) if expected is None else (reason is not None and expected in reason), reason


async def test_waiting_for_room_takes_no_memory_on_an_engine_either(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "RETRY", 0.001)
    async with limited(postgres_url, limit=0) as url:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
        pool = connections.PoolOfEngine(engine, DIALECTS["postgresql"])
        taking = asyncio.create_task(pool.take())
        await asyncio.sleep(1)
        assert not taking.done()
        taking.cancel()
        assert waits_of(pool) <= 1
        await asyncio.wait({taking})
        assert waits_of(pool) == 0
        await engine.dispose()


@pytest.mark.parametrize("size", [0, -1, True, "2", 1.5])
def test_a_pool_has_a_whole_number_of_connections(size: object) -> None:
    with pytest.raises(ConfigurationError, match=r"pool_size=.* is not a positive whole number"):
        SqlSessionStore("postgresql://host/db", pool_size=size)  # type: ignore[arg-type]


async def test_an_engine_has_a_pool_of_its_own(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match="pool_size goes with a database URL"):
        SqlSessionStore(engine, pool_size=2)
