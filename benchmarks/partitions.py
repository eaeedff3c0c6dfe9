"""Measure the removal of old events: deleted one by one by a sweep, or dropped with their partition.

    python -m benchmarks.partitions postgresql://user@host/db  # on a database that may be filled

Sessions with events are created twice, in one table and in partitions; the older half of each session's events is too
old. That half is removed while events are stored and read at a steady rate. The output shows the duration, the bytes
written to the database's log, the size of the table and its index before and afterwards, and the latency of storing and
reading meanwhile. A sweep follows the drop, and corrects the counts in the log of each session.

A second part times the conversion of the table to partitions and back. A third one times reading a page of ten events,
storing an event and ending a session, by the number of partitions.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from benchmarks.figures import percentile
from mcp_session_store.records import EndReason
from mcp_session_store.retention import EventPolicy, EventSweepReport
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.admin.partitions import EventPartitions
from mcp_session_store.sql.engine import checked_url, make_migration_engine
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_event, new_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence
    from uuid import UUID

HOUR: Final = timedelta(hours=1)
MESSAGE_BYTES: Final = 300
PATIENCE: Final = 600.0

SESSIONS: Final = """
    INSERT INTO mcp_session (key, namespace, initialize_params, protocol_version, client_name, client_version,
        instance_hint, created_at, last_seen_at, expires_at, restores, revision)
    SELECT gen_random_uuid(), 'default', '{}', '2025-11-25', 'client', '1', 'instance', now(), now(),
        now() + interval '1 day', 0, 0 FROM generate_series(1, :sessions)
"""
LOGS: Final = """
    INSERT INTO mcp_session_log (key, namespace, sequence, total_bytes, trimmed, trimmed_bytes, oldest_at)
    SELECT key, namespace, :each, :each * CAST(:size AS bigint), 0, 0, now() - interval '3 hours' FROM mcp_session
"""
# In the order of real use: one event of each session, then the next of each.
EVENTS: Final = """
    INSERT INTO mcp_session_event (key, sequence, stream, position, previous, kind, message, total_bytes, created_at)
    SELECT key, number, 'instance.1', number, number - 1, 'notification', repeat('x', :size),
        number * CAST(:size AS bigint), CASE WHEN number <= :old THEN now() - interval '3 hours' ELSE :recent END
    FROM generate_series(CAST(:begin AS bigint), CAST(:end AS bigint)) AS number, mcp_session ORDER BY number
"""
SIZE: Final = """
    SELECT CAST(sum(pg_table_size(oid)) AS bigint) AS rows, CAST(sum(pg_indexes_size(oid)) AS bigint) AS indexes
    FROM pg_class
    WHERE relname LIKE 'mcp_session_event%' AND relkind = 'r' AND relnamespace = CAST(:schema AS regnamespace)
