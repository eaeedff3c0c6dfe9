"""What operators see: lists that page along an index, one session, statistics, what a sweep would take."""

from __future__ import annotations

import asyncio
import itertools
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.errors import ConfigurationError, SchemaMissing, StoreBusy, StoreUnavailable
from mcp_session_store.records import Principal
from mcp_session_store.retention import RetentionPolicy, SweepReport
from mcp_session_store.sql.admin.session_list import SessionFilter, SessionState, session_position
from mcp_session_store.sql.admin.sessions import SessionDirectory
from tests.support.databases import execute, sql_store
from tests.support.plans import Explain
from tests.support.rows import cursor_of, insert_rows, session_row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID


pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
SOMEBODY = Principal.of(client_id="client-id", issuer="https://issuer", subject="somebody")


async def _keys(directory: SessionDirectory, which: SessionFilter, *, limit: int = 100) -> list[UUID]:
    """Those of all pages of a list."""
    keys: list[UUID] = []
    after = None
    while True:
        page = await directory.page(which, limit=limit, after=after)
        assert len(page.sessions) <= limit
        keys += [session.key for session in page.sessions]
        if (after := page.next) is None:
            return keys


async def test_a_list_has_the_sessions_of_one_state_the_latest_first(database_url: str) -> None:
    live = [session_row(opened=n * HOUR, expires=HOUR if n % 2 else None) for n in range(5)]
    expired = [session_row(opened=9 * HOUR, expires=-n * HOUR) for n in range(1, 5)]
    ended = [session_row(opened=9 * HOUR, expires=-HOUR if n % 2 else HOUR, ended=n * HOUR) for n in range(5)]
    others = [session_row(namespace="other"), session_row(namespace="other", ended=HOUR)]
    await insert_rows(database_url, [*ended, *others, *live, *expired])
    async with SessionDirectory(database_url) as directory:
        for state, rows in ((SessionState.LIVE, live), (SessionState.EXPIRED, expired), (SessionState.ENDED, ended)):
            for limit in (2, 5, 100):
                which = SessionFilter(state=state)
                assert await _keys(directory, which, limit=limit) == [row["key"] for row in rows]
                assert await directory.count(which) == len(rows)
                assert {s.state for s in (await directory.page(which)).sessions} == {state}


async def test_sessions_of_one_moment_are_told_apart_by_their_keys(database_url: str) -> None:
    one = session_row(ended=HOUR)
    moments = {name: one[name] for name in ("created_at", "last_seen_at", "expires_at", "ended_at")}
    ended = [session_row(ended=HOUR, **moments) for _ in range(10)]
    live = [session_row(**(moments | {"ended_at": None})) for _ in range(10)]
    await insert_rows(database_url, [*ended, *live])
    async with SessionDirectory(database_url) as directory:
        for state, rows in ((SessionState.LIVE, live), (SessionState.ENDED, ended)):
            keys = await _keys(directory, SessionFilter(state=state), limit=3)
            assert keys == sorted((row["key"] for row in rows), reverse=True)


def _of_age(state: SessionState, age: timedelta) -> dict[str, Any]:
    """What makes a row one that was opened, expired or ended that long ago."""
    if state is SessionState.LIVE:
        return {"opened": age}
    return (
        {"opened": 99 * HOUR, "expires": -age} if state is SessionState.EXPIRED else {"opened": 99 * HOUR, "ended": age}
    )


@pytest.mark.parametrize(
    ("chosen", "positions"),
    [
        ({"client": "cursor"}, [1]),
        ({"client": "curs"}, []),
        ({"principal": SOMEBODY.digest}, [2]),
        ({"anonymous": True}, [0, 1, 3, 4]),
        ({"instance": "instance-b"}, [3]),
        ({"min_age": 2.5 * HOUR}, [3, 4]),
        ({"max_age": 2.5 * HOUR}, [0, 1, 2]),
        ({"min_age": 0.5 * HOUR, "max_age": 2.5 * HOUR}, [1, 2]),
        ({"min_age": 0.5 * HOUR, "client": "client", "anonymous": True}, [3, 4]),
    ],
)
@pytest.mark.parametrize("state", SessionState)
async def test_a_list_can_be_narrowed_down(
    database_url: str, state: SessionState, chosen: dict[str, Any], positions: list[int]
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"client_name": "cursor"},
        {"principal": SOMEBODY},
        {"instance_hint": "instance-b"},
        {},
    ]
    # The first one came about a moment ago, so that it has expired already.
    rows = [
        session_row(**_of_age(state, timedelta(seconds=1) + n * HOUR), **change) for n, change in enumerate(changes)
    ]
    await insert_rows(database_url, rows)
    async with SessionDirectory(database_url) as directory:
        which = SessionFilter(state=state, **chosen)
        assert await _keys(directory, which, limit=1) == [rows[position]["key"] for position in positions]
        assert await directory.count(which) == len(positions)


