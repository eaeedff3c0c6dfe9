"""Events on a database that breaks or refuses: each is stored once, in its order, and fails no other."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import SessionStoreError, StoreUnavailable
from mcp_session_store.records import message_bytes
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.schema.tables import events_table, logs_table
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import (
    behind_proxy,
    engine_of,
    execute,
    keep_connections,
    kept_connections,
    settled,
    sql_store,
)
from tests.support.faults import breaking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from uuid import UUID

    from mcp_session_store.records import NewEvent
    from tests.support.faults import FaultProxy

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def log_behind_proxy(url: str, **options: Any) -> AsyncIterator[tuple[SqlEventLog, FaultProxy, list[UUID]]]:
    """A log whose database is reached through a network that fails on command, and sessions with an event each."""
    async with behind_proxy(url, **options) as (store, proxy), SqlEventLog(store) as log:
        keys = sorted([(await store.create(new_session())).key for _ in range(3)])
        await settled(store)
        # Events have one connection, and no other is left: who loses that needs a new one.
        await engine_of(store).dispose()
        for key in keys:
            # Alone and together: all statements have been prepared then.
            assert await log.append(key, [new_event(0, stream="first")]) == 1
        assert await append_all(log, [(key, [new_event(0, stream="first")]) for key in keys], again=True) == [1, 1, 1]
        await settled(store, log)
        yield log, proxy, keys
        await settled(store, log)


async def append_all(
    log: SqlEventLog, appends: Sequence[tuple[UUID, Sequence[NewEvent]]], *, again: bool = False
) -> list[int | None]:
    """Several appends at once, which share statements."""
    return await asyncio.gather(*(log.append(key, events, again=again) for key, events in appends))


async def stored(url: str, key: UUID) -> list[tuple[int, str, int]]:
    """The sequence, stream and position of each event that a session has."""
    table = events_table()
    columns = table.c.sequence, table.c.stream, table.c.position
    rows = await execute(url, sa.select(*columns).where(table.c.key == key).order_by(table.c.sequence))
    return [(row.sequence, row.stream, row.position) for row in rows]


def of_stream(stream: str, *positions: int) -> list[NewEvent]:
    return [new_event(position, stream=stream) for position in positions]


# Connections that break


def lone(keys: Sequence[UUID]) -> list[tuple[UUID, Sequence[NewEvent]]]:
    return [(keys[0], of_stream("a", 0))]


def a_few_of_one(keys: Sequence[UUID]) -> list[tuple[UUID, Sequence[NewEvent]]]:
    return [(keys[0], of_stream("a", 0)), (keys[0], of_stream("b", 0, 1, 2)), (keys[0], of_stream("a", 1))]


def many_of_all(keys: Sequence[UUID]) -> list[tuple[UUID, Sequence[NewEvent]]]:
    streams = ["a", "b", "c"]
    return [(key, of_stream(stream, *range(len(keys[:3])))) for stream in streams for key in keys]


# With what the answer to the statement that stores them says.
APPENDS = [
    pytest.param(lone, b"SELECT 1", id="lone"),
    pytest.param(a_few_of_one, b"SELECT 1", id="a few of one session"),
    pytest.param(many_of_all, b"SELECT 3", id="many of all sessions"),
]


@pytest.mark.parametrize(("make", "tag"), APPENDS)
@pytest.mark.parametrize("lost", ["the statement", "the answer"])
async def test_events_whose_connection_is_killed_are_stored_once_and_the_caller_does_not_notice(
    postgres_url: str, make: Callable[[Sequence[UUID]], list[tuple[UUID, Sequence[NewEvent]]]], tag: bytes, lost: str
) -> None:
    async with log_behind_proxy(postgres_url) as (log, proxy, keys):
        appends = make(keys)
        if lost == "the answer":
            proxy.kill_on_next_reply(tag)
        else:
            proxy.kill_on_next_request()
        told = await append_all(log, appends)
        assert proxy.sprung == 1
        await assert_stored(postgres_url, keys, appends, told)


@pytest.mark.parametrize(("make", "tag"), APPENDS)
@pytest.mark.parametrize("lost", ["the statement", "the answer"])
async def test_events_whose_caller_tries_again_are_stored_once(
    postgres_url: str, make: Callable[[Sequence[UUID]], list[tuple[UUID, Sequence[NewEvent]]]], tag: bytes, lost: str
) -> None:
    async with log_behind_proxy(postgres_url) as (log, proxy, keys):
        appends = make(keys)
        # The store finds nobody to try it with once more.
        proxy.refuse()
        if lost == "the answer":
            proxy.kill_on_next_reply(tag)
        else:
            proxy.kill_on_next_request()
        for failure in await asyncio.gather(append_all(log, appends), return_exceptions=True):
            assert isinstance(failure, StoreUnavailable)
        assert proxy.sprung == 1
        await settled(log)
        await proxy.accept()
        # Beside others, which are new.
        more = [(key, of_stream("later", 0)) for key in keys]
        told, told_of_more = await asyncio.gather(append_all(log, appends, again=True), append_all(log, more))
        await assert_stored(postgres_url, keys, [*appends, *more], [*told, *told_of_more])


@pytest.mark.parametrize("tag", [b"INSERT 0", b"SELECT"])
async def test_the_first_events_of_sessions_are_stored_once(postgres_url: str, tag: bytes) -> None:
    async with behind_proxy(postgres_url) as (store, proxy), SqlEventLog(store) as log:
        keys = [(await store.create(new_session())).key for _ in range(3)]
        # One of them has a log already.
        await log.append(keys[0], of_stream("first", 0))
        appends = [(key, of_stream("a", 0, 1)) for key in keys]
        proxy.kill_on_next_reply(tag)
        told = await append_all(log, appends)
        assert proxy.sprung == 1
        assert told == [2, 1, 1]
        for key, first in zip(keys, (2, 1, 1), strict=True):
            assert (await stored(postgres_url, key))[first - 1 :] == [(first, "a", 0), (first + 1, "a", 1)]


async def assert_stored(
    url: str, keys: Sequence[UUID], appends: Sequence[tuple[UUID, Sequence[NewEvent]]], told: Sequence[int | None]
) -> None:
    """Check that sessions have their first event, and those that were told, where they were told to be, and no more."""
    expected = {key: [(1, "first", 0)] for key in keys}
    for (key, events), first in zip(appends, told, strict=True):
        assert first is not None
        expected[key] += [(sequence, event.stream, event.position) for sequence, event in enumerate(events, first)]
    for key in keys:
        rows = await stored(url, key)
        assert rows == sorted(expected[key])
        assert [sequence for sequence, _, _ in rows] == list(range(1, len(rows) + 1))
        # Those of one stream in the order in which they were given.
        for stream in {stream for _, stream, _ in rows}:
            positions = [position for _, of, position in rows if of == stream]
            assert positions == sorted(set(positions))


async def until_waiting(url: str, count: int) -> None:
    """Wait until so many statements wait for locks in a database of Postgres."""
    ask = (
        "SELECT count(*) AS waiting FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(30):
        while [row.waiting for row in await execute(url, ask)] != [count]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("by_caller", [False, True], ids=["by the store", "by the caller"])
async def test_a_try_that_is_still_under_way_is_waited_for_before_events_are_stored_again(
    postgres_url: str, by_caller: bool
) -> None:
    """A server that waits for a lock does not see that its client is gone, and goes on when it has it."""
    async with log_behind_proxy(postgres_url, timeout=60) as (log, proxy, keys), sql_store(postgres_url) as holders:
        appends = [(key, of_stream("a", 0, 1)) for key in keys]
        logs = logs_table()
        async with engine_of(holders).connect() as holder:
            await holder.exec_driver_sql("BEGIN")
            await holder.execute(sa.select(logs.c.key).where(logs.c.key.in_(keys)).with_for_update())
            calls = asyncio.ensure_future(append_all(log, appends))
            await until_waiting(postgres_url, 1)
            if by_caller:
                proxy.refuse()
            proxy.kill_connections()
            if by_caller:
                with pytest.raises(StoreUnavailable):
                    await calls
                await settled(log)
                await proxy.accept()
                calls = asyncio.ensure_future(append_all(log, appends, again=True))
            await until_waiting(postgres_url, 2)
            await holder.exec_driver_sql("COMMIT")
        assert await calls == [2, 2, 2]
        await assert_stored(postgres_url, keys, appends, [2, 2, 2])


async def test_events_are_stored_once_and_in_order_while_connections_break_all_the_time(postgres_url: str) -> None:
    dice = random.Random(4)
    async with behind_proxy(postgres_url, timeout=60) as (store, proxy):
        other = SqlSessionStore(engine_of(store).url, timeout=60)
        logs = [SqlEventLog(store), SqlEventLog(other)]
        keys = [(await store.create(new_session())).key for _ in range(4)]
        told: dict[UUID, list[tuple[int, str, int]]] = {key: [] for key in keys}
        retried = 0

        async def write(key: UUID, stream: str) -> None:
            nonlocal retried
            position = 0
            for _ in range(25):
                events = of_stream(stream, *range(position, position + dice.choice([1, 1, 1, 4])))
                position += len(events)
                again = False
                while True:
                    try:
                        first = await dice.choice(logs).append(key, events, again=again)
                        break
                    except StoreUnavailable:
                        # By any instance.
                        again = True
                        retried += 1
                assert first is not None
                told[key] += [(first + place, stream, event.position) for place, event in enumerate(events)]

        async with breaking(proxy, dice, 0.02):
            await asyncio.gather(*(write(key, f"instance.{number}") for key in keys for number in range(4)))
        assert proxy.accepted > 10
        assert proxy.sprung > 0
        for key in keys:
            rows = await stored(postgres_url, key)
            assert rows == sorted(told[key])
            assert [sequence for sequence, _, _ in rows] == list(range(1, len(rows) + 1))
            for number in range(4):
                positions = [position for _, stream, position in rows if stream == f"instance.{number}"]
                assert positions == list(range(len(positions)))
        for log, of_log in zip(logs, (store, other), strict=True):
            await log.aclose()
            await settled(of_log, log)
        await other.aclose()


async def test_all_connections_of_the_pool_may_break_at_once(postgres_url: str) -> None:
    async with behind_proxy(postgres_url) as (store, proxy), SqlEventLog(store) as log:
        keys = [(await store.create(new_session())).key for _ in range(3)]
        for again in (False, True):
            await append_all(log, [(key, of_stream("first", 0)) for key in keys], again=again)
        await settled(store, log)
        await keep_connections(store, 3)
        assert len(await kept_connections(store)) >= 3
        proxy.kill_connections()
        told, page = await asyncio.gather(
            append_all(log, [(key, of_stream("a", 0)) for key in keys]), log.read(keys[0], "first", after=0)
        )
        assert told == [2, 2, 2]
        assert page is not None
        assert len(page.events) == 1
        await settled(store, log)


# Values that are refused


BAD = [
    pytest.param({"message": "secret \ud800"}, id="surrogate in a message"),
    pytest.param({"stream": "\ud800"}, id="surrogate in the name of a stream"),
    pytest.param({"position": 2**63}, id="position that is too large"),
]
BAD_FOR_POSTGRES = [
    pytest.param({"message": "secret \0"}, id="NUL in a message"),
    pytest.param({"stream": "\0"}, id="NUL in the name of a stream"),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("again", [False, True])
async def test_an_event_that_the_database_refuses_fails_alone(
    migrated_url: str, bad: dict[str, Any], again: bool
) -> None:
    await assert_fails_alone(migrated_url, new_event(**bad), again=again)


@pytest.mark.parametrize("bad", BAD_FOR_POSTGRES)
@pytest.mark.parametrize("again", [False, True])
async def test_an_event_that_postgres_refuses_fails_alone(
    postgres_url: str, bad: dict[str, Any], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found by the server, as what is not checked before.
    monkeypatch.setattr("mcp_session_store.sql.events.log.checked_size", message_bytes)
    await assert_fails_alone(postgres_url, new_event(**bad), again=again)


async def assert_fails_alone(url: str, bad: NewEvent, *, again: bool) -> None:
    """Store an event that is refused beside others that are not."""
    async with sql_store(url) as store, SqlEventLog(store) as log:
        old, new = [[(await store.create(new_session())).key for _ in range(3)] for _ in range(2)]
        for key in old:
            assert await log.append(key, of_stream("first", 0)) == 1
        appends = [(key, of_stream("a", 0, 1)) for key in (*old, *new)]
        # Of a session with a log and of one without, as the first and as the last of its append.
        refused = [
            (key, events)
            for key in (old[1], new[1])
            for events in ([bad, *of_stream("b", 0)], [*of_stream("c", 0), bad])
        ]
        calls = [*appends[:2], *refused[:2], *appends[2:5], *refused[2:], *appends[5:]]
        outcomes = await asyncio.gather(
            *(log.append(key, events, again=again) for key, events in calls), return_exceptions=True
        )
        for call, outcome in zip(calls, outcomes, strict=True):
            if call in refused:
                assert isinstance(outcome, SessionStoreError)
                assert not isinstance(outcome, StoreUnavailable)
                assert outcome.__cause__ is None
                assert outcome.__context__ is None
            else:
                assert outcome == (2 if call[0] in old else 1)
        # Nothing of what was refused is there, and the next goes on behind what is.
        for key, first in ((old[1], 2), (new[1], 1)):
            assert await log.append(key, of_stream("b", 0)) == first + 2
            later = [(first, "a", 0), (first + 1, "a", 1), (first + 2, "b", 0)]
            assert (await stored(url, key))[first - 1 :] == later
        await settled(store, log)
