"""Storing, trimming and ending at once: nothing is left of sessions that ended, and of others nothing is missing."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.retention import EventPolicy, RetentionPolicy
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.events.trim import KEPT
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import engine_of, execute, migrated, settled
from tests.support.internals import database_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

pytestmark = pytest.mark.anyio

SESSIONS = 12
"""New ones in each round."""
ROUNDS = 4
MOST_ROUNDS = 20
"""When by chance, as on a busy machine, not everything has happened that can."""
LONG = RetentionPolicy(idle=timedelta(hours=1))
SHORT = RetentionPolicy(idle=timedelta(milliseconds=40))
"""By which a session that expired a second ago is swept at once."""
POLICY = EventPolicy(max_events_per_session=40, max_age=timedelta(days=1))
LEFT = int(KEPT * 40)
"""How many events of a session are left at least when there were too many."""


class Race:
    """What was told to those who stored events and ended sessions, and whether it fits together."""

    def __init__(self) -> None:
        self.keys: list[UUID] = []
        self.ended: set[UUID] = set()
        """Sessions of which somebody was told that they have ended."""
        self.told: dict[UUID, dict[int, tuple[str, int]]] = defaultdict(dict)
        """Stream and position of each event that was stored, by its sequence."""
        self.aged: dict[UUID, int] = {}
        """Up to which sequence events were made too old."""
        self.refused = 0
        self.trimmed = 0
        self.expired = 0

    @property
    def saw_everything(self) -> bool:
        """Whether sessions ended and expired, events were removed, and appends refused."""
        return min(self.refused, self.trimmed, self.expired, len(self.ended)) > 0

    async def write(self, log: SqlEventLog, writer: str) -> None:
        """Store events of all sessions, many appends at once."""
        for turn in range(5):
            keys = random.sample(self.keys, len(self.keys))
            await asyncio.gather(*(self._append(log, key, f"{writer}.{turn}") for key in keys))

    async def _append(self, log: SqlEventLog, key: UUID, stream: str) -> None:
        had_ended = key in self.ended
        events = [new_event(number, stream=stream) for number in range(random.choice([1, 1, 2, 6]))]
        first = await log.append(key, events)
        if first is None:
            self.refused += 1
            return
        assert not had_ended, "an event was stored in a session that had ended"
        told = {first + place: (stream, event.position) for place, event in enumerate(events)}
        assert not told.keys() & self.told[key].keys(), "two events have one sequence"
        self.told[key] |= told

    async def end(self, store: SqlSessionStore) -> None:
        """End some sessions, together."""
        for _ in range(3):
            await asyncio.sleep(random.uniform(0, 0.03))
            keys = random.sample(self.keys, 2)
            outcomes = await asyncio.gather(*(store.end(key, reason=EndReason.CLIENT) for key in keys))
            self.ended |= {key for key, outcome in zip(keys, outcomes, strict=True) if outcome}

    async def expire(self, store: SqlSessionStore) -> None:
        """Let a session expire, and sweep it and what others have let expire."""
        for key in random.sample(self.keys, 2):
            await asyncio.sleep(random.uniform(0, 0.03))
            sessions = sessions_table()
            expired = sa.update(sessions).where(sessions.c.key == key, sessions.c.ended_at.is_(None))
            await _commit(store, expired.values(expires_at=StoreClock(-1.0)))
            self.expired += (await store.sweep()).expired

    async def age(self, log: SqlEventLog) -> None:
        """Make all that some sessions have now too old."""
        logs, events = logs_table(), events_table()
        long_ago = StoreClock(-2 * 86_400.0)
        for key in random.sample(self.keys, 4):
            await asyncio.sleep(random.uniform(0, 0.01))
            # The log first, as all do who change it.
            of_log = sa.update(logs).where(logs.c.key == key, logs.c.oldest_at.is_not(None)).values(oldest_at=long_ago)
            of_events = sa.update(events).where(events.c.key == key).values(created_at=long_ago)
            for (sequence,) in await _commit(log, of_log.returning(logs.c.sequence), of_events):
                self.aged[key] = sequence

    async def trim(self, log: SqlEventLog) -> None:
        """Remove what is too old."""
        for _ in range(8):
            await asyncio.sleep(random.uniform(0, 0.02))
            self.trimmed += (await log.sweep(limit=random.choice([5, 50, 500]))).removed

    async def assert_fits(self, url: str) -> None:
        """Check what is stored by now."""
        sessions, logs, events = sessions_table(), logs_table(), events_table()
        live = {row.key for row in await execute(url, sa.select(sessions.c.key).where(sessions.c.ended_at.is_(None)))}
        assert not live & self.ended
        stored: dict[UUID, dict[int, tuple[str, int]]] = defaultdict(dict)
        for row in await execute(url, sa.select(events)):
            stored[row.key][row.sequence] = row.stream, row.position
        log_of = {row.key: row for row in await execute(url, sa.select(logs))}
        assert stored.keys() <= live, "an event is left of a session that ended"
        assert log_of.keys() <= live, "a log is left of a session that ended"
        for key in live & self.told.keys():
            log, rows, told = log_of[key], stored[key], self.told[key]
            # All that were stored were told, without a gap, and the oldest are gone.
            assert sorted(told) == list(range(1, log.sequence + 1))
            assert sorted(rows) == list(range(log.trimmed + 1, log.sequence + 1))
            assert rows == {sequence: told[sequence] for sequence in rows}
            assert log.trimmed <= max(self.aged.get(key, 0), log.sequence - LEFT)
            assert len(rows) <= POLICY.max_events_per_session


async def _commit(where: SqlSessionStore | SqlEventLog, *statements: sa.Executable) -> Sequence[sa.Row[Any]]:
    """Run statements beside a store, in one transaction; what the first returns."""
    async with engine_of(where).connect() as connection:
        await connection.exec_driver_sql(database_of(where).dialect.begin)
        first, *_ = [await _rows(connection, statement) for statement in statements]
        await connection.exec_driver_sql("COMMIT")
    return first


async def _rows(connection: AsyncConnection, statement: sa.Executable) -> Sequence[sa.Row[Any]]:
    result = await connection.execute(statement)
    return result.all() if result.returns_rows else []


async def test_storing_trimming_and_ending_at_once_leaves_what_it_must_and_nothing_else(database_url: str) -> None:
    await migrated(database_url)
    race = Race()
    async with AsyncExitStack() as stack:
        # More patience than calls need: SQLite's writers wait for one another.
        users, sweepers = [
            [
                await stack.enter_async_context(SqlSessionStore(database_url, retention=policy, timeout=60))
                for _ in range(count)
            ]
            for count, policy in ((3, LONG), (2, SHORT))
        ]
        logs = [await stack.enter_async_context(SqlEventLog(store, policy=POLICY)) for store in (*users, *sweepers)]
        for turn in range(MOST_ROUNDS):
            if turn >= ROUNDS and race.saw_everything:
                break
            # So that first events are stored, too, while sessions end.
            records = await asyncio.gather(*(users[0].create(new_session()) for _ in range(SESSIONS)))
            race.keys = [*random.sample(race.keys, min(SESSIONS, len(race.keys))), *(record.key for record in records)]
            await asyncio.gather(
                *(race.write(log, f"{turn}.{number}") for number, log in enumerate(logs[:3])),
                *(race.end(store) for store in users),
                *(race.expire(store) for store in sweepers),
                *(race.age(log) for log in logs[:2]),
                *(race.trim(log) for log in logs[-2:]),
            )
            for store in sweepers:
                race.expired += (await store.sweep()).expired
            await race.assert_fits(database_url)
        assert race.saw_everything
        await settled(*users, *sweepers, *logs)
    if "postgresql" in database_url:
        ask = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert [row.deadlocks for row in await execute(database_url, ask)] == [0]
