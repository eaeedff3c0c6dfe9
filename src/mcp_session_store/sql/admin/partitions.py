"""Events that are partitioned by time, on Postgres: old ones are dropped with their partition, not deleted one by one.

All statements work on both layouts. An event whose time nobody made a partition for goes into the default one.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from mcp_session_store.errors import ConfigurationError, StoreUnavailable
from mcp_session_store.sql.admin.reader import DEFAULT_TIMEOUT, EPOCH
from mcp_session_store.sql.database import Database, transaction
from mcp_session_store.sql.dialects.functions import MOMENT, StoreClock
from mcp_session_store.sql.dialects.partitions import TablePartitions
from mcp_session_store.sql.schema.tables import events_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.database import Attempt

__all__ = ["AHEAD", "EventPartitions", "Maintenance", "Partition", "partitions_of"]

_T = TypeVar("_T")

AHEAD: Final = 3
"""Partitions that are made before their time, unless it is told otherwise."""
MAX_PARTITIONS: Final = 50
"""That `max_age` may extend over: whoever reads or removes events looks into each."""
SHORTEST: Final = timedelta(minutes=1)
"""That a partition may be for."""

_LOCK_TIMEOUT: Final = 0.3
"""Seconds to wait for a lock: whoever stores or reads an event meanwhile waits behind us."""
_ATTACH_TIMEOUT: Final = 1.0
"""Seconds that Postgres may take to make sure that no event in the default partition belongs into a new one, for
as long as which nobody reads."""
_PAUSE: Final = (0.05, 0.5)
"""Seconds between two tries to get a lock."""
_TIMED_OUT: Final = "57014"
# A lock that was not to be had in time, a deadlock, an event that came into the default partition meanwhile.
_TRY_AGAIN: Final = frozenset({"55P03", "40P01", "23514"})

_FIRST: Final = "first"
_DEFAULT: Final = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """One partition of the table of events."""

    name: str
    since: datetime | None
    """The time of the earliest event that may be in it; `None`: of any."""
    until: datetime | None
    """Events of this time are in it no more. `None`: it is the default one, for those that belong to no other."""
    size: int
    """What it takes with its index, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Maintenance:
    """What was done to the partitions."""

    created: Sequence[str]
    """Names of those that were made ahead of their time."""
    dropped: Sequence[str]
    """Names of those that were dropped with their events."""
    astray: bool
    """The default partition holds events, because there was none for their time."""