"""


class Place:
    """A schema of the database that holds events."""

    def __init__(self, url: str, schema: str) -> None:
        self.url = url
        self.schema = schema
        self.engine = make_migration_engine(*checked_url(url))

    async def run(self, statement: str, **parameters: object) -> Sequence[sa.Row[Any]]:
        async with self.engine.connect() as connection:
            await connection.exec_driver_sql(f"SET search_path = {self.schema}")
            result = await connection.execute(sa.text(statement), parameters)
            return result.all() if result.returns_rows else []

    async def make(self, sessions: int, each: int, *, recent: datetime) -> list[UUID]:
        """Fill the tables: half of the events are three hours old, the others are from `recent`. Return the keys."""
        await self.run(SESSIONS, sessions=sessions)
        await self.run(LOGS, each=each, size=MESSAGE_BYTES)
        step = max(1, 100_000 // sessions)
        for begin in range(1, each + 1, step):
            end = min(each, begin + step - 1)
            await self.run(EVENTS, size=MESSAGE_BYTES, old=each // 2, recent=recent, begin=begin, end=end)
        await self.run("VACUUM ANALYZE")
        return [row.key for row in await self.run("SELECT key FROM mcp_session")]

    async def sizes(self) -> str:
        (row,) = await self.run(SIZE, schema=self.schema)
        return f"{row.rows / 1e6:.0f} + {row.indexes / 1e6:.0f} MB"

    async def written(self) -> int:
        (row,) = await self.run("SELECT CAST(pg_current_wal_lsn() - '0/0' AS bigint) AS position")
        position: int = row.position
        return position


class Requests:
    """Requests that store and read events at a steady rate, with the latency of each in milliseconds."""

    def __init__(self, log: SqlEventLog, keys: Sequence[UUID], *, rate: float) -> None:
        self.log = log
        self.keys = itertools.cycle(keys)
        self.rate = rate
        self.took: dict[str, list[float]] = {}
        self.position = 1_000_000

    async def during(self, work: Awaitable[object]) -> float:
        """Send requests while `work` runs, and return its duration in seconds."""
        self.took = {"store": [], "read": []}
        sending = asyncio.ensure_future(self._send())
        began = time.perf_counter()
        await work
        seconds = time.perf_counter() - began
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        return seconds

    async def _send(self) -> None:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due = began + number / self.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._timed("store" if number % 2 else "read", due))

    async def _timed(self, kind: str, due: float) -> None:
        key = next(self.keys)
        if kind == "store":
            self.position += 1
            await self.log.append(key, [new_event(self.position)])
        else:
            await self.log.read(key, "instance.1", after=self.position, limit=10)
        self.took[kind].append(1000 * (time.perf_counter() - due))

    def __str__(self) -> str:
        return "   ".join(
            f"{kind}: p50 {percentile(took, 50):.1f}, p99 {percentile(took, 99):.1f}, max {max(took):.0f} ms"
            for kind, took in self.took.items()
            if took
        )


async def sweep_all(log: SqlEventLog, done: list[int]) -> None:
    """Sweep as the background task of an app does: after each step, pause for as long as the step took."""
    report = EventSweepReport(more=True)
    while report.more:
        began = time.perf_counter()
        report = await log.sweep()
        done.append(report.removed)
        await asyncio.sleep(time.perf_counter() - began)


async def remove(place: Place, arguments: argparse.Namespace, *, parted: bool) -> None:
    await migrate.upgrade(place.url, schema=place.schema)
    print(f"{'partitions' if parted else 'one table'}: {arguments.sessions} sessions with {arguments.each} events")
    policy = EventPolicy(max_age=HOUR, max_bytes_per_session=1024**3)
    async with (
        SqlSessionStore(place.url, schema=place.schema, timeout=PATIENCE) as store,
        SqlEventLog(store, policy=policy) as log,
        EventPartitions(place.url, schema=place.schema, timeout=PATIENCE) as partitions,
    ):
        recent = datetime.now(UTC)
        if parted:
            await partitions.partition(HOUR, max_age=HOUR)
            recent += HOUR
        keys = await place.make(arguments.sessions, arguments.each, recent=recent)
        print(f"  filled: {await place.sizes()}", flush=True)
        requests = Requests(log, keys, rate=arguments.rate)
        await requests.during(asyncio.sleep(5))
        await requests.during(asyncio.sleep(arguments.seconds))
        print(f"  quiet    {requests}")
        before = await place.written()
        removed: list[int] = []
        if parted:
            # Drop all partitions up to the next full hour: with the negative age, the current one is too old, too.
            seconds = await requests.during(partitions.maintain(max_age=-HOUR))
            print(f"  dropped in {seconds:.2f} s, {(await place.written() - before) / 1e6:.1f} MB of WAL")
            print(f"  meanwhile {requests}")
            before = await place.written()
        seconds = await requests.during(sweep_all(log, removed))
        wal = (await place.written() - before) / 1e6
        print(f"  swept in {seconds:.1f} s, {sum(removed)} events deleted, {wal:.1f} MB of WAL")
        print(f"  meanwhile {requests}")
        print(f"  afterwards: {await place.sizes()}", end="", flush=True)
        began = time.perf_counter()
        await place.run("VACUUM")
        print(f", after VACUUM ({time.perf_counter() - began:.1f} s): {await place.sizes()}", flush=True)


async def convert(place: Place) -> None:
    """Time the conversion to partitions and back, during which the table is locked."""
    async with EventPartitions(place.url, schema=place.schema, timeout=PATIENCE) as partitions:
        (row,) = await place.run("SELECT count(*) AS events FROM mcp_session_event")
        for name, change in (
            ("partitioned", partitions.partition(HOUR, max_age=HOUR)),
            ("one table again", partitions.unpartition()),
        ):
            began = time.perf_counter()
            await change
            print(f"{name}, {row.events} events: {time.perf_counter() - began:.1f} s", flush=True)


async def look(place: Place, number: int) -> None:
    """Time reading, storing and ending a session in a number of partitions."""
    await migrate.upgrade(place.url, schema=place.schema)
    async with (
        SqlSessionStore(place.url, schema=place.schema) as store,
        SqlEventLog(store) as log,
        EventPartitions(place.url, schema=place.schema) as partitions,
    ):
        keys = [(await store.create(new_session())).key for _ in range(200)]
        for key in keys:
            await log.append(key, [new_event(0)])
        if number:
            # One partition for the present, the default one, and the rest for the future.
            await partitions.partition(HOUR, max_age=HOUR, ahead=number - 2)
        hours = max(1, number - 2)
        await place.run(
            "INSERT INTO mcp_session_event SELECT key, number, 'instance.1', number, number - 1, 'notification', "
            "number, now() + number * CAST(:hours AS int) * interval '1 hour' / 500, repeat('x', :size) "
            "FROM mcp_session_log, generate_series(2, 500) AS number",
            size=MESSAGE_BYTES,
            hours=hours,
        )
        await place.run("UPDATE mcp_session_log SET sequence = 500, total_bytes = 500")
        await place.run("VACUUM ANALYZE")
        took: dict[str, list[float]] = {"read": [], "store": [], "end": []}

        async def timed(name: str, call: Awaitable[object]) -> None:
            began = time.perf_counter()
            await call
            took[name].append(1000 * (time.perf_counter() - began))

        for turn in range(1000):
            key = keys[turn % 100]
            await timed("read", log.read(key, "instance.1", after=490, limit=10))
            await timed("store", log.append(key, [new_event(turn + 500)]))
        for key in keys[100:]:
            await timed("end", store.end(key, reason=EndReason.CLIENT))
        shown = "   ".join(f"{name} p50 {percentile(times, 50):.2f} ms" for name, times in took.items())
        print(f"{f'{number} partitions' if number else 'one table'}: {shown}", flush=True)


async def run(arguments: argparse.Namespace) -> None:
    whole, parted = Place(arguments.postgres, "whole"), Place(arguments.postgres, "parted")
    await remove(whole, arguments, parted=False)
    await remove(parted, arguments, parted=True)
    await convert(whole)
    for number in (0, 8, 24, 48):
        await look(Place(arguments.postgres, f"of{number}"), number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--sessions", type=int, default=2_000)
    parser.add_argument("--each", type=int, default=1_000, help="events per session")
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the requests before the removal")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
