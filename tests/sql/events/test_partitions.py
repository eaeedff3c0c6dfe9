"""Events in partitions: all works as in one table, none is lost on the way there and back, and old ones are dropped."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import uuid
from contextlib import asynccontextmanager
from datetime import time, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError, SchemaMissing, StoreBusy
from mcp_session_store.records import EndReason
from mcp_session_store.retention import EventPolicy
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.admin import partitions
from mcp_session_store.sql.admin.events import EventDirectory
from mcp_session_store.sql.admin.partitions import EventPartitions, Partition
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.tables import events_table
from mcp_session_store.sql.schema.version import HEAD
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import events_swept, execute, migrated, settled
from tests.support.plans import plan_of, statements_of
from tests.support.postgres import fresh_database
from tests.support.sql_contracts import SqlEventLogConformance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from uuid import UUID

    from mcp_session_store.records import EventPage, NewEvent

pytestmark = pytest.mark.anyio

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
LONG = timedelta(days=100)
"""How long a time a partition is for in most of these tests: so long that hardly ever one ends while they run."""
AGE = 2 * LONG
"""How long events are kept then."""
PATIENCE = 60.0
"""Seconds, for a machine that has more to do."""


@asynccontextmanager
async def event_log(
    url: str, *, schema: str | None = None, policy: EventPolicy | None = None
) -> AsyncIterator[tuple[SqlSessionStore, SqlEventLog]]:
    """A store and its log on a database that is migrated here; at the end no connection may be checked out."""
    await migrated(url, schema=schema)
    async with (
        SqlSessionStore(url, schema=schema, timeout=PATIENCE) as store,
        SqlEventLog(store, policy=policy or EventPolicy(max_age=AGE)) as log,
    ):
        yield store, log
        await settled(store, log)


async def partition(
    url: str, *, every: timedelta = LONG, max_age: timedelta = AGE, schema: str | None = None, **options: Any
) -> bool:
    async with EventPartitions(url, schema=schema, timeout=PATIENCE) as events:
        return await events.partition(every, max_age=max_age, **options)


async def maintain(url: str, *, max_age: timedelta | None = AGE, **options: Any) -> partitions.Maintenance:
    async with EventPartitions(url, timeout=PATIENCE) as events:
        return await events.maintain(max_age=max_age, **options)


async def unpartition(url: str, *, schema: str | None = None) -> bool:
    async with EventPartitions(url, schema=schema, timeout=PATIENCE) as events:
        return await events.unpartition()


async def found_on(url: str) -> list[Partition]:
    async with EventDirectory(url) as directory:
        return list((await directory.statistics()).partitions)


async def opened(store: SqlSessionStore, count: int) -> list[UUID]:
    return [(await store.create(new_session())).key for _ in range(count)]


async def read(log: SqlEventLog, key: UUID) -> EventPage:
    page = await log.read(key, "instance.1", after=0, limit=10_000)
    assert page is not None
    return page


async def positions(log: SqlEventLog, key: UUID) -> list[int]:
    return [event.position for event in (await read(log, key)).events]


async def stored_rows(url: str, schema: str | None = None) -> Sequence[sa.Row[Any]]:
    table = events_table(schema)
    return await execute(url, sa.select(table).order_by(table.c.key, table.c.sequence))


async def let_time_pass(url: str, passed: timedelta) -> None:
    """Make all events, and the times of the partitions, so much older."""
    shift = f"- interval '{passed.total_seconds()} seconds'"
    names, statements = ["mcp_session_event_default"], []
    for one in await found_on(url):
        if one.until is None:
            continue
        names.append(one.name)
        since = None if one.since is None else one.since - passed
        name = one.name if since is None else f"mcp_session_event_{since:%Y%m%d_%H%M%S}"
        bound = "MINVALUE" if since is None else f"'{since.isoformat()}'"
        # They go in the order of their times, so that the name is free.
        statements.append(f"ALTER TABLE {one.name} RENAME TO {name}_")
        statements.append(f"ALTER TABLE {name}_ RENAME TO {name}")
        statements.append(
            f"ALTER TABLE mcp_session_event ATTACH PARTITION {name} "
            f"FOR VALUES FROM ({bound}) TO ('{(one.until - passed).isoformat()}')"
        )
    connection = await asyncpg.connect(_dsn(url))
    try:
        async with connection.transaction():
            await connection.execute(f"UPDATE mcp_session_log SET oldest_at = oldest_at {shift}")
            for name in names:
                await connection.execute(f"ALTER TABLE mcp_session_event DETACH PARTITION {name}")
                await connection.execute(f"UPDATE {name} SET created_at = created_at {shift}")
            for statement in statements:
                await connection.execute(statement)
            await connection.execute("ALTER TABLE mcp_session_event ATTACH PARTITION mcp_session_event_default DEFAULT")
    finally:
        await connection.close()


def _dsn(url: str) -> str:
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


class TestEventsInPartitions(SqlEventLogConformance):
    """All that a log does, in a table of partitions for a few minutes each."""

    @pytest.fixture
    def contract_url(self, partitioned_url: str) -> str:
        return partitioned_url


@pytest.fixture(scope="module")
def partitioned_url(postgres_server_url: str) -> Iterator[str]:
    """The URL of a database whose events are partitioned, for all tests of a class."""
    with fresh_database(postgres_server_url) as url:
        asyncio.run(migrated(url))
        asyncio.run(partition(url, every=3 * MINUTE, max_age=HOUR))
        yield url


# There and back


@pytest.mark.parametrize("schema", [None, 'My "own" schema'])
async def test_all_events_stay_there_and_back(postgres_url: str, schema: str | None) -> None:
    async with event_log(postgres_url, schema=schema) as (store, log):
        keys = await opened(store, 5)
        for position in range(4):
            for key in keys:
                await log.append(key, [new_event(position)])
        before = await stored_rows(postgres_url, schema)
        assert await partition(postgres_url, schema=schema)
        assert await stored_rows(postgres_url, schema) == before
        for key in keys:
            # A log goes on where it was.
            first = (await read(log, key)).events[0].sequence
            assert await log.append(key, [new_event(4)]) == first + 4
            assert await positions(log, key) == list(range(5))
        await store.end(keys[0], reason=EndReason.CLIENT)
        assert await log.read(keys[0], "instance.1", after=0) is None
        after = await stored_rows(postgres_url, schema)
        assert {row.key for row in after} == set(keys[1:])
        assert await unpartition(postgres_url, schema=schema)
        assert await stored_rows(postgres_url, schema) == after
        for key in keys[1:]:
            await log.append(key, [new_event(5)])
            assert await positions(log, key) == list(range(6))


async def test_what_is_done_already_is_not_done_again(postgres_url: str) -> None:
    await migrated(postgres_url)
    assert await unpartition(postgres_url) is False
    assert await partition(postgres_url) is True
    assert await partition(postgres_url) is False
    with pytest.raises(ConfigurationError, match=r"every 100 days.*events unpartition"):
        await partition(postgres_url, every=2 * LONG)
    assert await unpartition(postgres_url) is True
    assert await unpartition(postgres_url) is False
    # Names of what was there are free again.
    assert await partition(postgres_url, every=LONG / 2) is True


@pytest.mark.parametrize(
    ("every", "max_age", "said"),
    [
        (timedelta(seconds=59), HOUR, "a minute or more"),
        (timedelta(seconds=90, milliseconds=1), HOUR, "whole seconds"),
        (HOUR, None, "no partition is ever dropped"),
        (HOUR, MINUTE, "much longer"),
        (MINUTE, timedelta(days=1), "1440 partitions"),
    ],
)
async def test_a_layout_that_does_not_pay_is_refused(
    postgres_url: str, every: timedelta, max_age: timedelta | None, said: str
) -> None:
    async with EventPartitions(postgres_url) as events:
        with pytest.raises(ConfigurationError, match=said):
            await events.partition(every, max_age=max_age)


async def test_sqlite_is_refused_with_the_reason(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite has no partitions"):
        EventPartitions(sqlite_url)


async def test_a_database_without_partitions_is_not_maintained(postgres_url: str) -> None:
    with pytest.raises(SchemaMissing):
        await maintain(postgres_url)
    await migrated(postgres_url)
    with pytest.raises(ConfigurationError, match="events partition"):
        await maintain(postgres_url)


async def test_rights_and_owners_stay_what_they_were(postgres_url: str) -> None:
    owner, user = (f"{name}_{uuid.uuid4().hex}" for name in ("Owner", "User"))
    for role in (owner, user):
        await execute(postgres_url, f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'password'")
    await execute(postgres_url, f'CREATE SCHEMA sessions AUTHORIZATION "{owner}"')
    urls = {role: _as(postgres_url, role) for role in (owner, user)}
    await migrate.upgrade(urls[owner], schema="sessions")
    await execute(postgres_url, f'GRANT USAGE ON SCHEMA sessions TO "{user}"')
    await execute(postgres_url, f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA sessions TO "{user}"')

    async def used(position: int) -> None:
        async with SqlSessionStore(urls[user], schema="sessions") as store, SqlEventLog(store) as log:
            if not keys:
                keys.extend(await opened(store, 1))
            assert await log.append(keys[0], [new_event(position)]) is not None
            assert await positions(log, keys[0]) == list(range(position + 1))
            assert await events_swept(log) == 0
            async with EventDirectory(urls[user], schema="sessions") as directory:
                assert (await directory.statistics()).events == position + 1

    keys: list[UUID] = []
    await used(0)
    # By somebody who may do anything: what he makes belongs to whom it did before.
    await partition(postgres_url, schema="sessions")
    await used(1)
    owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'sessions'"
    assert [tuple(row) for row in await execute(postgres_url, owners)] == [(owner,)]
    async with EventPartitions(urls[owner], schema="sessions") as events:
        assert len((await events.maintain(max_age=AGE, ahead=5)).created) == 2
    await used(2)
    await unpartition(urls[owner], schema="sessions")
    await used(3)
    assert [tuple(row) for row in await execute(postgres_url, owners)] == [(owner,)]
    for role in (user, owner):
        await execute(postgres_url, f'DROP OWNED BY "{role}" CASCADE')
        await execute(postgres_url, f'DROP ROLE "{role}"')


def _as(url: str, role: str) -> str:
    return sa.make_url(url).set(username=role, password="password").render_as_string(hide_password=False)


# Old partitions are dropped


async def test_a_partition_is_dropped_when_all_of_its_events_are_too_old(postgres_url: str) -> None:
    async with event_log(postgres_url) as (store, log):
        (key,) = await opened(store, 1)
        await log.append(key, [new_event(0), new_event(1)])
        await partition(postgres_url)
        await let_time_pass(postgres_url, LONG)
        await log.append(key, [new_event(2)])
        assert (await maintain(postgres_url)).dropped == []
        await let_time_pass(postgres_url, LONG)
        await log.append(key, [new_event(3)])
        # The first is for a time that ended less than that ago.
        assert (await maintain(postgres_url)).dropped == []
        assert await positions(log, key) == [0, 1, 2, 3]
        await let_time_pass(postgres_url, LONG)
        assert (await maintain(postgres_url)).dropped == ["mcp_session_event_first"]
        assert await positions(log, key) == [2, 3]
        assert len((await maintain(postgres_url, max_age=LONG)).dropped) == 1
        assert await positions(log, key) == [3]
        assert (await maintain(postgres_url, max_age=None)).dropped == []


async def test_what_is_read_and_noted_after_a_drop_is_right(postgres_url: str) -> None:
    async with event_log(postgres_url) as (store, log), EventDirectory(postgres_url) as directory:
        keys = await opened(store, 3)
        for key in keys:
            await log.append(key, [new_event(0, message="12345"), new_event(1, message="é")])
        await partition(postgres_url)
        await let_time_pass(postgres_url, LONG)
        for key in keys[:2]:
            await log.append(key, [new_event(2, message="123")])
        await let_time_pass(postgres_url, 2 * LONG)
        assert (await maintain(postgres_url)).dropped == ["mcp_session_event_first"]
        # At once for whoever reads,
        page = await read(log, keys[0])
        assert page.first == page.last == page.events[0].sequence
        empty = await read(log, keys[2])
        assert (empty.events, empty.first) == ([], empty.last + 1)
        listed = {one.key: one for one in (await directory.page()).logs}
        assert (listed[keys[0]].events, listed[keys[0]].bytes) == (1, 3)
        assert (listed[keys[2]].events, listed[keys[2]].bytes, listed[keys[2]].oldest_at) == (0, 0, None)
        # and with the next sweep for the logs.
        assert (await directory.statistics()).events == 8
        assert await events_swept(log) == 0
        statistics = await directory.statistics()
        assert (statistics.sessions, statistics.events, statistics.bytes) == (2, 2, 6)
        assert await events_swept(log) == 0
        assert {one.key for one in (await directory.page()).logs} == set(keys[:2])
        for key in keys:
            assert await log.append(key, [new_event(9, message="1")]) is not None
        statistics = await directory.statistics()
        assert (statistics.sessions, statistics.events, statistics.bytes) == (3, 5, 9)


async def test_counts_that_a_drop_made_wrong_remove_no_event_that_is_there(postgres_url: str) -> None:
    # No age, so that no sweep sets them right.
    policy = EventPolicy(max_age=None, max_events_per_session=10, max_bytes_per_session=1024)
    async with event_log(postgres_url, policy=policy) as (store, log):
        (key,) = await opened(store, 1)
        await log.append(key, [new_event(n, message="x" * 80) for n in range(9)])
        await partition(postgres_url)
        await let_time_pass(postgres_url, 4 * LONG)
        assert (await maintain(postgres_url)).dropped != []
        # Ten are counted from here on, and more bytes than may be, and these are kept all the same.
        for position in range(9, 15):
            await log.append(key, [new_event(position, message="x" * 80)])
        assert await positions(log, key) == list(range(9, 15))


async def test_a_sweep_leaves_to_be_dropped_what_lies_in_a_partition(postgres_url: str) -> None:
    async with event_log(postgres_url) as (store, log), EventDirectory(postgres_url) as directory:
        (key,) = await opened(store, 1)
        await log.append(key, [new_event(0)])
        await partition(postgres_url)
        await let_time_pass(postgres_url, 3 * LONG)
        assert await directory.preview(log.policy) == 0
        assert await events_swept(log) == 0
        assert await positions(log, key) == [0]
        # But not for ever: somebody may have forgotten to drop it.
        await let_time_pass(postgres_url, 3 * LONG)
        assert await directory.preview(log.policy) == 1
        assert await events_swept(log) == 1
        assert await positions(log, key) == []


async def test_events_of_a_time_without_a_partition_are_kept_and_swept(postgres_url: str) -> None:
    async with event_log(postgres_url) as (store, log):
        (key,) = await opened(store, 1)
        await log.append(key, [new_event(0)])
        await partition(postgres_url, ahead=1)
        await let_time_pass(postgres_url, 3 * LONG)
        # Nobody has made one for now.
        await log.append(key, [new_event(1)])
        done = await maintain(postgres_url, ahead=2)
        assert done.default_in_use
        assert done.dropped == ["mcp_session_event_first"]
        assert len(done.created) == 2
        await log.append(key, [new_event(2)])
        assert await positions(log, key) == [1, 2]
        assert await events_swept(log) == 0
        assert await positions(log, key) == [1, 2]
        # It is older than all that is in a partition, once these have been dropped.
        await let_time_pass(postgres_url, 4 * LONG)
        await log.append(key, [new_event(3)])
        done = await maintain(postgres_url)
        assert done.default_in_use
        assert await events_swept(log) == 2
        assert await positions(log, key) == [3]
        assert await events_swept(log) == 0


@pytest.mark.parametrize("settings", [[], ["timezone = 'Asia/Kolkata'", "datestyle = 'SQL, DMY'"]])
async def test_partitions_of_times_to_come_are_made_once(postgres_url: str, settings: list[str]) -> None:
    await migrated(postgres_url)
    for setting in settings:
        await execute(postgres_url, f"ALTER DATABASE {sa.make_url(postgres_url).database} SET {setting}")
    await partition(postgres_url, ahead=2)
    assert await maintain(postgres_url, ahead=2) == partitions.Maintenance(created=[], dropped=[], default_in_use=False)
    done = await maintain(postgres_url, ahead=4)
    assert len(done.created) == 2
    assert await maintain(postgres_url, ahead=4) == partitions.Maintenance(created=[], dropped=[], default_in_use=False)
    found = await found_on(postgres_url)
    assert [one.name for one in found][-3:] == [*done.created, "mcp_session_event_default"]
    bounds = [(one.since, one.until) for one in found[:-1]]
    assert bounds[0][0] is None
    assert all(later[0] == earlier[1] for earlier, later in itertools.pairwise(bounds))
    assert {later - earlier for earlier, later in bounds[1:] if earlier and later} == {LONG}
    assert all(until is not None and until.time() == time() for _, until in bounds)


# Locks


@asynccontextmanager
async def in_use(url: str, statement: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's transaction, that has done something and goes on."""
    connection = await asyncpg.connect(_dsn(url))
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(statement)
        yield connection
        await transaction.rollback()
    finally:
        await connection.close()


