"""What operators see of events: the logs of sessions, the events of one, statistics, what a sweep would take."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError, SchemaMissing
from mcp_session_store.retention import EventPolicy
from mcp_session_store.sql import SqlEventLog
from mcp_session_store.sql.admin.events import EventDirectory
from mcp_session_store.sql.admin.reader import decode_cursor
from mcp_session_store.sql.admin.sessions import SessionDirectory, SessionFilter
from mcp_session_store.sql.schema.tables import logs_table
from tests.support.databases import events_swept, execute
from tests.support.plans import Explain
from tests.support.rows import cursor_of, insert_events, insert_rows, log_rows, session_row

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.sql.admin.events import LoggedEvent

pytestmark = pytest.mark.anyio

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


async def _keys(directory: EventDirectory, *, limit: int) -> list[UUID]:
    """Those of all pages of the list."""
    keys: list[UUID] = []
    after = None
    while True:
        page = await directory.page(limit=limit, after=after)
        assert len(page.logs) <= limit
        keys += [log.key for log in page.logs]
        if (after := page.next) is None:
            return keys


async def test_the_list_has_the_logs_of_a_namespace_those_with_the_oldest_events_first(database_url: str) -> None:
    logs = [log_rows([n * HOUR, MINUTE]) for n in range(7, 0, -1)]
    same = [log_rows([MINUTE / 2]) for _ in range(3)]
    for log, _ in same:
        log["oldest_at"] = same[0][0]["oldest_at"]
    await insert_events(database_url, [*same, *logs, log_rows([HOUR], namespace="other"), log_rows([], trimmed=5)])
    expected = [log["key"] for log, _ in logs] + sorted(log["key"] for log, _ in same)
    async with EventDirectory(database_url) as directory:
        for limit in (1, 3, 10, 100):
            assert await _keys(directory, limit=limit) == expected
    async with EventDirectory(database_url, namespace="other") as directory:
        assert len((await directory.page()).logs) == 1


async def test_a_log_is_counted_as_it_is_kept(database_url: str) -> None:
    (log, events) = log_rows([3 * HOUR, 2 * HOUR, HOUR], trimmed=7, message='"é"')
    await insert_events(database_url, [(log, events)])
    async with EventDirectory(database_url) as directory:
        (found,) = (await directory.page()).logs
        assert (found.key, found.namespace) == (log["key"], "default")
        assert (found.events, found.bytes, found.first, found.last) == (3, 12, 8, 10)
        assert found.oldest_at is not None
        assert abs(found.oldest_at - events[0]["created_at"]) < timedelta(seconds=1)
        # By what is there, whatever the log says: its oldest may have gone with a partition.
        await execute(database_url, "DELETE FROM mcp_session_event WHERE sequence = 8")
        (found,) = (await directory.page()).logs
        assert (found.events, found.bytes, found.first, found.last) == (2, 8, 9, 10)


async def test_a_log_whose_oldest_events_are_removed_is_not_left_out(database_url: str) -> None:
    await insert_events(database_url, [log_rows([n * HOUR]) for n in range(20, 0, -1)])
    async with EventDirectory(database_url) as directory:
        expected = [log.key for log in (await directory.page(limit=100)).logs]
        seen: list[UUID] = []
        after = None
        for turn in range(100):
            page = await directory.page(limit=3, after=after)
            seen += [log.key for log in page.logs]
            if (after := page.next) is None:
                break
            if turn < 4:
                # Two lose their oldest events: one that was seen, and the next that was to come.
                table = logs_table()
                newest = sa.select(sa.func.max(table.c.oldest_at)).scalar_subquery()
                trimmed = table.c.key.in_([expected[3 * turn], expected[3 * turn + 3]])
                await execute(database_url, sa.update(table).where(trimmed).values(oldest_at=newest))
        assert set(seen) == set(expected)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "nonsense",
        cursor_of("[]"),
        cursor_of('["logs", 1]'),
        cursor_of('["logs", 1, 2, "00000000000080008000000000000000"]'),
        cursor_of('["live", 1, "00000000000080008000000000000000"]'),
    ],
)
async def test_what_is_no_cursor_of_the_list_is_refused(sqlite_url: str, cursor: str) -> None:
    async with EventDirectory(sqlite_url) as directory:
        with pytest.raises(ConfigurationError, match="not a cursor of a list of logs"):
            await directory.page(after=cursor)


async def test_a_cursor_of_logs_is_none_of_sessions(sqlite_url: str) -> None:
    await insert_events(sqlite_url, [log_rows([HOUR]), log_rows([HOUR])])
    async with EventDirectory(sqlite_url) as directory, SessionDirectory(sqlite_url) as sessions:
        page = await directory.page(limit=1)
        with pytest.raises(ConfigurationError, match="not a cursor of a list of sessions"):
            await sessions.page(SessionFilter(), after=page.next)


async def test_the_events_of_one_session_come_in_their_order(database_url: str) -> None:
    log, events = log_rows([n * MINUTE for n in range(9, 0, -1)], trimmed=3)
    for event in events[::2]:
        event["stream"] = "*"
    others = [log_rows([HOUR]), log_rows([HOUR], key=None, namespace="other")]
    await insert_events(database_url, [(log, events), *others])
    async with EventDirectory(database_url) as directory:
        seen: list[LoggedEvent]
        for stream, expected in ((None, events), ("*", events[::2]), ("instance.1", events[1::2]), ("none", [])):
            seen = []
            after: int | None = 0
            while after is not None:
                found = await directory.find(log["key"], stream=stream, limit=2, after=after)
                assert found is not None
                assert (found.log.events, found.log.first, found.log.last) == (9, 4, 12)
                seen += found.events
                after = found.next
            assert [(one.sequence, one.stream, one.position, one.kind) for one in seen] == [
                (row["sequence"], row["stream"], row["position"], row["kind"]) for row in expected
            ]
            for one, row in zip(seen, expected, strict=True):
                assert abs(one.created_at - row["created_at"]) < timedelta(seconds=1)
        assert await directory.find(others[1][0]["key"]) is None
        assert await directory.find(session_row()["key"]) is None


async def test_large_messages_are_read_when_they_are_asked_for(database_url: str) -> None:
    small, large = '"é"', '"' + "é" * 40_000 + '"'
    log, events = log_rows([MINUTE] * 3)
    for event, message in zip(events, (small, large, None), strict=True):
        event["message"] = message
    await insert_events(database_url, [(log, events)])
    async with EventDirectory(database_url) as directory:
        found = await directory.find(log["key"])
        assert found is not None
        assert [event.message for event in found.events] == [small, None, None]
        assert [event.bytes for event in found.events] == [4, 80_002, 0]
        assert small not in repr(found)
        found = await directory.find(log["key"], messages=True)
        assert found is not None
        assert [event.message for event in found.events] == [small, large, None]


async def test_statistics_count_events_and_tell_who_runs(database_url: str) -> None:
    logs = [
        log_rows([3 * HOUR, HOUR], trimmed=10, message="12345"),
        log_rows([MINUTE]),
        log_rows([], trimmed=4),
        log_rows([9 * HOUR], namespace="other"),
    ]
    beats = {f"host:1:{n}": n * MINUTE for n in range(5)}
    await insert_events(database_url, logs, beats=beats)
    async with EventDirectory(database_url) as directory:
        statistics = await directory.statistics(top=3)
        assert (statistics.sessions, statistics.events, statistics.bytes) == (2, 3, 12)
        assert statistics.oldest_at is not None
        assert abs(statistics.as_of - statistics.oldest_at - 3 * HOUR) < timedelta(minutes=5)
        assert [one.instance for one in statistics.instances] == ["host:1:0", "host:1:1", "host:1:2"]
        assert statistics.instances[1].started_at < statistics.instances[1].beat_at < statistics.as_of
        assert statistics.table_bytes > 0
        assert (statistics.index_bytes is None) == ("sqlite" in database_url)
        assert statistics.partitions == []


async def test_statistics_of_nothing_are_zeros(database_url: str) -> None:
    await insert_events(database_url, [])
    async with EventDirectory(database_url) as directory:
        statistics = await directory.statistics()
        assert (statistics.sessions, statistics.events, statistics.bytes) == (0, 0, 0)
        assert (statistics.oldest_at, statistics.instances) == (None, [])
        assert (await directory.page()).logs == []
        assert await directory.preview(EventPolicy()) == 0


@pytest.mark.parametrize("max_age", [None, MINUTE, HOUR, 10 * HOUR])
async def test_a_preview_tells_what_the_next_sweep_removes(database_url: str, max_age: timedelta | None) -> None:
    choose = random.Random(7)
    logs = [
        log_rows(sorted((choose.uniform(0.01, 12) * HOUR for _ in range(choose.randrange(1, 9))), reverse=True))
        for _ in range(30)
    ]
    await insert_events(database_url, [*logs, log_rows([20 * HOUR], namespace="other")])
    policy = EventPolicy(max_age=max_age)
    async with EventDirectory(database_url) as directory, SqlEventLog(database_url, policy=policy) as log:
        expected = await directory.preview(policy)
        assert await events_swept(log) == expected
        assert (expected == 0) == (max_age is None)
        assert await directory.preview(policy) == 0


async def test_a_database_that_was_not_migrated_is_told_by_the_command_to_run(postgres_url: str) -> None:
    async with EventDirectory(postgres_url) as directory:
        with pytest.raises(SchemaMissing, match="mcp-session-store upgrade"):
            await directory.page()


@pytest.mark.parametrize("page", [1, 2])
async def test_a_page_is_one_range_of_the_index_of_ages(database_url: str, page: int) -> None:
    choose = random.Random(7)
    logs = [log_rows([choose.uniform(1, 90_000) * timedelta(seconds=1)]) for _ in range(6000)]
    await insert_rows(database_url, [])
    await insert_events(database_url, logs, analyze=True)
    async with EventDirectory(database_url) as directory:
        first = await directory.page(limit=3)
        position = None if page == 1 else (decode_cursor(first.next or "") or ("", ()))[1]
        statement = directory.page_statement(limit=21, after=position)
        async with directory.database.engine.connect() as connection:
            word = "EXPLAIN" if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
            plan = "\n".join(str(row[-1]) for row in await connection.execute(Explain(word, statement)))
    assert "ix_mcp_session_log_oldest" in plan, plan
    assert not any(word in plan for word in ("Seq Scan", "Sort", "TEMP B-TREE", "SCAN mcp")), plan
    # And its events are looked up.
    assert (
        plan.count("mcp_session_event_pkey" if "postgres" in database_url else "sqlite_autoindex_mcp_session_event")
        >= 3
    )
