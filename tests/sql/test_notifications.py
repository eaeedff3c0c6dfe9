"""Hints of changes: they arrive on Postgres, their connection may break, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.activity import Activity
from mcp_session_store.errors import StoreClosed, StoreUnavailable
from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.listening import PROBE_CHANNEL
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import connections_checked_out, execute, migrated, settled, sql_store
from tests.support.faults import FaultProxy
from tests.support.internals import channel_name, database_of, listen_anew, listening_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from uuid import UUID

pytestmark = pytest.mark.anyio

NAME = "listens"


def named(url: str) -> str:
    """The URL, with a name by which the database tells the store's connections from others."""
    return f"{url}?application_name={NAME}"


async def backends(url: str) -> int:
    rows = await execute(url, f"SELECT pid FROM pg_stat_activity WHERE application_name = '{NAME}'")
    return len(rows)


async def backends_are(url: str, *counts: int) -> None:
    """Wait until the store has one of these numbers of connections: the database ends a closed one a little later."""
    async with asyncio.timeout(20):
        while await backends(url) not in counts:
            await asyncio.sleep(0.02)


class Hints:
    """What a store hints at, while the context lasts."""

    def __init__(self, store: SqlSessionStore | SqlEventLog) -> None:
        self._store = store
        self._queue: asyncio.Queue[Collection[UUID] | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def next(self) -> Collection[UUID] | None:
        assert self.task is not None
        waiting = asyncio.ensure_future(self._queue.get())
        await asyncio.wait({waiting, self.task}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            assert self.task.done(), "no hint came"
            self.task.result()
        return waiting.result()

    async def __aenter__(self) -> Hints:
        self.task = asyncio.ensure_future(self._store.listen(self._queue.put_nowait))
        # With the first one it says that it listens.
        assert await self.next() is None
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, StoreUnavailable):
            await self.task
        await left(self._store)


async def left(store: SqlSessionStore | SqlEventLog) -> None:
    """Wait until a listener that ended has put everything away."""
    for task in [*listening_of(store), *database_of(store).closing]:
        await asyncio.wait({task})


@asynccontextmanager
async def two_stores(url: str) -> AsyncIterator[tuple[SqlSessionStore, SqlSessionStore]]:
    async with sql_store(url) as here, sql_store(url) as there:
        yield here, there


async def test_what_copies_must_learn_is_hinted_at_and_nothing_else(postgres_url: str) -> None:
    async with two_stores(postgres_url) as (here, there), Hints(here) as hints:
        ended, replaced, journaled = [await there.create(new_session()) for _ in range(3)]
        await there.claim(ended.key, instance="instance-b", restores=0)
        await there.touch([Activity(key=ended.key, first_age=0.0, last_age=0.0)])
        await there.end(uuid.uuid4(), reason=EndReason.CLIENT)
        await there.end(ended.key, reason=EndReason.CLIENT)
        assert await hints.next() == [ended.key]
        await there.end(ended.key, reason=EndReason.CLIENT)
        await there.replace_initialize(
            replaced.key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
        )
        assert await hints.next() == [replaced.key]
        await there.write_journal(journaled.key, method="m", subject="", params="{}")
        assert await hints.next() == [journaled.key]
        there.retention = RetentionPolicy(per_principal=1)
        await there.create(new_session())
        told = await hints.next()
        assert told is not None
        assert set(told) == {replaced.key, journaled.key}


async def test_changes_of_one_transaction_are_one_hint(postgres_url: str) -> None:
    async with two_stores(postgres_url) as (here, there), Hints(here) as hints:
        keys = {(await there.create(new_session())).key for _ in range(20)}
        await asyncio.gather(*(there.end(key, reason=EndReason.CLIENT) for key in keys))
        assert set(await hints.next() or ()) == keys


@pytest.mark.parametrize("count", [200, 201])
async def test_events_of_one_statement_are_one_hint_and_many_a_hint_at_anything(postgres_url: str, count: int) -> None:
    async with two_stores(postgres_url) as (here, there):
        one, other = SqlEventLog(here), SqlEventLog(there)
        async with one, other, Hints(one) as hints:
            keys = [(await there.create(new_session())).key for _ in range(count)]
            quiet = (await there.create(new_session())).key
            for key in (*keys, quiet):
                await other.append(key, [new_event(0)])
            await one.follow(keys)
            # Of one that nobody follows, nobody is told.
            await other.append(quiet, [new_event(1)])
            await asyncio.gather(*(other.append(key, [new_event(1)]) for key in keys))
            told = await hints.next()
            assert told is None if count > 200 else set(told or ()) == set(keys)


async def test_what_others_send_on_the_channel_is_a_hint_at_anything(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store, Hints(store) as hints:
        await execute(postgres_url, f"SELECT pg_notify('{channel_name()}', 'what is this?')")
        assert await hints.next() is None


async def test_a_listener_whose_connection_is_killed_says_so_and_can_begin_again(postgres_url: str) -> None:
    async with two_stores(postgres_url) as (here, there):
        for _ in range(2):
            created = await there.create(new_session())
            async with Hints(here) as hints:
                await there.end(created.key, reason=EndReason.CLIENT)
                assert await hints.next() == [created.key]
                await execute(
                    postgres_url,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND datname = current_database()",
                )
                with pytest.raises(StoreUnavailable):
                    await hints.next()
        assert connections_checked_out(here) == 0


async def test_a_listener_whose_connection_falls_silent_says_so(postgres_url: str) -> None:
    await migrated(postgres_url)
    target = make_url(postgres_url)
    assert target.host is not None
    assert target.port is not None
    async with FaultProxy(target.host, target.port) as proxy:
        there = target.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        async with SqlSessionStore(there, timeout=3) as store:
            listen_anew(store, heartbeat=0.05)
            async with Hints(store) as hints:
                proxy.hang()
                with pytest.raises(StoreUnavailable, match=r"did not answer|lost|cannot serve"):
                    await hints.next()
            proxy.resume()
        assert connections_checked_out(store) == 0


async def test_a_listener_takes_no_place_in_the_pool_and_leaves_no_connection(postgres_url: str) -> None:
    async with sql_store(named(postgres_url)) as store:
        async with Hints(store):
            await settled(store)
            assert connections_checked_out(store) == 0
            await backends_are(postgres_url, 2)
        await backends_are(postgres_url, 1)


async def test_a_listener_on_a_given_engine_leaves_it_as_it_was(postgres_url: str) -> None:
    await migrated(postgres_url)
    engine = create_async_engine(named(postgres_url).partition("?")[0], pool_size=1, max_overflow=0, pool_timeout=10)
    store = SqlSessionStore(engine)
    async with Hints(store) as hints:
        created = await store.create(new_session())
        await store.end(created.key, reason=EndReason.CLIENT)
        assert await hints.next() == [created.key]
    await settled(store)
    await store.aclose()
    async with engine.connect() as connection:
        channels = await connection.execute(sa.text("SELECT pg_listening_channels()"))
        assert channels.all() == []
    await engine.dispose()


async def test_a_listener_may_be_cancelled_at_any_moment(postgres_url: str) -> None:
    async with sql_store(named(postgres_url)) as store:
        for turns in range(0, 120, 3):
            listening = asyncio.ensure_future(store.listen(lambda _: None))
            for _ in range(turns):
                await asyncio.sleep(0)
            listening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await listening
        await left(store)
        await settled(store)
        assert listening_of(store) == set()
        await backends_are(postgres_url, 0, 1)


async def test_closing_the_store_ends_its_listeners(database_url: str) -> None:
    await migrated(database_url)
    store = SqlSessionStore(database_url)
    await store.open()
    listening = [asyncio.ensure_future(store.listen(lambda _: None)) for _ in range(2)]
    await asyncio.sleep(0.05)
    await store.aclose()
    for task in listening:
        with pytest.raises(StoreClosed, match="closed"):
            await task
    assert connections_checked_out(store) == 0
    with pytest.raises(StoreClosed, match="closed"):
        await store.listen(lambda _: None)


async def test_a_database_that_cannot_be_reached_ends_a_listener() -> None:
    store = SqlSessionStore("postgresql://somebody@127.0.0.1:1/sessions", timeout=2)
    with pytest.raises(StoreUnavailable):
        await store.listen(lambda _: None)
    await store.aclose()


async def test_where_hints_do_not_arrive_it_is_said_once_and_nothing_is_held(
    postgres_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "mcp_session_store")
    elsewhere = sa.select(sa.func.pg_notify("elsewhere", sa.bindparam("payload", type_=sa.Text)))
    async with sql_store(named(postgres_url)) as store:
        with monkeypatch.context() as patch:
            # As behind PgBouncer, where LISTEN reaches one connection of the server, and who listens has another.
            patch.setattr(PROBE_CHANNEL, "send", elsewhere)
            listen_anew(store, probe_timeout=0.2, deaf_for=(0.3, 0.3))
            hints: list[object] = []
            listening = asyncio.ensure_future(store.listen(hints.append))
            async with asyncio.timeout(20):
                while "notifications of changes do not arrive" not in caplog.text:
                    await asyncio.sleep(0.01)
            await backends_are(postgres_url, 1)
        async with asyncio.timeout(20):
            while not hints:
                await asyncio.sleep(0.01)
        assert caplog.text.count("notifications of changes do not arrive") == 1
        listening.cancel()
        await asyncio.wait({listening})
        await left(store)