@pytest.mark.parametrize("change", ["partition", "unpartition", "create", "drop"])
async def test_a_change_that_would_have_to_wait_keeps_nobody_waiting_and_is_given_up(
    postgres_url: str, change: str
) -> None:
    async with event_log(postgres_url) as (store, log):
        (key,) = await opened(store, 1)
        await log.append(key, [new_event(0)])
        if change != "partition":
            await partition(postgres_url, ahead=1)
        if change == "drop":
            await let_time_pass(postgres_url, 4 * LONG)
        before = await found_on(postgres_url)
        async with (
            in_use(postgres_url, "SELECT * FROM mcp_session_event"),
            EventPartitions(postgres_url, timeout=10) as events,
        ):
            calls: dict[str, Callable[[], Awaitable[Any]]] = {
                "partition": lambda: events.partition(LONG, max_age=AGE),
                "unpartition": events.unpartition,
                "create": lambda: events.maintain(max_age=None),
                "drop": lambda: events.maintain(max_age=AGE),
            }
            task = asyncio.ensure_future(calls[change]())
            position = 0
            while not task.done():
                position += 1
                await log.append(key, [new_event(position)])
                assert await positions(log, key) == list(range(position + 1))
            with pytest.raises(StoreBusy, match=r"in use.*nothing has changed.*--timeout"):
                await task
        assert [one.name for one in await found_on(postgres_url)] == [one.name for one in before]
        # And when it need not wait, it works.
        if change == "partition":
            assert await partition(postgres_url)
        elif change == "unpartition":
            assert await unpartition(postgres_url)
        else:
            done = await maintain(postgres_url)
            assert done.created
            assert bool(done.dropped) == (change == "drop")


