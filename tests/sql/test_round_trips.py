"""Ways to the database and back: one for a batch of calls, however many share it."""

from __future__ import annotations

import asyncio
import queue
from asyncio import selector_events
from typing import TYPE_CHECKING, Any

import aiosqlite.core
import pytest

from mcp_session_store.records import Activity
from mcp_session_store.testing import new_session
from tests.support.databases import settled, sql_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mcp_session_store.records import SessionRecord
    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio


class RoundTrips:
    """Counts what is given to the threads of SQLite's connections, and what is sent to Postgres."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        trips = self
        send = selector_events._SelectorSocketTransport.write  # type: ignore[attr-defined]

        class Queue:
            def __init__(self) -> None:
                self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
                self.get = self._items.get

            def put_nowait(self, item: object) -> None:
                trips.count += 1
                self._items.put_nowait(item)

        def write(transport: object, data: bytes) -> None:
            trips.count += 1
            send(transport, data)

        monkeypatch.setattr(aiosqlite.core, "SimpleQueue", Queue)
        monkeypatch.setattr(selector_events._SelectorSocketTransport, "write", write)  # type: ignore[attr-defined]


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> RoundTrips:
    return RoundTrips(monkeypatch)


async def _create(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    await asyncio.gather(*(store.create(new_session()) for _ in records))


async def _load(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    assert await asyncio.gather(*(store.load(record.key) for record in records)) == records


async def _claim(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    claims = (store.claim(record.key, instance=record.instance_hint, restores=0) for record in records)
    assert None not in await asyncio.gather(*claims)


async def _touch(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    await store.touch([Activity(key=record.key, first_age=0.0, last_age=0.0) for record in records])


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("operation", [_create, _load, _claim, _touch])
async def test_a_batch_goes_to_the_database_once(
    migrated_url: str,
    trips: RoundTrips,
    operation: Callable[[SqlSessionStore, Sequence[SessionRecord]], Awaitable[None]],
    count: int,
) -> None:
    async with sql_store(migrated_url) as store:
        records = await asyncio.gather(*(store.create(new_session()) for _ in range(count)))
        for _ in range(2):  # on Postgres the first time prepares the statement
            records = await asyncio.gather(*(store.create(new_session()) for _ in range(count)))
            await settled(store)
            trips.count = 0
            await operation(store, records)
            await settled(store)
        assert trips.count == 1
