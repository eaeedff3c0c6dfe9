"""Measure a sweep of very many sessions: its duration, and the latency of the requests beside it.

    python -m benchmarks.sweeping                            # SQLite in a temporary file
    python -m benchmarks.sweeping postgresql://user@host/db  # and Postgres, on a database that may be filled

A table of two million sessions is created, of which one million have expired. Requests come at a steady rate,
whether earlier ones are answered or not: loads, touches, and a session that is created and ended. Half of them
go to the store that sweeps, as in an instance that sweeps, and half to another store on the same database. They
run by turns without a sweep and beside one like that of an app's background task: in steps that on
SQLite adapt to the time that they take (or are always of one size, with --limit), with a pause after each step that is
as long as the step, or a multiple of it.

The output shows the 50th and 99th percentile of both, the ratio of the latter, and the sessions swept per second.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from benchmarks.figures import percentile
from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy, SweepPace, SweepReport
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.engine import checked_url, make_migration_engine
from mcp_session_store.sql.schema import migrate
from mcp_session_store.store import LEAST_SWEEP, SWEEP_LIMIT
from mcp_session_store.testing import new_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

CHUNK: Final = 100_000
"""Rows that one statement inserts."""

GOAL: Final = 2.0
"""Times by which the 99th percentile of the requests may rise."""

PARAMS: Final = '{"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}'

# Rows (Postgres) or keys (SQLite) come in random order, so that expired sessions lie among live ones. A live session
# expires in a day, which is the policy's idle time.
FILL: Final = {
    "postgresql": """
        INSERT INTO mcp_session (key, namespace, initialize_params, protocol_version, client_name, client_version,
            principal_digest, instance_hint, created_at, last_seen_at, expires_at, restores, revision)
        SELECT gen_random_uuid(), 'default', CAST(:params AS text), '2025-11-25',
            'client ' || number % 50, '1', lpad(to_hex(number % 1000), 64, '0'), 'instance ' || number % 20,
            now() - interval '3 days', now() - interval '2 days',
            now() + CASE WHEN number < :expired THEN interval '-1 days' ELSE interval '1 days' END
                + number * interval '1 millisecond', 0, 0
        FROM generate_series(CAST(:begin AS bigint), CAST(:end AS bigint) - 1) AS number
        ORDER BY random()
    """,
    "sqlite": """
        WITH RECURSIVE numbers (number) AS (
            SELECT :begin UNION ALL SELECT number + 1 FROM numbers WHERE number < :end - 1
        )
        INSERT INTO mcp_session (key, namespace, initialize_params, protocol_version, client_name, client_version,
            principal_digest, instance_hint, created_at, last_seen_at, expires_at, restores, revision)
        SELECT lower(hex(randomblob(16))), 'default', CAST(:params AS text), '2025-11-25',
            'client ' || number % 50, '1', printf('%064x', number % 1000), 'instance ' || number % 20,
            unixepoch('now', '-3 days') * 1000, unixepoch('now', '-2 days') * 1000,
            unixepoch('now', CASE WHEN number < :expired THEN '-1 days' ELSE '1 days' END) * 1000 + number, 0, 0
        FROM numbers
    """,
}


async def fill(url: str, rows: int, expired: int, *, schema: str | None = None) -> list[UUID]:
    """Fill the table, and return the keys of some live sessions."""
    # An engine without a time limit for statements.
    engine = make_migration_engine(*checked_url(url))
    async with engine.connect() as connection:
        if schema is not None:
            await connection.exec_driver_sql(f"SET search_path = {schema}")
        if connection.dialect.name == "sqlite":
            # Of this connection alone. Keys come in random order, so that each row changes other pages.
            await connection.exec_driver_sql("PRAGMA synchronous=OFF")
            await connection.exec_driver_sql("PRAGMA cache_size=-500000")
        statement = sa.text(FILL[connection.dialect.name])
        for begin in range(0, rows, CHUNK):
            bounds = {"begin": begin, "end": min(begin + CHUNK, rows), "expired": expired, "params": PARAMS}
            await connection.execute(statement, bounds)
        await connection.exec_driver_sql("VACUUM ANALYZE" if connection.dialect.name == "postgresql" else "ANALYZE")
        live = sa.text(f"SELECT key FROM mcp_session ORDER BY expires_at DESC LIMIT {min(10_000, rows - expired)}")
        return list((await connection.execute(live.columns(key=sa.Uuid()))).scalars())


@dataclass
class Requests:
    """Requests at a steady rate, with the latency of each in milliseconds."""

    stores: dict[str, SqlSessionStore]
    keys: list[UUID]
    rate: float
    took: dict[str, list[float]] = field(default_factory=dict)
    failed: int = 0
    """Number of all requests that failed."""

    async def run(self) -> None:
        """Send requests until cancelled."""
        self.took = {name: [] for name in self.stores}
        began = time.perf_counter()
        kinds = itertools.cycle([self._load, self._touch, self._create_and_end])
        names = itertools.cycle(self.stores)
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due = began + number / self.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                # Two cycles of different length, so that each kind goes to each store.
                kind = next(kinds)
                group.create_task(self._timed(next(names), kind, due))

    async def _timed(self, name: str, kind: Callable[[SqlSessionStore], Awaitable[None]], due: float) -> None:
        try:
            await kind(self.stores[name])
        except Exception as error:
            self.failed += 1
            print(f"  a request failed: {error}", file=sys.stderr)
        self.took[name].append(1000 * (time.perf_counter() - due))

    async def _load(self, store: SqlSessionStore) -> None:
        await store.load(random.choice(self.keys))

    async def _touch(self, store: SqlSessionStore) -> None:
        await store.touch([Activity(key=random.choice(self.keys), first_age=0.0, last_age=0.0)])

    async def _create_and_end(self, store: SqlSessionStore) -> None:
        created = await store.create(new_session())
        await store.end(created.key, reason=EndReason.CLIENT)

    async def during(self, work: Awaitable[object]) -> None:
        """Send requests while `work` runs."""
        sending = asyncio.ensure_future(self.run())
        await work
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending


class Sweeping:
    """A sweep that can be interrupted: its report, and the longest hold and the sessions of each step."""

    def __init__(self, store: SqlSessionStore, *, limit: int | None, pause: float) -> None:
        self.store = store
        self.limit = limit
        self.pause = pause
        self.pace = SweepPace(SWEEP_LIMIT, least=LEAST_SWEEP)
        self.report = SweepReport(more=True)
        self.seconds = 0.0
        self.held: list[float] = []
        self.sizes: list[float] = []

    async def run(self, at_most: float) -> None:
        """Sweep for some seconds, or until there is no more to do."""
        began = time.perf_counter()
        while self.report.more and time.perf_counter() - began < at_most:
            step_began = time.perf_counter()
            step = await self.store.sweep(limit=self.limit or self.pace.limit)
            pause = self.pace.pause_after(step, time.perf_counter() - step_began)
            self.report += step
            self.held.append(step.longest)
            self.sizes.append(step.expired)
            await asyncio.sleep(self.pause * pause)
        self.seconds += time.perf_counter() - began


async def measure(name: str, url: str, arguments: argparse.Namespace) -> None:
    await migrate.upgrade(url)
    policy = RetentionPolicy()
    async with SqlSessionStore(url, retention=policy) as store, SqlSessionStore(url, retention=policy) as other:
        began = time.perf_counter()
        keys = await fill(url, arguments.rows, arguments.expired)
        print(f"{name}: {arguments.rows} sessions, {arguments.expired} of them expired")
        print(f"  filled in {time.perf_counter() - began:.0f} s", flush=True)
        requests = Requests({"the instance that sweeps": store, "another instance": other}, keys, arguments.rate)
        sweeping = Sweeping(store, limit=arguments.limit, pause=arguments.pause)
        await requests.during(asyncio.sleep(2))
        quiet: dict[str, list[float]] = {instance: [] for instance in requests.stores}
        busy: dict[str, list[float]] = {instance: [] for instance in requests.stores}
        for _ in range(arguments.rounds):
            for took, work in ((quiet, asyncio.sleep(arguments.seconds)), (busy, sweeping.run(arguments.at_most))):
                await requests.during(work)
                for instance, values in requests.took.items():
                    took[instance] += values
        for instance in requests.stores:
            without, beside = quiet[instance], busy[instance]
            ratio = percentile(beside, 99) / percentile(without, 99)
            print(
                f"  {instance:<25} p50 {percentile(without, 50):6.1f} -> {percentile(beside, 50):6.1f} ms   "
                f"p99 {percentile(without, 99):6.1f} -> {percentile(beside, 99):6.1f} ms   "
                f"ratio {ratio:.2f} (goal: at most {GOAL:g}{', **missed**' if ratio > GOAL else ''})"
            )
        print(
            f"  {sweeping.report.expired / sweeping.seconds:.0f} sessions/s   "
            f"{sweeping.report.expired} in {sweeping.seconds:.0f} s   "
            f"of a step: {percentile(sweeping.sizes, 50):.0f} sessions, held up others for "
            f"p50 {1000 * percentile(sweeping.held, 50):.1f}, p99 {1000 * percentile(sweeping.held, 99):.1f} ms   "
            f"failed requests: {requests.failed}"
        )


async def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        await measure("SQLite", f"sqlite:///{Path(folder) / 'sessions.db'}", arguments)
    if arguments.postgres is not None:
        await measure("Postgres", arguments.postgres, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments of `run`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="?", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--expired", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each without a sweep and then with one")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of the requests without a sweep, per round"
    )
    parser.add_argument("--at-most", type=float, default=30.0, help="longest duration of the sweep, per round")
    parser.add_argument("--limit", type=int, help="sessions per step, instead of steps that adapt")
    parser.add_argument("--pause", type=float, default=1.0, help="pause after a step, as a multiple of its duration")
    return parser


def main() -> None:
    asyncio.run(run(parser().parse_args()))


if __name__ == "__main__":
    main()