async def test_sessions_that_come_and_go_move_no_other_off_its_page(database_url: str) -> None:
    rows = [session_row(opened=timedelta(minutes=n)) for n in range(1, 61)]
    await insert_rows(database_url, rows)
    seen: list[UUID] = []
    after = None
    async with SessionDirectory(database_url) as directory:
        for turn in itertools.count():
            page = await directory.page(SessionFilter(), limit=7, after=after)
            seen += [session.key for session in page.sessions]
            if (after := page.next) is None:
                break
            # One is opened, and of those that were listed and of those that are to come one goes; among them are
            # the one that the cursor points at, and the first of the next page.
            gone = (rows[7 * turn + 6], rows[7 * turn + 7])
            keys = ", ".join(f"'{row['key'] if 'postgres' in database_url else row['key'].hex}'" for row in gone)
            await execute(database_url, f"DELETE FROM mcp_session WHERE key IN ({keys})")
            await insert_rows(database_url, [session_row(opened=timedelta(0))])
    left = await execute(database_url, "SELECT count(*) FROM mcp_session")
    stayed = [row["key"] for n, row in enumerate(rows) if n % 7 or n == 0]
    assert len(left) == 1
    assert len(seen) == len(set(seen))
    assert [key for key in seen if key in set(stayed)] == stayed


@pytest.mark.parametrize("state", SessionState)
async def test_the_rows_of_a_page_stay_what_they_were_whatever_the_clock_says(
    database_url: str, state: SessionState
) -> None:
    """A page with an age says the same when it is asked for again later, for it goes by the cursor."""
    ages = [timedelta(hours=2, minutes=n) for n in range(9)]
    await insert_rows(database_url, rows := [session_row(**_of_age(state, age)) for age in ages])
    async with SessionDirectory(database_url) as directory:
        first = await directory.page(SessionFilter(state=state), limit=2)
        older = SessionFilter(state=state, min_age=timedelta(hours=2, minutes=4.5))
        page = await directory.page(older, limit=2, after=first.next)
        assert [session.key for session in page.sessions] == [row["key"] for row in rows[5:7]]
        page = await directory.page(older, limit=9, after=page.next)
        assert [session.key for session in page.sessions] == [row["key"] for row in rows[7:]]


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "nonsense",
        "é",
        "=",
        cursor_of("{}"),
        cursor_of("[]"),
        cursor_of('["live"]'),
        cursor_of('["live", 1, 2, "00000000000080008000000000000000"]'),
        cursor_of('["live", "1", "00000000000080008000000000000000"]'),
        cursor_of('["live", 1e300, "00000000000080008000000000000000"]'),
        cursor_of('["live", NaN, "00000000000080008000000000000000"]'),
        cursor_of('["live", 1, 5]'),
        cursor_of('["nothing", 1, "00000000000080008000000000000000"]'),
        cursor_of("[" * 20_000),
    ],
)
async def test_what_is_no_cursor_is_refused(sqlite_url: str, cursor: str) -> None:
    async with SessionDirectory(sqlite_url) as directory:
        with pytest.raises(ConfigurationError, match="not a cursor"):
            await directory.page(SessionFilter(), after=cursor)


async def test_a_cursor_of_another_list_is_refused(sqlite_url: str) -> None:
    await insert_rows(sqlite_url, [session_row() for _ in range(2)])
    async with SessionDirectory(sqlite_url) as directory:
        page = await directory.page(SessionFilter(), limit=1)
        with pytest.raises(ConfigurationError, match="list of live sessions, not of ended"):
            await directory.page(SessionFilter(state=SessionState.ENDED), after=page.next)