class EventPartitions:
    """Makes the table of events one of partitions, keeps these up, and undoes it.

    All may be called at any time, beside running servers and beside one another: each change is one transaction under
    the lock of migrations. It waits only briefly for other locks, during which nobody stores or reads, and tries
    again until half of the timeout has passed.

    The table is that of all namespaces. Who calls must be its owner.

    Args:
        url_or_engine: As for `SqlSessionStore`; Postgres.
        schema: The schema with the tables. The first of the search path unless given.
        timeout: Seconds that a call takes at most. A call that does not end in time has changed nothing.

    Raises:
        ConfigurationError: An argument cannot work, or the database is none of Postgres; the message names it.
    """

    def __init__(
        self, url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self._database = Database(url_or_engine, schema=schema, auto_upgrade=False, timeout=timeout)
        dialect = self._database.dialect
        if not dialect.has_partitions:
            raise ConfigurationError(
                f"{dialect.name} has no partitions: a sweep removes events one by one there, as it does on any "
                "database unless told otherwise; partition them on Postgres only"
            )
        self._table = events_table(self._database.schema)

    async def __aenter__(self) -> Self:
        self._database.reopen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Release connections. Idempotent."""
        self._database.close_to_calls()
        await self._database.aclose()

    async def partition(self, every: timedelta, *, max_age: timedelta | None, ahead: int = AHEAD) -> bool:
        """Partition the events from now on. Those that are there stay, in a first partition.

        Events can neither be stored nor read while an index on the present ones is built.

        Args:
            every: How long a time each partition is for; they begin at multiples of it, in UTC.
            max_age: How long events are kept, by the policy that `maintain` will have.
            ahead: Partitions to make for times to come.

        Returns:
            False where that was done before.

        Raises:
            ConfigurationError: It would not pay, or is impossible; or partitions of another length are there.
            StoreUnavailable: It could not be done in time, and nothing has changed.
        """
        _check(every, max_age)

        async def change(connection: AsyncConnection) -> bool:
            if await self._is_partitioned(connection):
                found = _length(await partitions_of(connection, self._table))
                if found != every:
                    raise ConfigurationError(
                        f"the events are partitioned already, every {found}; undo that first, with "
                        "mcp-session-store events unpartition"
                    )
                return False
            await self._convert(connection, every, ahead)
            return True

        return await self._change(change)

    async def maintain(self, *, max_age: timedelta | None, ahead: int = AHEAD) -> Maintenance:
        """Drop the partitions of which all events are too old, and make those of times to come.

        What the logs of sessions tell about dropped events is set right by the next sweep of each namespace.

        Args:
            max_age: How long events are kept; `None`: for ever. Of several namespaces the longest.
            ahead: Partitions that there are to be for times to come.

        Raises:
            ConfigurationError: The events are not partitioned.
            StoreUnavailable: Not all could be done in time.
        """
        dropped = await self._change(lambda connection: self._drop(connection, max_age))
        created: list[str] = []
        while (name := await self._change(lambda connection: self._add_next(connection, ahead))) is not None:
            created.append(name)
        astray = await self._change(self._default_in_use)
        return Maintenance(created=created, dropped=dropped, astray=astray)

    async def unpartition(self) -> bool:
        """Make one table again, with all events in it.

        Events can neither be stored nor read while they are copied.

        Returns:
            False where there were no partitions.

        Raises:
            StoreUnavailable: It could not be done in time, and nothing has changed.
        """

        async def change(connection: AsyncConnection) -> bool:
            if not await self._is_partitioned(connection):
                return False
            await self._reunite(connection)
            return True

        return await self._change(change)

    async def _change(self, change: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
        """Make a change in a transaction of its own, that nobody waits long for."""
        database = self._database
        database.bind()
        begun = time.monotonic()

        async def attempt(attempt: Attempt) -> _T:
            connection = attempt.connection
            while True:
                try:
                    async with transaction(connection, database.dialect):
                        left = begun + 0.9 * database.timeout - time.monotonic()
                        # The server's own timeouts: it would go on with a statement that the driver gives up.
                        await _set_timeouts(connection, lock=_LOCK_TIMEOUT, statement=left)
                        await connection.run_sync(database.dialect.lock_migrations)
                        return await change(connection)
                except DBAPIError as error:
                    state = getattr(error.orig, "sqlstate", None)
                    if state == _TIMED_OUT:
                        raise StoreUnavailable(
                            f"the database {database.shown_url} took too long, and nothing has changed; give it more "
                            "time with --timeout (timeout=)"
                        ) from error
                    if state not in _TRY_AGAIN:
                        raise
                    if time.monotonic() - begun > database.timeout / 2:
                        raise StoreUnavailable(
                            "the events were in use whenever their table was to be locked, and nothing has changed; "
                            "try again when there is less to do, or for longer with --timeout (timeout=)"
                        ) from error
                await asyncio.sleep(random.uniform(*_PAUSE))  # noqa: S311

        async with database.lease(writes=False) as lease:
            return await lease.run(attempt)

    async def _is_partitioned(self, connection: AsyncConnection) -> bool:
        found = await connection.execute(
            sa.text("SELECT count(*) FROM pg_partitioned_table WHERE partrelid = to_regclass(CAST(:name AS text))"),
            {"name": self._name(connection)},
        )
        return bool(found.scalar_one())

    def _name(self, connection: AsyncConnection, suffix: str = "") -> str:
        """The table's name, or that of a table that belongs to it, as it stands in SQL."""
        preparer = connection.dialect.identifier_preparer
        name = preparer.quote(f"{self._table.name}_{suffix}" if suffix else self._table.name)
        return name if self._table.schema is None else f"{preparer.quote(self._table.schema)}.{name}"

    async def _convert(self, connection: AsyncConnection, every: timedelta, ahead: int) -> None:
        run = connection.exec_driver_sql
        whole, first = self._name(connection), self._name(connection, _FIRST)
        await run(f"LOCK TABLE {whole} IN ACCESS EXCLUSIVE MODE")
        # Read with the lock: whoever stores an event does so after that, and before or after the boundary.
        now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
        boundary = _floor(now, every) + every
        await run(f"ALTER TABLE {whole} RENAME TO {connection.dialect.identifier_preparer.quote(_of(_FIRST))}")
        await self._drop_primary_key(connection, first)
        await run(f"CREATE TABLE {whole} (LIKE {first} INCLUDING ALL) PARTITION BY RANGE (created_at)")
        await self._give_rights(connection, of=first, to=whole)
        # The column of the partitions must be part of it. A sequence is unique because its log gives it once.
        await run(f"ALTER TABLE {whole} ADD PRIMARY KEY (key, sequence, created_at)")
        await run(f"ALTER TABLE {first} ADD PRIMARY KEY (key, sequence, created_at)")
        await run(f"ALTER TABLE {whole} ATTACH PARTITION {first} FOR VALUES FROM (MINVALUE) TO ({_literal(boundary)})")
        await self._create(connection, _DEFAULT, "DEFAULT")
        for number in range(max(1, ahead)):
            since = boundary + number * every
            await self._create(connection, *_range(since, since + every))

    async def _reunite(self, connection: AsyncConnection) -> None:
        run = connection.exec_driver_sql
        parted, whole = self._name(connection), self._name(connection, "whole")
        await run(f"LOCK TABLE {parted} IN ACCESS EXCLUSIVE MODE")
        await run(f"CREATE TABLE {whole} (LIKE {parted} INCLUDING ALL EXCLUDING INDEXES)")
        await self._give_rights(connection, of=parted, to=whole)
        await run(f"INSERT INTO {whole} SELECT * FROM {parted}")  # noqa: S608 - our own names
        await run(f"DROP TABLE {parted}")
        await run(f"ALTER TABLE {whole} RENAME TO {connection.dialect.identifier_preparer.quote(self._table.name)}")
        await run(f"ALTER TABLE {parted} ADD PRIMARY KEY (key, sequence)")

    async def _drop_primary_key(self, connection: AsyncConnection, table: str) -> None:
        found = await connection.execute(
            sa.text(
                "SELECT quote_ident(conname) FROM pg_constraint "
                "WHERE conrelid = to_regclass(CAST(:name AS text)) AND contype = 'p'"
            ),
            {"name": table},
        )
        await connection.exec_driver_sql(f"ALTER TABLE {table} DROP CONSTRAINT {found.scalar_one()}")

    async def _give_rights(self, connection: AsyncConnection, *, of: str, to: str) -> None:
        """Have a table belong to whom another one does, and used by whom that may be."""
        owner = await connection.execute(
            sa.text(
                "SELECT quote_ident(pg_get_userbyid(relowner)) FROM pg_class "
                "WHERE oid = to_regclass(CAST(:name AS text)) AND pg_get_userbyid(relowner) <> current_user"
            ),
            {"name": of},
        )
        grants = await connection.execute(
            sa.text(
                "SELECT privilege_type || ' ON ' || :to || ' TO ' || "
                "CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END || "
                "CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END "
                "FROM pg_class, aclexplode(relacl) "
                "WHERE pg_class.oid = to_regclass(CAST(:name AS text)) AND grantee <> relowner"
            ),
            {"name": of, "to": to},
        )
        for grant in grants.scalars().all():
            await connection.exec_driver_sql(f"GRANT {grant}")
        if (other := owner.scalar()) is not None:
            await connection.exec_driver_sql(f"ALTER TABLE {to} OWNER TO {other}")

    async def _create(self, connection: AsyncConnection, suffix: str, bound: str) -> None:
        """Make a partition beside the table, and attach it: that keeps nobody from storing."""
        run = connection.exec_driver_sql
        whole, partition = self._name(connection), self._name(connection, suffix)
        await run(f"CREATE TABLE {partition} (LIKE {whole} INCLUDING ALL)")
        await self._give_rights(connection, of=whole, to=partition)
        await run(f"ALTER TABLE {whole} ATTACH PARTITION {partition} {bound}")

    async def _drop(self, connection: AsyncConnection, max_age: timedelta | None) -> list[str]:
        found, now = await self._present(connection)
        if max_age is None:
            return []
        old = [one for one in found if one.until is not None and one.until <= now - max_age]
        # The last one stays, so that one can see how long they are to be.
        last = max((one.until for one in found if one.until is not None), default=None)
        names = [one.name for one in old if one.until != last]
        if names:
            tables = ", ".join(self._name(connection, _suffix(name)) for name in names)
            await connection.exec_driver_sql(f"DROP TABLE {tables}")
        return names

    async def _add_next(self, connection: AsyncConnection, ahead: int) -> str | None:
        """Make the earliest partition that is missing; its name, or `None` where there are enough."""
        found, now = await self._present(connection)
        every = _length(found)
        current = _floor(now, every)
        for number in range(ahead + 1):
            since, until = current + number * every, current + (number + 1) * every
            if any(one.until is not None and one.until > since and (one.since or since) < until for one in found):
                continue
            if number == 0 and await self._default_in_use(connection, since):
                # Those of this time have a place already.
                continue
            suffix, bound = _range(since, until)
            await _set_timeouts(connection, lock=_LOCK_TIMEOUT, statement=_ATTACH_TIMEOUT)
            try:
                await self._create(connection, suffix, bound)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _TIMED_OUT:
                    raise
                raise StoreUnavailable(
                    f"the partition {_of(suffix)} was not made, because the default one holds so many events that to "
                    "look through them would take too long; try again when sweeps have removed them, or undo it all "
                    "and begin anew, with mcp-session-store events unpartition"
                ) from error
            return _of(suffix)
        return None

    async def _present(self, connection: AsyncConnection) -> tuple[list[Partition], datetime]:
        if not await self._is_partitioned(connection):
            raise ConfigurationError(
                "the events are not partitioned; that is done with mcp-session-store events partition"
            )
        now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
        return await partitions_of(connection, self._table), now

    async def _default_in_use(self, connection: AsyncConnection, since: datetime = EPOCH) -> bool:
        """Whether the default partition holds events from some time on."""
        created_at = sa.column("created_at", MOMENT)
        default = sa.table(_of(_DEFAULT), created_at, schema=self._table.schema)
        statement = sa.select(sa.exists().select_from(default).where(created_at >= sa.literal(since, MOMENT)))
        return bool((await connection.execute(statement)).scalar_one())


async def partitions_of(connection: AsyncConnection, table: sa.Table) -> list[Partition]:
    """The partitions of a table of Postgres, the default one last; none of a table without. Within a transaction."""
    await connection.exec_driver_sql("SET LOCAL datestyle = 'ISO'")
    found = TablePartitions(table)
    statement = (
        sa.select(found.name, found.since, found.until, sa.func.pg_total_relation_size(found.oid))
        .select_from(found.rows)
        .where(found.among)
        .order_by(found.is_default, sa.nulls_first(found.since))
    )
    rows = await connection.execute(statement)
    return [Partition(name=name, since=since, until=until, size=size) for name, since, until, size in rows]


def _check(every: timedelta, max_age: timedelta | None) -> None:
    if every < SHORTEST or every % timedelta(seconds=1):
        raise ConfigurationError(f"--every (every=) {every} must be whole seconds, and a minute or more")
    if max_age is None:
        raise ConfigurationError(
            "without --events-max-age (max_age=) nothing is ever dropped, and partitions do not pay; give one"
        )
    if every > max_age:
        raise ConfigurationError(
            f"partitions for {every} would hold events for much longer than --events-max-age (max_age=) {max_age}; "
            "make them as short as that, or shorter"
        )
    if max_age / every > MAX_PARTITIONS:
        raise ConfigurationError(
            f"--events-max-age (max_age=) {max_age} is {max_age // every} partitions for {every}, and whoever reads or "
            f"removes events looks into each; make them longer, so that there are {MAX_PARTITIONS} at most"
        )


async def _set_timeouts(connection: AsyncConnection, *, lock: float, statement: float) -> None:
    for name, seconds in (("lock_timeout", lock), ("statement_timeout", statement)):
        await connection.exec_driver_sql(f"SET LOCAL {name} = {max(1, int(seconds * 1000))}")


def _of(suffix: str) -> str:
    return f"{events_table().name}_{suffix}"


def _suffix(name: str) -> str:
    return name.removeprefix(_of(""))


def _range(since: datetime, until: datetime) -> tuple[str, str]:
    """The suffix of a partition's name, and its bounds in SQL."""
    return f"{since:%Y%m%d_%H%M%S}", f"FOR VALUES FROM ({_literal(since)}) TO ({_literal(until)})"


def _literal(moment: datetime) -> str:
    return f"'{moment.isoformat()}'"


def _length(partitions: Sequence[Partition]) -> timedelta:
    """How long a time a partition is for: that of the latest one."""
    ranges = [(one.since, one.until) for one in partitions if one.since is not None and one.until is not None]
    since, until = max(ranges)
    return until - since


def _floor(moment: datetime, every: timedelta) -> datetime:
    return moment - (moment - EPOCH) % every
