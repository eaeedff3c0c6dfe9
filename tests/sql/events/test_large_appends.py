"""Large events are stored beside the small ones: they hold up no other session, and take little memory."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.event_log import LARGE_APPEND
from mcp_session_store.sql import SqlEventLog
from mcp_session_store.sql.schema.tables import logs_table
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import engine_of, settled, sql_store
from tests.support.plans import given_to_driver

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio

LARGE = "x" * (LARGE_APPEND + 1)


async def opened(store: SqlSessionStore, log: SqlEventLog, sessions: int) -> list[UUID]:
    """Create sessions with a log each."""
    keys = [(await store.create(new_session())).key for _ in range(sessions)]
    await asyncio.gather(*(log.append(key, [new_event(0)]) for key in keys))
    return keys


async def in_order_of_their_end(tasks: Sequence[asyncio.Task[int | None]]) -> list[str]:
    """Return the names of tasks in the order in which they ended."""
    ended: list[str] = []
    for task in tasks:
        task.add_done_callback(lambda task: ended.append(task.get_name()))
    await asyncio.gather(*tasks)
    await asyncio.sleep(0)
    return ended


async def test_a_small_event_does_not_wait_for_the_large_ones_that_came_first(sqlite_url: str) -> None:
    async with sql_store(sqlite_url) as store:
        log = SqlEventLog(store)
        *greedy, modest = await opened(store, log, 9)
        large = [
            asyncio.create_task(log.append(key, [new_event(1, message=3 * LARGE)]), name=f"large {n}")
            for n, key in enumerate(greedy)
        ]
        await asyncio.sleep(0)
        small = asyncio.create_task(log.append(modest, [new_event(1)]), name="small")
        ended = await in_order_of_their_end([*large, small])
        # There is one writer, so that it waits for the large event that is under way.
        assert ended.index("small") <= 2
        await settled(store, log)


async def test_a_large_event_that_hangs_holds_up_small_ones_neither_before_nor_after_it(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store:
        log = SqlEventLog(store)
        greedy, modest = await opened(store, log, 2)
        logs = logs_table()
        async with engine_of(store).connect() as holder:
            await holder.execution_options(isolation_level="READ COMMITTED")
            await holder.execute(sa.select(logs.c.key).where(logs.c.key == greedy).with_for_update())
            hanging = asyncio.create_task(log.append(greedy, [new_event(1, message=LARGE)]))
            for position in range(1, 4):
                assert await log.append(modest, [new_event(position)]) == position + 1
            assert not hanging.done()
            await holder.rollback()
        assert await hanging == 2
        await settled(store, log)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([LARGE, "small", "small", LARGE], id="large first"),
        pytest.param(["small", LARGE], id="small first"),
    ],
)
async def test_the_events_of_a_session_are_stored_in_their_order_whatever_their_sizes(
    database_url: str, sizes: list[str]
) -> None:
    async with sql_store(database_url) as store:
        log = SqlEventLog(store)
        key, other = await opened(store, log, 2)
        busy = [asyncio.create_task(log.append(other, [new_event(1, message=message)])) for message in (LARGE, "small")]
        await asyncio.sleep(0)
        appends = [
            asyncio.create_task(log.append(key, [new_event(position, message=message)]))
            for position, message in enumerate(sizes, 1)
        ]
        await asyncio.sleep(0)
        # A caller that leaves changes nothing, because its event may be stored yet.
        appends[0].cancel()
        appends.append(asyncio.create_task(log.append(key, [new_event(len(sizes) + 1)])))
        await asyncio.gather(*busy, *appends, return_exceptions=True)
        page = await log.read(key, new_event().stream, after=0)
        assert page is not None
        positions = [event.position for event in page.events]
        assert positions == sorted(positions)
        assert set(positions) >= {0, *range(2, len(sizes) + 2)}
        await settled(store, log)


async def test_a_statement_stores_events_of_one_mebibyte_at_most_or_one_event(database_url: str) -> None:
    async with sql_store(database_url) as store:
        log = SqlEventLog(store)
        keys = await opened(store, log, 12)
        with given_to_driver(store) as few:
            await log.append(keys[0], [new_event(1)])
        with given_to_driver(store) as many:
            await asyncio.gather(*(log.append(key, [new_event(2, message="x" * LARGE_APPEND)]) for key in keys))
        assert len(many) == 3 * len(few)
        await settled(store, log)


async def test_what_storing_large_events_at_once_takes_is_far_below_their_size(database_url: str) -> None:
    async with sql_store(database_url, timeout=30) as store:
        log = SqlEventLog(store)
        keys = await opened(store, log, 20)
        messages = [str(n).zfill(2) + "x" * (2 * 1024**2) for n in range(len(keys))]
        size = sum(map(len, messages))
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await asyncio.gather(
                *(log.append(key, [new_event(1, message=message)]) for key, message in zip(keys, messages, strict=True))
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - before < size / 2
        await settled(store, log)
