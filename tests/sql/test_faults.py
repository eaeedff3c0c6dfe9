"""Databases that break, stop, hang and are locked: calls fail honestly, and go on when it is over."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback
import uuid
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.activity import Activity
from mcp_session_store.errors import SessionStoreError, StoreClosed, StoreUnavailable
from mcp_session_store.records import EndReason, JournalEntry
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.dialects.private_names import call_in_thread
from mcp_session_store.testing import new_session
from tests.support.databases import (
    behind_proxy,
    connections_checked_out,
    expire,
    keep_connections,
    kept_connections,
    migrated,
    settled,
    sql_store,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from uuid import UUID

    from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.anyio


async def _create(store: SqlSessionStore, key: UUID) -> None:
    session = new_session(key=key)
    assert await store.create(session) == await store.load(key)


async def _load(store: SqlSessionStore, key: UUID) -> None:
    record = await store.load(key)
    assert record is not None
    assert record.key == key


async def _claim(store: SqlSessionStore, key: UUID) -> None:
    claimed = await store.claim(key, instance="instance-b", restores=0)
    assert claimed is not None
    assert claimed.restores == 1


async def _replace_initialize(store: SqlSessionStore, key: UUID) -> None:
    assert await store.replace_initialize(
        key, initialize_params='{"x": 1}', protocol_version="2025-06-18", client_name="", client_version=""
    )
    record = await store.load(key)
    assert record is not None
    assert record.initialize_params == '{"x": 1}'


async def _touch(store: SqlSessionStore, key: UUID) -> None:
    assert (await store.touch([Activity(key=key, first_age=0.0, last_age=0.0)])).not_live == set()


async def _end(store: SqlSessionStore, key: UUID) -> None:
    assert await store.end(key, reason=EndReason.CLIENT) is True


async def _create_within_limits(store: SqlSessionStore, key: UUID) -> None:
    store.retention = RetentionPolicy(per_principal=1)
    first, second = new_session(), new_session(key=key)
    await store.create(first)
    assert await store.create(second) == await store.load(key)
    assert await store.load(first.key) is None


async def _write_journal(store: SqlSessionStore, key: UUID) -> None:
    # Twice where the first answer was lost.
    assert await store.write_journal(key, method="m", subject="s", params="{}") in (1, 2)
    assert await store.read_journal(key) == [JournalEntry(method="m", subject="s", params="{}")]


async def _read_journal(store: SqlSessionStore, key: UUID) -> None:
    assert await store.read_journal(key) == []


async def _changes(store: SqlSessionStore, key: UUID) -> None:
    assert (await store.changes(datetime.now(UTC))).changes is not None


async def _sweep(store: SqlSessionStore, key: UUID) -> None:
    store.retention = RetentionPolicy(idle=timedelta(milliseconds=40))
    await store.sweep()
    assert await store.load(key) is None


# With the tag by which Postgres says that the statement is done.
OPERATIONS = [
    pytest.param(_create, b"INSERT 0", id="create"),
    pytest.param(_load, b"SELECT 1", id="load"),
    pytest.param(_claim, b"UPDATE 1", id="claim"),
    pytest.param(_replace_initialize, b"SELECT 1", id="replace_initialize"),
    pytest.param(_touch, b"UPDATE 1", id="touch"),
    pytest.param(_end, b"SELECT 1", id="end"),
    pytest.param(_create_within_limits, b"COMMIT", id="create within limits"),
    pytest.param(_write_journal, b"COMMIT", id="write_journal"),
    pytest.param(_read_journal, b"SELECT 0", id="read_journal"),
    pytest.param(_changes, b"SELECT ", id="changes"),
    pytest.param(_sweep, b"UPDATE 1", id="sweep"),
]
CREATING = (_create, _create_within_limits)
WITHOUT_KEY = (_changes, _sweep)
"""What sends no key to the database: there any request is the one that is lost."""


async def use_everything(store: SqlSessionStore) -> None:
    """One call of each kind at once: the pool then holds several connections, all with prepared statements."""
    sessions = [new_session() for _ in range(5)]
    await asyncio.gather(*map(store.create, sessions))
    create, load, claim, replaced, touch = (session.key for session in sessions)
    await asyncio.gather(
        store.create(sessions[0]),
        _load(store, load),
        _claim(store, claim),
        _replace_initialize(store, replaced),
        _touch(store, touch),
        _end(store, create),
        return_exceptions=True,
    )
    await settled(store)


@pytest.mark.parametrize(("operation", "tag"), OPERATIONS)
@pytest.mark.parametrize("lost", ["the statement", "the answer"])
async def test_a_connection_that_is_killed_in_the_middle_of_a_call_is_not_noticed(
    postgres_url: str, operation: Callable[[SqlSessionStore, UUID], Awaitable[None]], tag: bytes, lost: str
) -> None:
    async with behind_proxy(postgres_url) as (store, proxy):
        await use_everything(store)
        key = uuid.uuid4()
        if operation not in CREATING:
            await store.create(new_session(key=key))
        if operation is _sweep:
            await expire(store, key)
        if lost == "the answer":
            proxy.kill_on_next_reply(tag)
        else:
            proxy.kill_on_next_request(b"" if operation in WITHOUT_KEY else key.bytes)
        await operation(store, key)
        assert proxy.sprung == 1


@pytest.mark.parametrize(("operation", "tag"), OPERATIONS)
async def test_a_connection_that_is_killed_again_makes_the_store_unavailable_for_that_call(
    postgres_url: str, operation: Callable[[SqlSessionStore, UUID], Awaitable[None]], tag: bytes
) -> None:
    async with behind_proxy(postgres_url) as (store, proxy):
        await use_everything(store)
        key = uuid.uuid4()
        if operation not in CREATING:
            await store.create(new_session(key=key))
        if operation is _sweep:
            await expire(store, key)

        async def kill_for_ever() -> None:
            for count in range(1, 100):
                proxy.kill_on_next_reply(tag[:-1])
                while proxy.sprung < count:
                    await asyncio.sleep(0.001)

        killer = asyncio.ensure_future(kill_for_ever())
        with pytest.raises(StoreUnavailable) as failure:
            await operation(store, key)
        killer.cancel()
        assert failure.value.__cause__ is not None
        proxy.kill_on_next_reply(b"nothing answers so")
        assert await store.load(uuid.uuid4()) is None


async def test_a_session_that_another_had_ended_is_not_ended_by_a_retry(postgres_url: str) -> None:
    async with behind_proxy(postgres_url) as (store, proxy):
        await use_everything(store)
        key = uuid.uuid4()
        await store.create(new_session(key=key))
        await store.end(key, reason=EndReason.OPERATOR)
        proxy.kill_on_next_reply(b"SELECT 0")
        assert await store.end(key, reason=EndReason.CLIENT) is False
        assert proxy.sprung == 1


async def test_all_connections_of_the_pool_may_break_at_once(postgres_url: str) -> None:
    async with behind_proxy(postgres_url) as (store, proxy):
        await use_everything(store)
        sessions = [new_session() for _ in range(6)]
        await asyncio.gather(*map(store.create, sessions))
        await settled(store)
        await keep_connections(store, 4)
        assert len(await kept_connections(store)) >= 4
        proxy.kill_connections()
        created, load, claim, replaced, touch, end = sessions
        await asyncio.gather(
            store.create(created),
            _load(store, load.key),
            _claim(store, claim.key),
            _replace_initialize(store, replaced.key),
            _touch(store, touch.key),
            _end(store, end.key),
        )


async def test_a_database_that_was_restarted_between_two_calls_is_not_noticed(
    stoppable_postgres: PostgresServer,
) -> None:
    with stoppable_postgres.database() as url:
        async with sql_store(url) as store:
            await use_everything(store)
            session = new_session()
            await store.create(session)
            await asyncio.to_thread(stoppable_postgres.stop, "immediate")
            await asyncio.to_thread(stoppable_postgres.start)
            await asyncio.gather(_load(store, session.key), _touch(store, session.key), _create(store, uuid.uuid4()))


async def test_a_database_that_stops_makes_the_store_unavailable_until_it_starts(
    stoppable_postgres: PostgresServer,
) -> None:
    with stoppable_postgres.database() as url:
        async with sql_store(url) as store:
            session = new_session()
            await store.create(session)
            await asyncio.to_thread(stoppable_postgres.stop)
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.load(session.key)
                with pytest.raises(StoreUnavailable):
                    await store.create(new_session())
            await asyncio.to_thread(stoppable_postgres.start)
            assert await store.load(session.key) is not None


async def test_a_database_that_is_down_at_the_start_stops_nothing(postgres_url: str) -> None:
    async with behind_proxy(postgres_url) as (store, proxy):
        proxy.refuse()
        with pytest.raises(StoreUnavailable):
            await store.open()
        with pytest.raises(StoreUnavailable):
            await store.load(uuid.uuid4())
        await proxy.accept()
        assert await store.load(uuid.uuid4()) is None
        await _create(store, uuid.uuid4())


async def test_a_database_that_hangs_is_down_after_the_timeout(postgres_url: str) -> None:
    # Time enough for a busy machine while it answers; so in the next two.
    async with behind_proxy(postgres_url, timeout=2) as (store, proxy):
        await use_everything(store)
        session = new_session()
        await store.create(session)
        proxy.hang()
        async with asyncio.timeout(20):
            for call in (
                store.load(session.key),
                store.create(new_session()),
                store.touch([Activity(key=session.key, first_age=0.0, last_age=0.0)]),
                store.load(session.key),
            ):
                with pytest.raises(StoreUnavailable):
                    await call
        proxy.resume()
        await _load_when_it_is_back(store, session.key)


async def test_a_database_that_hangs_while_it_is_connected_to_is_down_after_the_timeout(postgres_url: str) -> None:
    async with behind_proxy(postgres_url, timeout=2) as (store, proxy):
        proxy.hang()
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable):
                await store.open()
            with pytest.raises(StoreUnavailable):
                await store.load(uuid.uuid4())
        proxy.resume()
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await store.load(uuid.uuid4()) is None
                    break
                except StoreUnavailable:
                    continue


async def test_a_store_whose_database_hangs_can_be_closed(postgres_url: str) -> None:
    async with behind_proxy(postgres_url, timeout=2) as (store, proxy):
        await use_everything(store)
        proxy.hang()
        waiting = asyncio.ensure_future(store.load(uuid.uuid4()))
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await store.aclose()
        with pytest.raises((StoreClosed, StoreUnavailable)):
            await waiting
        assert connections_checked_out(store) == 0


async def _load_when_it_is_back(store: SqlSessionStore, key: UUID) -> None:
    """What began while the database hung may still fail; soon nothing does."""
    async with asyncio.timeout(20):
        while True:
            try:
                record = await store.load(key)
            except StoreUnavailable:
                continue
            assert record is not None
            return


# SQLite

_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


@contextmanager
def locked_by_another_process(url: str) -> Iterator[None]:
    path = make_url(url).database
    assert path is not None
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield


async def _close(driver: Any) -> None:
    await driver.close()


async def _close_beneath(driver: Any) -> None:
    await call_in_thread(driver, lambda connection, _: connection.close(), None)


@pytest.mark.parametrize("close", [_close, _close_beneath])
@pytest.mark.parametrize("call", [_load, _claim, _touch, _end])
async def test_a_connection_that_was_closed_beneath_the_store_is_not_noticed(
    sqlite_url: str,
    call: Callable[[SqlSessionStore, UUID], Awaitable[None]],
    close: Callable[[Any], Awaitable[None]],
) -> None:
    async with sql_store(sqlite_url) as store:
        session = new_session()
        await store.create(session)
        await settled(store)
        for driver in await kept_connections(store):
            await close(driver)
        await call(store, session.key)


async def test_a_file_that_another_process_locks_can_be_read_and_not_written(sqlite_url: str) -> None:
    async with sql_store(sqlite_url, timeout=4) as store:
        session = new_session()
        await store.create(session)
        with locked_by_another_process(sqlite_url):
            async with asyncio.timeout(20):
                with pytest.raises(StoreUnavailable, match="locked"):
                    await store.create(new_session())
                assert await store.load(session.key) is not None
        assert await store.end(session.key, reason=EndReason.CLIENT) is True


async def test_a_driver_that_cannot_be_interrupted_holds_nobody_longer_than_the_timeout(sqlite_url: str) -> None:
    await migrated(sqlite_url)
    engine = create_async_engine(sqlite_url, connect_args={"timeout": 3600})
    async with engine.begin() as connection:
        await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    store = SqlSessionStore(engine, timeout=2)
    session = new_session()
    await store.create(session)
    with locked_by_another_process(sqlite_url):
        async with asyncio.timeout(20):
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.create(new_session())
            assert await store.load(session.key) is not None
    async with asyncio.timeout(20):
        while True:
            try:
                await _touch(store, session.key)
                break
            except StoreUnavailable:
                continue
    await settled(store)
    await store.aclose()
    await engine.dispose()


# What errors say


# Not written out in the calls, whose lines are in tracebacks.
SECRET = "".join(("hidden", "from", "everybody"))


async def test_no_payload_is_in_an_error_or_in_the_log(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mcp_session_store")
    await migrated(sqlite_url)
    # Somebody's own engine, which shows parameters.
    engine = create_async_engine(sqlite_url, connect_args={"timeout": 0.1})
    store = SqlSessionStore(engine)
    with locked_by_another_process(sqlite_url):
        with pytest.raises(StoreUnavailable) as by_sqlalchemy:
            await store.replace_initialize(
                uuid.uuid4(), initialize_params=SECRET, protocol_version="", client_name=SECRET, client_version=""
            )
        with pytest.raises(StoreUnavailable) as by_driver:
            await store.create(new_session(initialize_params=SECRET, client_name=SECRET))
    assert "UPDATE mcp_session" in "".join(traceback.format_exception(by_sqlalchemy.value))
    for failure in (by_sqlalchemy, by_driver):
        assert SECRET not in "".join(traceback.format_exception(failure.value))
        assert failure.value.__cause__ is not None
    assert SECRET not in caplog.text
    await store.aclose()
    await engine.dispose()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let texts that cannot be stored reach the database, in place of the values that only it refuses."""
    for check in ("check_session", "check_texts"):
        monkeypatch.setattr(f"mcp_session_store.sql.sessions.store.{check}", lambda *_, **__: None)


