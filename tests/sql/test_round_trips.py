"""Ways to the database and back: one for a batch of calls, however many share it."""

from __future__ import annotations

import asyncio
import queue
from asyncio import selector_events
from typing import TYPE_CHECKING, Any

import aiosqlite.core
import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason, Principal
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlStateStore
from mcp_session_store.testing import new_event, new_message, new_session, new_state
from mcp_session_store.testing.mailbox.suite import run_instances
from tests.support.databases import empty, settled, sql_store

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


async def _create_within_limits(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    store.retention = RetentionPolicy(per_principal=10_000)
    await asyncio.gather(*(store.create(new_session(principal=Principal.of(client_id="a"))) for _ in records))


async def _end(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    assert all(await asyncio.gather(*(store.end(record.key, reason=EndReason.CLIENT) for record in records)))


async def _write_journal(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    assert await store.write_journal(records[0].key, method="m", subject="", params="{}") == 1


async def _read_journal(store: SqlSessionStore, records: Sequence[SessionRecord]) -> None:
    assert await store.read_journal(records[0].key) == []


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize(
    ("operation", "on_postgres"),
    [
        (_create, 1),
        (_load, 1),
        (_claim, 1),
        (_touch, 1),
        (_read_journal, 1),
        # The transaction is begun and committed on the way.
        (_end, 4),
        (_create_within_limits, 6),
        (_write_journal, 6),
    ],
)
async def test_a_batch_goes_to_the_database_once(
    migrated_url: str,
    trips: RoundTrips,
    operation: Callable[[SqlSessionStore, Sequence[SessionRecord]], Awaitable[None]],
    on_postgres: int,
    count: int,
) -> None:
    async with sql_store(migrated_url) as store:
        for _ in range(2):  # on Postgres the first time prepares the statement
            records = await asyncio.gather(*(store.create(new_session()) for _ in range(count)))
            await settled(store)
            trips.count = 0
            await operation(store, records)
            await settled(store)
        assert trips.count == (on_postgres if "postgresql" in migrated_url else 1)


@pytest.mark.parametrize("count", [1, 16])
async def test_the_heads_of_a_batch_of_calls_are_read_at_once(migrated_url: str, trips: RoundTrips, count: int) -> None:
    async with sql_store(migrated_url) as store, SqlEventLog(store) as log:
        keys = [record.key for record in await asyncio.gather(*(store.create(new_session()) for _ in range(count)))]
        with_log = keys[: (count + 1) // 2]
        await asyncio.gather(*(log.append(key, [new_event(0)]) for key in with_log))
        for _ in range(2):  # on Postgres the first time prepares the statement
            await settled(store, log)
            trips.count = 0
            heads = await asyncio.gather(*(log.heads([key]) for key in keys))
            await settled(store, log)
        assert trips.count == 1
        assert heads == [{key: 1} if key in with_log else {} for key in keys]


@pytest.mark.parametrize("count", [1, 16])
async def test_a_batch_of_posts_and_a_receive_go_to_the_database_once_each(
    migrated_url: str, trips: RoundTrips, count: int
) -> None:
    await empty(migrated_url)
    async with sql_store(migrated_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2, 3)
        delivered: dict[int, int] = {}
        for turn in range(3):  # on Postgres the first time prepares the statement
            messages = [new_message(count * turn + number, recipient=None, sender=1) for number in range(count)]
            await settled(store, mailbox)
            trips.count = 0
            assert await asyncio.gather(*(mailbox.post([message]) for message in messages)) == [set()] * count
            await settled(store, mailbox)
            posted, trips.count = trips.count, 0
            # The receive also removes what was delivered in the turn before.
            page = await mailbox.receive(2, delivered=delivered)
            await settled(store, mailbox)
            received = trips.count
            delivered[1] = page.messages[-1].sequence
            assert len(page.messages) == count
        assert (posted, received) == (1, 1)


@pytest.mark.parametrize("count", [1, 16])
async def test_a_batch_of_reads_of_state_is_one_query_and_one_of_writes_a_transaction(
    migrated_url: str, trips: RoundTrips, count: int
) -> None:
    async with sql_store(migrated_url) as store, SqlStateStore(store) as state:
        keys = [record.key for record in await asyncio.gather(*(store.create(new_session()) for _ in range(count)))]
        for _ in range(2):  # on Postgres the first time prepares the statement
            await settled(store, state)
            trips.count = 0
            assert await asyncio.gather(*(state.put(key, new_state("a")) for key in keys)) == [0] * count
            await settled(store, state)
            written, trips.count = trips.count, 0
            found = await asyncio.gather(*(state.get(key, ["a"]) for key in keys))
            await settled(store, state)
            read = trips.count
        assert all(values is not None and set(values) == {"a"} for values in found)
        # Begin, lock, read, write and commit.
        assert (read, written) == (1, 5 if "postgresql" in migrated_url else 1)
