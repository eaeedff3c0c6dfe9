"""Touching, ending and sweeping the same sessions at once: none is revived, and none that is active is ended."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason, Principal
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.testing import new_session
from tests.support.databases import connections_checked_out, execute, migrated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

pytestmark = pytest.mark.anyio

SESSIONS = 300
ROUNDS = 6
LONG = RetentionPolicy(idle=timedelta(hours=1))
SHORT = RetentionPolicy(idle=timedelta(milliseconds=40))
"""By which a session that expired a second ago is swept at once."""


async def stores_on(stack: AsyncExitStack, url: str, count: int, policy: RetentionPolicy) -> list[SqlSessionStore]:
    # More patience than calls need: SQLite's writers wait for one another.
    return [await stack.enter_async_context(SqlSessionStore(url, retention=policy, timeout=60)) for _ in range(count)]


async def expire_all(url: str) -> None:
    table = sessions_table()
    await execute(url, sa.update(table).where(table.c.ended_at.is_(None)).values(expires_at=StoreClock(-1.0)))


async def reasons(url: str) -> dict[UUID, str | None]:
    table = sessions_table()
    rows = await execute(url, sa.select(table.c.key, table.c.end_reason))
    return {row.key: row.end_reason for row in rows}


class Race:
    """What was told to those who touched, ended and looked, and whether it fits together."""

    def __init__(self, keys: Sequence[UUID]) -> None:
        self.keys = keys
        self.gone: set[UUID] = set()
        """Sessions of which somebody was told that they are not live."""
        self.touched: set[UUID] = set()
        """Sessions that were extended in this round."""
        self.ended: set[UUID] = set()
        self.swept = 0

    async def touch(self, store: SqlSessionStore) -> None:
        for _ in range(3):
            keys = random.sample(self.keys, 60)
            gone_before = self.gone & set(keys)
            # The activity was before the expiry, and is reported after it.
            not_live = (await store.touch([Activity(key=key, first_age=60.0, last_age=0.0) for key in keys])).not_live
            assert gone_before <= not_live
            self.gone |= not_live
            self.touched |= set(keys) - not_live

    async def end(self, store: SqlSessionStore) -> None:
        keys = random.sample(self.keys, 15)
        outcomes = await asyncio.gather(*(store.end(key, reason=EndReason.CLIENT) for key in keys))
        ended = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome}
        assert not ended & self.ended, "a session ended twice"
        self.ended |= ended
        self.gone |= ended

    async def sweep(self, store: SqlSessionStore) -> None:
        for _ in range(3):
            report = await store.sweep(limit=random.choice([5, 20, 50]))
            self.swept += report.expired

    async def look(self, store: SqlSessionStore) -> None:
        for _ in range(5):
            keys = random.sample(self.keys, 20)
            gone_before = self.gone & set(keys)
            records = await asyncio.gather(*map(store.load, keys))
            live = {record.key for record in records if record is not None}
            assert not live & gone_before, "a session that was ended lives again"


async def test_touching_ending_and_sweeping_at_once_revives_nothing_and_ends_nothing_active(
    database_url: str,
) -> None:
    await migrated(database_url)
    async with AsyncExitStack() as stack:
        users = await stores_on(stack, database_url, 3, LONG)
        sweepers = await stores_on(stack, database_url, 2, SHORT)
        records = await asyncio.gather(*(users[0].create(new_session()) for _ in range(SESSIONS)))
        race = Race([record.key for record in records])
        extended: set[UUID] = set()
        for _ in range(ROUNDS):
            await expire_all(database_url)
            extended |= race.touched
            race.touched = set()
            await asyncio.gather(
                *(race.touch(store) for store in users),
                *(race.end(store) for store in users),
                *(race.look(store) for store in users),
                *(race.sweep(store) for store in sweepers),
            )
            told = await reasons(database_url)
            # Who was extended is live, unless somebody ended it on purpose.
            assert {told[key] for key in race.touched - race.ended} <= {None}
            assert {told[key] for key in race.ended} <= {"client"}
            counts = Counter(told.values())
            assert (counts["client"], counts["expired"]) == (len(race.ended), race.swept)
            for key in race.gone:
                assert told[key] is not None or await users[0].load(key) is None
        assert race.swept > 0
        assert extended
        for store in (*users, *sweepers):
            await store.aclose()
            assert connections_checked_out(store) == 0


async def test_limits_ends_touches_and_sweeps_at_once_are_no_deadlock(database_url: str) -> None:
    await migrated(database_url)
    principals = [Principal.of(client_id=str(number)) for number in range(4)]
    policy = RetentionPolicy(idle=timedelta(hours=1), per_principal=3, anonymous=50)
    async with AsyncExitStack() as stack:
        stores = await stores_on(stack, database_url, 3, policy)
        keys: list[UUID] = []

        async def create(store: SqlSessionStore) -> None:
            for _ in range(4):
                sessions = [new_session(principal=random.choice([None, *principals])) for _ in range(12)]
                keys.extend(session.key for session in sessions)
                await asyncio.gather(*map(store.create, sessions), return_exceptions=True)

        async def use(store: SqlSessionStore) -> None:
            for _ in range(12):
                some = random.sample(keys, min(len(keys), 30))
                await store.touch([Activity(key=key, first_age=0.0, last_age=0.0) for key in some])
                await asyncio.gather(
                    *(store.end(key, reason=EndReason.CLIENT) for key in some[:3]),
                    *(store.claim(key, instance="instance-b", restores=0) for key in some[3:10]),
                    *(store.write_journal(key, method="m", subject="", params="{}") for key in some[5:8]),
                    store.sweep(limit=5),
                )

        await asyncio.gather(*map(create, stores), *map(use, stores))
        table = sessions_table()
        live = await execute(
            database_url,
            sa.select(table.c.principal_digest, sa.func.count().label("live"))
            .where(table.c.ended_at.is_(None), table.c.principal_digest.is_not(None))
            .group_by(table.c.principal_digest),
        )
        assert live
        assert {row.live for row in live} <= {1, 2, 3}
        for store in stores:
            await store.aclose()
            assert connections_checked_out(store) == 0
    if "postgresql" in database_url:
        deadlocks = await execute(
            database_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
        assert [row.deadlocks for row in deadlocks] == [0]
