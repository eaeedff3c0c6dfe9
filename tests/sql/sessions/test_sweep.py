"""A sweep in SQL: how long its steps hold up other writers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.retention import EventPolicy, SweepReport
from mcp_session_store.sql import SqlEventLog, SqlStateStore
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.events import trim
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.sql.sessions import sweep
from mcp_session_store.sql.state import sweep as state_sweep
from mcp_session_store.testing import new_event, new_session, new_state
from tests.support.databases import age_events, engine_of, execute, settled, sql_store

if TYPE_CHECKING:
    from mcp_session_store.records import NewState
    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio

DAY = timedelta(days=1).total_seconds()


def count_time(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let half a second pass between two looks at the clock of a module."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=itertools.count(step=0.5).__next__))


async def expire_all(store: SqlSessionStore) -> None:
    table = sessions_table()
    await execute(store, sa.update(table).values(expires_at=StoreClock(-DAY)))


async def test_a_step_reports_how_long_it_held_up_other_writers(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sql_store(database_url) as store:
        await store.create(new_session())
        await expire_all(store)
        count_time(monkeypatch, sweep)
        report = await store.sweep()
        assert report == SweepReport(expired=1)
        # On Postgres other writers wait for the swept rows only.
        assert report.longest == (0.5 if store.database.dialect.single_writer else 0)


async def test_few_sessions_with_much_state_are_ended_at_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sweep, state_sweep):
        monkeypatch.setattr(module, "ROWS_PER_STEP", 7)

    def values() -> list[NewState]:
        return [new_state(name) for name in "abc"]

    async with sql_store(database_url) as store, SqlStateStore(store) as state:
        for _ in range(5):
            await store.create(new_session(state=values()))
        await expire_all(store)
        assert [(await store.sweep()).expired for _ in range(4)] == [2, 2, 1, 0]
        # An older version ends a session, and leaves its state.
        table = sessions_table()
        for _ in range(5):
            await store.create(new_session(state=values()))
        live = sa.update(table).where(table.c.ended_at.is_(None))
        await execute(store, live.values(ended_at=StoreClock(), expires_at=None, end_reason="expired"))
        assert [(await state.sweep()).removed for _ in range(4)] == [6, 6, 3, 0]


async def test_a_step_that_removes_events_reports_how_long_it_held_up_other_writers(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        assert (await log.sweep()).longest == 0
        key = (await store.create(new_session())).key
        await log.append(key, [new_event(0)])
        await age_events(log, key)
        count_time(monkeypatch, trim)
        report = await log.sweep()
        assert (report.removed, report.longest) == (1, 0.5 if store.database.dialect.single_writer else 0)


async def test_events_are_removed_from_few_logs_at_a_time_where_steps_are_small(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        for _ in range(4):
            key = (await store.create(new_session())).key
            await log.append(key, [new_event(number) for number in range(30)])
            await age_events(log, key)
        report = await log.sweep(limit=100)
        assert (report.removed, report.more) == (60, True)
        kept = await execute(store, sa.select(logs_table().c.sequence).where(logs_table().c.oldest_at.is_not(None)))
        assert len(kept) == 2


async def test_a_change_is_one_call_of_the_thread_of_sqlite(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between two calls of one transaction the event loop serves requests, and all other writers wait for them.
    async with sql_store(sqlite_url) as store, SqlEventLog(store) as log:
        for _ in range(3):
            key = (await store.create(new_session())).key
            await store.write_journal(key, method="m", subject="", params="{}")
            await log.append(key, [new_event(0)])
        await expire_all(store)
        dialect = store.database.dialect
        runs: list[bool] = []
        others: list[str] = []
        run = dialect.run

        def counted(connection: Any, steps: Any, *, writes: bool, atomic: bool = False) -> Any:
            runs.append(writes)
            return run(connection, steps, writes=writes, atomic=atomic)

        def remember(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            others.append(statement)

        monkeypatch.setattr(dialect, "run", counted)
        sa.event.listen(engine_of(store).sync_engine, "before_cursor_execute", remember)
        assert await store.sweep() == SweepReport(expired=3)
        sa.event.remove(engine_of(store).sync_engine, "before_cursor_execute", remember)
        # Looks for work of any kind; looks at the expired sessions and at their events; ends them.
        assert runs == [False, False, True]
        assert others == ["PRAGMA wal_checkpoint(PASSIVE)"]
        await settled(store, log)


@pytest.mark.parametrize("what", ["sessions", "events"])
async def test_a_sweep_leaves_no_commit_a_full_write_ahead_log(sqlite_url: str, what: str) -> None:
    # A commit that finds 1,000 pages there brings them into the file before others may write.
    policy = EventPolicy(max_age=timedelta(hours=1))
    async with sql_store(sqlite_url) as store, SqlEventLog(store, policy=policy) as log:
        for _ in range(30):
            sessions = [new_session() for _ in range(50)]
            await asyncio.gather(*map(store.create, sessions))
            if what == "events":
                await asyncio.gather(*(log.append(one.key, [new_event(n) for n in range(3)]) for one in sessions))
        if what == "sessions":
            await expire_all(store)
        else:
            long_ago = StoreClock(-DAY)
            await execute(store, sa.update(events_table()).values(created_at=long_ago))
            await execute(store, sa.update(logs_table()).values(oldest_at=long_ago))
        await execute(store, "PRAGMA wal_checkpoint(TRUNCATE)")
        swept = 0
        sweep = partial(store.sweep, limit=25) if what == "sessions" else partial(log.sweep, limit=500)
        while (step := await sweep()).more:
            swept += step.expired if isinstance(step, SweepReport) else step.removed
        assert swept > 1000
        written = Path(f"{sa.make_url(sqlite_url).database}-wal").stat().st_size
        assert 0 < written < 900 * 4096


async def test_a_sweep_goes_on_where_the_write_ahead_log_cannot_be_brought_in(sqlite_url: str) -> None:
    # With a shared cache SQLite refuses that while any other connection of the process reads.
    file = sa.make_url(sqlite_url).database
    async with sql_store(f"sqlite:///file:{file}?uri=true&cache=shared") as store:
        await store.create(new_session())
        await expire_all(store)
        with contextlib.closing(sqlite3.connect(f"file:{file}?cache=shared", uri=True)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT name FROM sqlite_master").fetchall()
            assert await store.sweep() == SweepReport(expired=1)