async def test_a_change_waits_for_a_migration(postgres_url: str) -> None:
    await migrated(postgres_url)
    # The first that a migration does is to take the lock.
    migration = migrate.upgrade_sql(postgres_url, from_revision=HEAD)
    (lock,) = (line for line in migration.splitlines() if "pg_advisory_xact_lock" in line)
    async with in_use(postgres_url, lock), EventPartitions(postgres_url, timeout=8) as events:
        with pytest.raises(StoreBusy, match="nothing has changed"):
            await events.partition(LONG, max_age=AGE)
    assert await partition(postgres_url)


async def test_a_default_partition_that_takes_too_long_to_look_through_stops_nothing_else(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with event_log(postgres_url) as (store, log):
        (key,) = await opened(store, 1)
        await partition(postgres_url, ahead=1)
        await let_time_pass(postgres_url, 5 * LONG)
        await execute(
            postgres_url,
            "INSERT INTO mcp_session_event SELECT gen_random_uuid(), n, '', n, n, '', 0, clock_timestamp() "
            "FROM generate_series(1, 100000) AS n",
        )
        monkeypatch.setattr(partitions, "ATTACH_TIMEOUT", 0.001)
        with pytest.raises(StoreBusy, match=r"take too long.*events unpartition"):
            await maintain(postgres_url)
        # What could be done before is done.
        names = [one.name for one in await found_on(postgres_url)]
        assert len(names) == 2
        await log.append(key, [new_event(0)])
        assert await positions(log, key) == [0]
        monkeypatch.undo()
        assert len((await maintain(postgres_url)).created) == 3


# Plans


@pytest.mark.parametrize("parted", [False, True])
async def test_what_is_done_with_a_few_sessions_takes_the_index_of_events_and_of_each_partition(
    postgres_url: str, parted: bool
) -> None:
    async with event_log(postgres_url, policy=EventPolicy(max_events_per_session=10)) as (store, log):
        keys = await opened(store, 30)
        for key in keys:
            await log.append(key, [new_event(n) for n in range(9)])
        if parted:
            await partition(postgres_url, ahead=7)
        # Many of each of some other sessions: enough to make a planner think that it is best to read all of them.
        others = "md5(CAST(number AS text))::uuid, n, 'instance.1', n, n, 'notification', n, clock_timestamp()"
        for age in range(8):
            await execute(
                postgres_url,
                f"INSERT INTO mcp_session_event SELECT {others} + interval '{100 * age} days', 'x' FROM "
                f"generate_series(1, 50) AS number, generate_series({500 * age}, {500 * age + 499}) AS n",
            )
        await execute(postgres_url, "ANALYZE")

        async def use(store: SqlSessionStore) -> None:
            await log.append(keys[0], [new_event(9)], again=True)
            await log.read(keys[0], "instance.1", after=0)
            await asyncio.gather(*(log.append(key, [new_event(n) for n in range(9, 14)]) for key in keys[1:]))
            assert await positions(log, keys[1]) == list(range(5, 14))
            await store.end(keys[0], reason=EndReason.CLIENT)

        seen = {
            statement: parameters
            for statement, parameters in (await statements_of(store, use)).items()
            if re.search(r"(FROM|JOIN) mcp_session_event", statement) and "INSERT INTO" not in statement
        }
        assert len([statement for statement in seen if "DELETE" in statement]) == 2
        assert len(seen) >= 5
        index = r"mcp_session_event_\d+_\d+_pkey" if parted else "mcp_session_event_pkey"
        for statement, parameters in seen.items():
            plan = await plan_of(store, statement, parameters)
            # The default one is empty: that costs nothing, however it is read.
            read = [line for line in plan.splitlines() if "mcp_session_event_default" not in line]
            assert "Seq Scan on mcp_session_event" not in "\n".join(read), f"{statement}\n\n{plan}"
            assert re.search(index, plan), f"{statement}\n\n{plan}"


# Beside running servers


class Traffic:
    """Sessions that are written to and followed while something happens to the table."""

    def __init__(self, logs: Sequence[SqlEventLog], keys: Sequence[UUID]) -> None:
        self.logs = logs
        self.keys = keys
        self.stored: dict[UUID, list[tuple[int, int]]] = {key: [] for key in keys}
        """Sequences and positions, as they were told."""
        self.over = False
        self.all_stored = False
        """Whether nobody writes any more."""

    async def write(self, log: SqlEventLog, writer: int) -> None:
        count = 0
        while not self.over:
            key = random.choice(self.keys)
            events: list[NewEvent] = []
            for _ in range(random.choice([1, 1, 1, 5])):
                count += 1
                events.append(new_event(count * 100 + writer, message="x" * random.choice([10, 100])))
            first = await log.append(key, events)
            assert first is not None
            self.stored[key] += [(first + n, event.position) for n, event in enumerate(events)]

    async def come_and_go(self, store: SqlSessionStore, log: SqlEventLog) -> None:
        """Sessions that end with their events, and sweeps."""
        while not self.over:
            key = (await store.create(new_session())).key
            assert await log.append(key, [new_event(n) for n in range(20)]) is not None
            assert await store.end(key, reason=EndReason.CLIENT)
            assert await log.append(key, [new_event()]) is None
            await log.sweep()

    async def follow(self, log: SqlEventLog, key: UUID) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        after = 0
        while True:
            last_look = self.all_stored
            page = await log.read(key, "instance.1", after=after, limit=50)
            if page is not None and page.events:
                seen += [(event.sequence, event.position) for event in page.events]
                after = page.events[-1].sequence
            elif last_look:
                return seen
            await asyncio.sleep(0.002)

    async def goes_on(self) -> None:
        """Wait until many more events are stored."""
        enough = self.events + 100
        async with asyncio.timeout(PATIENCE):
            while self.events < enough:
                await asyncio.sleep(0.01)

    @property
    def events(self) -> int:
        """Number of events that were stored."""
        return sum(map(len, self.stored.values()))


async def traffic_while(url: str, happens: Callable[[Traffic], Awaitable[None]]) -> Traffic:
    """Write and follow while something happens; nothing may fail, and what was read is all that was stored."""
    await migrated(url)
    policy = EventPolicy(max_age=AGE, max_events_per_session=1_000_000, max_bytes_per_session=1024**3)
    async with event_log(url, policy=policy) as (store, one), event_log(url, policy=policy) as (_, other):
        traffic = Traffic([one, other], await opened(store, 6))
        writers = [asyncio.ensure_future(traffic.write(log, n)) for n, log in enumerate([one, other, one, other])]
        others = [asyncio.ensure_future(traffic.come_and_go(store, log)) for log in (one, other)]
        followers = [asyncio.ensure_future(traffic.follow(log, key)) for log in (one, other) for key in traffic.keys]
        try:
            await happens(traffic)
        finally:
            traffic.over = True
            done = await asyncio.gather(*writers, *others, return_exceptions=True)
            traffic.all_stored = True
            read = await asyncio.gather(*followers, return_exceptions=True)
        assert [outcome for outcome in [*done, *read] if isinstance(outcome, BaseException)] == []
        for key, seen in zip([*traffic.keys, *traffic.keys], read, strict=True):
            assert seen == sorted(traffic.stored[key])
            sequences = [sequence for sequence, _ in traffic.stored[key]]
            assert sorted(sequences) == list(range(min(sequences), min(sequences) + len(sequences)))
        rows = await execute(url, sa.select(sa.func.count().label("stored")).select_from(events_table()))
        assert rows[0].stored == traffic.events
        return traffic


async def test_nothing_is_lost_while_the_table_is_partitioned_and_put_together_again(postgres_url: str) -> None:
    async def happens(traffic: Traffic) -> None:
        for _ in range(3):
            assert await partition(postgres_url)
            await traffic.goes_on()
            assert await unpartition(postgres_url)
            await traffic.goes_on()

    traffic = await traffic_while(postgres_url, happens)
    assert traffic.events > 100
    assert [row.deadlocks for row in await _deadlocks(postgres_url)] == [0]


async def test_nothing_is_lost_while_partitions_come_and_go(postgres_url: str) -> None:
    await migrated(postgres_url)
    await partition(postgres_url, ahead=1)
    await let_time_pass(postgres_url, 24 * LONG)
    assert (await maintain(postgres_url)).dropped == ["mcp_session_event_first"]

    async def happens(traffic: Traffic) -> None:
        for turn in range(4):
            since, until = "2001-01-01 00:00Z", "2001-01-01 01:00Z"
            old = f"mcp_session_event_old{turn}"
            bounds = f"FOR VALUES FROM ('{since}') TO ('{until}')"
            await execute(postgres_url, f"CREATE TABLE {old} PARTITION OF mcp_session_event {bounds}")
            done = await asyncio.gather(*(maintain(postgres_url, ahead=turn + 4) for _ in range(3)))
            assert [name for one in done for name in one.dropped if "old" in name] == [old]
            assert sum(len(one.created) for one in done) == 1
            await traffic.goes_on()

    await traffic_while(postgres_url, happens)
    assert [row.deadlocks for row in await _deadlocks(postgres_url)] == [0]


async def _deadlocks(url: str) -> Sequence[sa.Row[Any]]:
    return await execute(url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
