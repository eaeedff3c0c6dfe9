"""What is left of a log when its events are gone."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.event_log import NO_SESSION
from mcp_session_store.retention import EventPolicy, EventSweepReport
from mcp_session_store.sql import SqlEventLog
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.events.trim import LOGS_PER_STEP
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import age_events, engine_of, events_swept, execute, migrated, settled, sql_store

if TYPE_CHECKING:
    from uuid import UUID

pytestmark = pytest.mark.anyio


async def logs_of(url: str) -> set[UUID]:
    return {row.key for row in await execute(url, sa.select(logs_table().c.key))}


def _only(step: Any) -> Any:
    """The steps that are only this one, and return what it gives."""
    return (yield step)


async def test_the_log_of_a_session_goes_on_when_its_events_are_too_old_and_without_a_session_goes_too(
    database_url: str,
) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        known, unknown = [(await store.create(new_session())).key for _ in range(2)]
        for key in (known, unknown):
            assert await log.append(key, [new_event(n) for n in range(3)]) == 1
            await age_events(log, key)
        # As a version of this package does it that knows of no events.
        sessions = sessions_table()
        await execute(database_url, sa.delete(sessions).where(sessions.c.key == unknown))
        assert await events_swept(log) == 6
        assert await logs_of(database_url) == {known}
        assert await log.append(known, [new_event(3)]) == 4
        assert await log.append(unknown, [new_event(3)]) is None
        await settled(store, log)


async def test_records_of_sessions_are_asked_for_where_there_are_any(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        assert await log.append(new_session().key, [new_event(0)]) is None
        assert await logs_of(database_url) == set()


async def test_an_event_of_no_session_is_not_stored(database_url: str) -> None:
    await migrated(database_url)
    async with SqlEventLog(database_url) as log:
        assert await log.append(NO_SESSION, [new_event(0)]) is None
        assert await logs_of(database_url) == set()


async def test_a_sweep_goes_on_past_logs_whose_events_are_gone_already(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        records = await asyncio.gather(*(store.create(new_session()) for _ in range(2 * LOGS_PER_STEP + 20)))
        await asyncio.gather(*(log.append(record.key, [new_event(0)]) for record in records))
        # As when a partition is dropped.
        await execute(database_url, sa.update(logs_table()).values(oldest_at=StoreClock(-86400.0)))
        await execute(database_url, sa.delete(events_table()))
        assert await events_swept(log) == 0
        oldest = await execute(database_url, sa.select(logs_table().c.oldest_at))
        assert len(oldest) == len(records)
        assert {row.oldest_at for row in oldest} == {None}
        await settled(store, log)


async def test_a_page_has_no_gap_though_events_are_removed_while_it_is_read(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        key = (await store.create(new_session())).key
        first = await log.append(key, [new_event(0), new_event(1)])
        assert first is not None
        others = [new_event(n, stream="another") for n in range(30)]
        missed = await log.append(key, [*others, new_event(2), *others, new_event(3, previous=2), *others])
        assert missed is not None
        removed = False

        async def run(connection: Any, steps: Any, *, writes: bool) -> Any:
            """Remove what is not in the first window of the page after it was read."""
            nonlocal removed
            run_one = partial(dialect_run, connection, writes=writes)
            try:
                step = next(steps)
                while True:
                    rows = await run_one(_only(step))
                    if not writes and not removed:
                        removed = True
                        old = events_table().c.sequence <= missed + 30
                        await execute(database_url, sa.delete(events_table()).where(old))
                    step = steps.send(rows)
            except StopIteration as done:
                return done.value

        dialect_run = store.database.dialect.run
        monkeypatch.setattr(store.database.dialect, "run", run)
        page = await log.read(key, "instance.1", after=first - 1, limit=3)
        assert page is not None
        assert removed
        assert [event.position for event in page.events] == [0, 1]
        assert page.more
        page = await log.read(key, "instance.1", after=first + 1, limit=3)
        assert page is not None
        assert [event.position for event in page.events] == [3]
        assert page.first == missed + 31
        assert not page.more


async def test_a_sweep_that_has_removed_all_that_was_too_old_is_over(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        for _ in range(3):
            key = (await store.create(new_session())).key
            await log.append(key, [new_event(0)])
            await age_events(log, key)
        # What becomes too old meanwhile is for the next one, or it would never end.
        assert await log.sweep() == EventSweepReport(removed=3, more=False)


async def test_events_are_stored_though_others_cannot_be_removed_and_the_log_record_names_the_session(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = EventPolicy(max_events_per_session=10)
    async with sql_store(database_url) as store, SqlEventLog(store, policy=policy) as log:
        key = (await store.create(new_session())).key

        def fail(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
            if statement.startswith("DELETE FROM mcp_session_event"):
                raise RuntimeError("no event is removed")

        sync_engine = engine_of(store).sync_engine
        sa.event.listen(sync_engine, "before_cursor_execute", fail)
        assert await log.append(key, [new_event(number) for number in range(11)]) == 1
        sa.event.remove(sync_engine, "before_cursor_execute", fail)
        ours = [record for record in caplog.records if record.name.startswith("mcp_session_store.")]
        (record,) = (record for record in ours if record.levelname == "WARNING")
        assert str(key) in record.getMessage()
        assert "no event is removed" in record.getMessage()
        assert await log.append(key, [new_event(11)]) == 12
        page = await log.read(key, "instance.1", after=0)
        assert page is not None
        assert [event.position for event in page.events] == list(range(3, 12))