@pytest.mark.parametrize(
    "chosen", [{"anonymous": True, "principal": SOMEBODY.digest}, {"min_age": 2 * HOUR, "max_age": HOUR}]
)
def test_a_filter_that_fits_nothing_is_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SessionFilter(**chosen)


async def test_one_session_is_found_with_its_journal_whatever_its_state(database_url: str) -> None:
    rows = [session_row(principal=SOMEBODY), session_row(expires=-HOUR), session_row(ended=HOUR)]
    journal = [
        {
            "key": rows[0]["key"],
            "method": "resources/subscribe",
            "subject": "b",
            "params": '{"uri":"b"}',
            "revision": 1,
        },
        {"key": rows[0]["key"], "method": "logging/setLevel", "subject": "", "params": "{}", "revision": 3},
        {"key": rows[0]["key"], "method": "resources/subscribe", "subject": "a", "params": "{}", "revision": 2},
    ]
    stranger = session_row(namespace="other")
    await insert_rows(database_url, [*rows, stranger], journal)
    async with SessionDirectory(database_url) as directory:
        for row, state in zip(rows, SessionState, strict=True):
            found = await directory.find(row["key"])
            assert found is not None
            assert found.session.state is state
            assert found.session.end_reason == row["end_reason"]
            assert found.initialize_params == row["initialize_params"]
        found = await directory.find(rows[0]["key"])
        assert found is not None
        assert found.session.principal == SOMEBODY
        assert [(entry.method, entry.subject) for entry in found.journal] == [
            ("resources/subscribe", "b"),
            ("resources/subscribe", "a"),
            ("logging/setLevel", ""),
        ]
        assert "uri" not in repr(found)
        assert "capabilities" not in repr(found)
        assert await directory.find(stranger["key"]) is None
        assert await directory.find(session_row()["key"]) is None


async def test_statistics_count_by_state_age_client_and_instance(database_url: str) -> None:
    live = [
        session_row(opened=timedelta(seconds=5), instance_hint="instance-b", initialize_params='"é"'),
        session_row(opened=timedelta(minutes=30), client_name="cursor", initialize_params='"xxxxx"'),
        session_row(opened=timedelta(minutes=40), client_name="cursor", initialize_params='"é"'),
        session_row(opened=timedelta(days=400), client_name="cursor", initialize_params='"é"'),
    ]
    rest = [session_row(expires=-HOUR), session_row(ended=HOUR), session_row(ended=HOUR), session_row(namespace="o")]
    await insert_rows(database_url, [*live, *rest])
    async with SessionDirectory(database_url) as directory:
        statistics = await directory.statistics()
        assert (statistics.live, statistics.expired, statistics.ended) == (4, 1, 2)
        ages = {age: count for age, count in statistics.ages if count}
        assert ages == {timedelta(minutes=1): 1, timedelta(hours=1): 2, None: 1}
        assert statistics.clients == [("cursor", 3), ("client", 1)]
        assert statistics.instances == [("instance-a", 3), ("instance-b", 1)]
        assert statistics.mean_params_bytes == pytest.approx((4 + 7 + 4 + 4) / 4)
        assert statistics.table_bytes > 0
        assert (statistics.index_bytes is None) == ("sqlite" in database_url)
        assert (await directory.statistics(top=1)).clients == [("cursor", 3)]


async def test_statistics_of_nothing_are_zeros(database_url: str) -> None:
    await insert_rows(database_url, [])
    async with SessionDirectory(database_url) as directory:
        statistics = await directory.statistics()
        assert (statistics.live, statistics.mean_params_bytes, statistics.clients) == (0, None, [])
        assert await directory.preview(RetentionPolicy()) == SweepReport()
        assert await directory.page(SessionFilter()) is not None