@pytest.mark.parametrize("character", ["\0", "\ud800"], ids=["NUL", "surrogate"])
async def test_no_payload_is_in_the_error_for_a_value_that_the_database_refuses(
    migrated_url: str, character: str, unchecked: None
) -> None:
    async with sql_store(migrated_url) as store:
        with pytest.raises(SessionStoreError, match="does not take a value") as failure:
            await store.create(new_session(initialize_params=SECRET + character))
        assert SECRET not in "".join(traceback.format_exception(failure.value))


@pytest.mark.parametrize("character", ["\0", "\ud800"], ids=["NUL", "surrogate"])
async def test_a_value_that_the_database_refuses_undoes_all_of_a_transaction_and_nothing_else(
    postgres_url: str, character: str, unchecked: None
) -> None:
    async with sql_store(postgres_url, retention=RetentionPolicy(per_principal=5)) as store:
        session = new_session()
        await store.create(session)
        with pytest.raises(SessionStoreError, match="does not take a value"):
            await store.write_journal(session.key, method="m", subject=f"s{character}", params="{}")
        record = await store.load(session.key)
        assert record is not None
        assert record.revision == 0
        assert await store.write_journal(session.key, method="m", subject="s", params="{}") == 1
        texts = ["{}", character, "{}"]
        outcomes = await asyncio.gather(
            *(store.create(new_session(initialize_params=text)) for text in texts), return_exceptions=True
        )
        assert [isinstance(outcome, SessionStoreError) for outcome in outcomes] == [False, True, False]
        assert await store.load(session.key) == replace(record, revision=1)


async def test_no_password_is_in_an_error() -> None:
    store = SqlSessionStore("postgresql://somebody:hunter2@127.0.0.1:1/sessions", timeout=2)
    with pytest.raises(StoreUnavailable) as failure:
        await store.open()
    assert "postgresql://somebody@127.0.0.1:1/sessions" in str(failure.value)
    assert "hunter2" not in "".join(traceback.format_exception(failure.value))
    assert "hunter2" not in repr(store)
    await store.aclose()
