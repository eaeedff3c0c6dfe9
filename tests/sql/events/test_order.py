"""Events appear in their order, however late one is committed: a reader skips none, and reads none twice."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import events_table, logs_table
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import engine_of, execute, migrated, settled, sql_store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

pytestmark = pytest.mark.anyio

STREAM = "instance.1"


async def positions(log: SqlEventLog, key: UUID) -> list[int]:
    page = await log.read(key, STREAM, after=0)
    assert page is not None
    return [event.position for event in page.events]


async def test_an_event_that_is_committed_late_is_not_overtaken(database_url: str) -> None:
    async with sql_store(database_url, timeout=30) as store:
        log = SqlEventLog(store)
        key = (await store.create(new_session())).key
        first = await log.append(key, [new_event(0)])
        assert first is not None
        logs, events = logs_table(), events_table()
        late = new_event(1)
        row = {
            "key": key,
            "sequence": first + 1,
            "stream": late.stream,
            "position": late.position,
            "previous": late.previous,
            "kind": late.kind.value,
            "message": late.message,
            "total_bytes": 1000,
            "created_at": StoreClock(),
        }
        engine = engine_of(store)
        async with engine.connect() as holder:
            # Another instance stores one, and its commit takes its time.
            await holder.exec_driver_sql(store.database.dialect.begin)
            grow = sa.update(logs).where(logs.c.key == key)
            await holder.execute(grow.values(sequence=logs.c.sequence + 1, total_bytes=1000))
            await holder.execute(sa.insert(events).values(row))
            behind = asyncio.ensure_future(log.append(key, [new_event(2)]))
            for _ in range(20):
                assert await positions(log, key) == [0]
                assert await log.heads([key]) == {key: first}
            assert not behind.done()
            await holder.exec_driver_sql("COMMIT")
        assert await behind == first + 2
        assert await positions(log, key) == [0, 1, 2]
        await settled(store, log)
        await log.aclose()


async def follow(log: SqlEventLog, key: UUID, stream: str, over: asyncio.Event) -> list[int]:
    """The positions of a stream as a reader gets them, page by page, until nothing more comes."""
    seen: list[int] = []
    after = 0
    while True:
        last_time = over.is_set()
        page = await log.read(key, stream, after=after, limit=random.randint(1, 7))
        if page is not None:
            seen += [event.position for event in page.events]
            after = page.events[-1].sequence if page.more else page.last
        if last_time and (page is None or not page.more):
            return seen
        await asyncio.sleep(0)


async def write(logs: Sequence[SqlEventLog], key: UUID, streams: Sequence[str], counts: dict[str, int]) -> None:
    """Store events of some streams of one session, each by any instance, several at once."""
    for _ in range(40):
        calls = []
        for stream in random.sample(streams, random.randint(1, len(streams))):
            start, count = counts[stream], random.choice([1, 1, 3])
            counts[stream] += count
            events = [new_event(number, stream=stream) for number in range(start, start + count)]
            calls.append(random.choice(logs).append(key, events))
        assert None not in await asyncio.gather(*calls)


async def test_each_reader_gets_exactly_what_many_writers_sent(database_url: str) -> None:
    await migrated(database_url)
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(SqlSessionStore(database_url, timeout=60)) for _ in range(3)]
        logs = [SqlEventLog(store) for store in stores]
        keys = [(await stores[0].create(new_session())).key for _ in range(3)]
        writers, readers, counts = [], [], []
        over = asyncio.Event()
        for key in keys:
            # Two writers in each session, each with streams of its own.
            for writer in range(2):
                streams = [f"instance.{writer}{number}" for number in range(3)]
                counts.append(dict.fromkeys(streams, 0))
                writers.append(write(logs, key, streams, counts[-1]))
                readers.append(
                    [asyncio.ensure_future(follow(random.choice(logs), key, stream, over)) for stream in streams]
                )
        await asyncio.gather(*writers)
        over.set()
        for sent, reading in zip(counts, readers, strict=True):
            for count, seen in zip(sent.values(), await asyncio.gather(*reading), strict=True):
                assert seen == list(range(count))
        for store, log in zip(stores, logs, strict=True):
            await log.aclose()
            await settled(store, log)
    if "postgresql" in database_url:
        ask = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert [row.deadlocks for row in await execute(database_url, ask)] == [0]