@pytest.mark.parametrize(
    "policy",
    [
        RetentionPolicy(),
        RetentionPolicy(idle=None, absolute=None, tombstone=None),
        RetentionPolicy(idle=None, absolute=10 * HOUR, tombstone=HOUR),
        RetentionPolicy(idle=2 * HOUR, absolute=10 * HOUR),
    ],
    ids=["default", "no limits", "absolute", "both"],
)
async def test_a_preview_tells_what_the_next_sweep_does(database_url: str, policy: RetentionPolicy) -> None:
    rows = [
        *(session_row(opened=n * HOUR, expires=None) for n in range(1, 60, 4)),
        *(session_row(expires=-n * timedelta(minutes=1) - timedelta(seconds=30)) for n in range(10)),
        *(session_row(ended=n * HOUR + timedelta(seconds=30)) for n in range(0, 60, 4)),
        session_row(namespace="other", expires=-HOUR),
    ]
    await insert_rows(database_url, rows)
    async with SessionDirectory(database_url) as directory, sql_store(database_url, retention=policy) as store:
        preview = await directory.preview(policy)
        done = SweepReport(more=True)
        for _ in range(100):
            if not done.more:
                break
            done += await store.sweep(limit=5)
        assert (preview.expired, preview.purged) == (done.expired, done.purged)
        assert preview.more == bool(done.expired or done.purged)
        assert await directory.preview(policy) == SweepReport()


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT 1 FROM c) SELECT count(*) FROM c"


async def test_a_question_that_takes_too_long_is_given_up_by_the_database_too(database_url: str) -> None:
    await insert_rows(database_url, [session_row()])
    async with SessionDirectory(database_url, timeout=2) as directory:
        with pytest.raises(StoreUnavailable, match=r"within 2 s.*--timeout"):
            await directory.read(lambda connection, now: connection.exec_driver_sql(ENDLESS))
        assert await directory.count(SessionFilter()) == 1
        assert directory.database.connections.in_use == 0
    if "postgres" in database_url:
        async with asyncio.timeout(20):
            while await execute(
                database_url,
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
                "AND query LIKE 'WITH RECURSIVE c%'",
            ):
                await asyncio.sleep(0.01)


async def test_a_directory_changes_nothing_even_if_it_wanted_to(postgres_url: str) -> None:
    await insert_rows(postgres_url, [session_row()])
    async with SessionDirectory(postgres_url) as directory:
        with pytest.raises((StoreUnavailable, StoreBusy), match=r"ReadOnly|read-only|readonly"):
            await directory.read(lambda connection, now: connection.exec_driver_sql("DELETE FROM mcp_session"))
        assert await directory.count(SessionFilter()) == 1


async def test_a_database_that_was_not_migrated_is_told_by_the_command_to_run(postgres_url: str) -> None:
    async with SessionDirectory(postgres_url) as directory:
        with pytest.raises(SchemaMissing, match="mcp-session-store upgrade"):
            await directory.page(SessionFilter())


@pytest.mark.parametrize("namespace", ["", None, "a\0b"])
def test_a_namespace_that_cannot_be_is_refused(namespace: Any) -> None:
    with pytest.raises(ConfigurationError, match="namespace="):
        SessionDirectory("sqlite:///sessions.db", namespace=namespace)


@pytest.fixture(scope="module")
def large_url(migrated_url: str) -> str:
    """A database with enough sessions for its planner to think about."""
    choose = random.Random(7)
    rows = []
    for n in range(12_000):
        state = choose.choices(["live", "expired", "ended"], [70, 10, 20])[0]
        moment = timedelta(seconds=choose.uniform(1, 90_000))
        rows.append(
            session_row(
                opened=moment,
                expires=-moment if state == "expired" else HOUR,
                ended=moment if state == "ended" else None,
                principal=None if n % 7 == 0 else Principal.of(client_id=f"client-{n % 97}"),
                client_name=f"client-{n % 50}",
                instance_hint=f"instance-{n % 20}",
            )
        )
    asyncio.run(insert_rows(migrated_url, rows, analyze=True))
    return migrated_url


CHOSEN: dict[str, dict[str, Any]] = {
    "ended": {},
    "client": {"client": "client-3"},
    "principal": {"principal": Principal.of(client_id="client-3").digest},
    "instance": {"instance": "instance-3"},
}
OF_NO_INDEX = "client", "instance"
"""Filters of `CHOSEN` that have no index of their own."""
INDEXED = [(name, chosen) for name, chosen in CHOSEN.items() if name not in OF_NO_INDEX]


async def _plan(directory: SessionDirectory, which: SessionFilter, *, page: int) -> str:
    """How the database reads a page of a list."""
    first = await directory.page(which, limit=3)
    position = None if page == 1 else session_position(first.next or "", which.state)
    statement = directory.lists.page_statement(which, first.as_of, limit=21, after=position)
    async with directory.database.engine.connect() as connection:
        word = "EXPLAIN" if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
        return "\n".join(str(row[-1]) for row in await connection.execute(Explain(word, statement)))


def _reads_one_range(plan: str) -> bool:
    return not any(word in plan for word in ("Seq Scan", "Sort", "Bitmap", "TEMP B-TREE")) and not plan.startswith(
        "SCAN"
    )


def _begins_at_the_cursor(plan: str, columns: Sequence[str]) -> bool:
    row = f"ROW({', '.join(columns)}) < ROW("
    index_condition = next((line for line in plan.splitlines() if "Index Cond" in line), "")
    return row in index_condition or f"({','.join(columns)})<(" in plan


@pytest.mark.parametrize("page", [1, 2])
@pytest.mark.parametrize("ages", [{}, {"min_age": 2 * HOUR}, {"min_age": 2 * HOUR, "max_age": 20 * HOUR}])
@pytest.mark.parametrize(
    ("index", "chosen"), [*INDEXED, ("principal", {"anonymous": True})], ids=["all", "principal", "anonymous"]
)
@pytest.mark.parametrize("state", [SessionState.LIVE, SessionState.ENDED])
async def test_a_page_is_one_range_of_the_index_for_its_filter(
    large_url: str, state: SessionState, index: str, chosen: dict[str, Any], ages: dict[str, Any], page: int
) -> None:
    async with SessionDirectory(large_url) as directory:
        plan = await _plan(directory, SessionFilter(state=state, **chosen, **ages), page=page)
    assert f"ix_mcp_session_{index}" in plan, plan
    assert _reads_one_range(plan), plan
    columns = ["created_at", "key"] if state is SessionState.LIVE else ["ended_at", "created_at", "key"]
    assert page == 1 or _begins_at_the_cursor(plan, columns), plan


@pytest.mark.parametrize("page", [1, 2])
@pytest.mark.parametrize("ages", [{}, {"min_age": 2 * HOUR}, {"min_age": 2 * HOUR, "max_age": 20 * HOUR}])
@pytest.mark.parametrize("name", OF_NO_INDEX)
@pytest.mark.parametrize("state", [SessionState.LIVE, SessionState.ENDED])
async def test_a_page_by_a_filter_without_an_index_reads_along_the_list_it_narrows_down(
    large_url: str, state: SessionState, name: str, ages: dict[str, Any], page: int
) -> None:
    async with SessionDirectory(large_url) as directory:
        plan = await _plan(directory, SessionFilter(state=state, **CHOSEN[name], **ages), page=page)
    assert "ix_mcp_session_ended" in plan, plan
    assert "Seq Scan" not in plan, plan
    assert not plan.startswith("SCAN"), plan


@pytest.mark.parametrize("page", [1, 2])
@pytest.mark.parametrize("ages", [{}, {"min_age": 2 * HOUR}, {"min_age": 2 * HOUR, "max_age": 20 * HOUR}])
async def test_a_page_of_expired_sessions_is_one_range_of_the_index_that_a_sweep_uses(
    large_url: str, ages: dict[str, Any], page: int
) -> None:
    async with SessionDirectory(large_url) as directory:
        plan = await _plan(directory, SessionFilter(state=SessionState.EXPIRED, **ages), page=page)
    assert "ix_mcp_session_expires" in plan, plan
    assert _reads_one_range(plan), plan
    assert page == 1 or _begins_at_the_cursor(plan, ["expires_at", "key"]), plan


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
async def test_expired_sessions_are_looked_up_in_an_index_whatever_the_filter(
    large_url: str, chosen: dict[str, Any]
) -> None:
    async with SessionDirectory(large_url) as directory:
        plan = await _plan(directory, SessionFilter(state=SessionState.EXPIRED, **chosen), page=1)
    assert "ix_mcp_session_" in plan, plan
    assert "Seq Scan" not in plan, plan
