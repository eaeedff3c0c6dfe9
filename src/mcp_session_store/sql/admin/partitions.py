"""Events that are partitioned by time, on Postgres: old ones are dropped with their partition, not deleted one by one.

All statements of this package work on both layouts. An event for whose time there is no partition is stored in the
default partition.
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

from mcp_session_store.errors import ConfigurationError, StoreBusy
from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.dialects.functions import EPOCH, StoreClock
from mcp_session_store.sql.dialects.partitions import (
    TIMED_OUT,
    TRY_AGAIN,
    Partition,
    PartitionedTable,
    set_timeouts,
    sqlstate_of,
    start_of_range,
)
from mcp_session_store.sql.engine import shown_command, url_of
from mcp_session_store.sql.schema.tables import events_table
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.database import Attempt

__all__ = ["AHEAD", "EventPartitions", "Maintenance", "Partition"]

_T = TypeVar("_T")

AHEAD: Final = 3
"""Partitions that are made before their time, unless given."""
MAX_PARTITIONS: Final = 50
"""Partitions that `max_age` may extend over, because reading and removing events looks into each."""
SHORTEST: Final = timedelta(minutes=1)
"""Shortest time that a partition may be for."""

LOCK_TIMEOUT: Final = 0.3
"""Seconds to wait for a lock, because calls that store or read events meanwhile wait behind it."""
ATTACH_TIMEOUT: Final = 1.0
"""Seconds that Postgres may take to check that no event in the default partition belongs into a new one. Events
cannot be read meanwhile."""
_PAUSE: Final = (0.05, 0.5)
"""Range of seconds between two tries to get a lock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Maintenance:
    """Result of maintaining the partitions."""

    created: Sequence[str]
    """Names of the partitions that were made ahead of their time."""
    dropped: Sequence[str]
    """Names of the partitions that were dropped with their events."""
    default_in_use: bool
    """Whether the default partition holds events, because there was no other for their time."""


class EventPartitions:
    """Partitions of the table of events: makes them, maintains them, and undoes them.

    All methods may be called at any time, beside running servers and each other: each change is one transaction under
    the lock of migrations. It waits only briefly for other locks, while events cannot be stored or read, and tries
    again until half of the timeout has passed.

    The table is that of all namespaces. The database's user must be its owner.

    Args:
        url_or_engine: As for `SqlSessionStore`; Postgres.
        schema: The schema with the tables. The first of the search path unless given.
        timeout: Seconds that a call takes at most. A call that fails because of it has changed nothing.

    Raises:
        ConfigurationError: An argument cannot work, or the database is not Postgres; the message names it.
    """

    def __init__(
        self, url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, timeout: float = OPERATOR_TIMEOUT
    ) -> None:
        self._database = Database(url_or_engine, schema=schema, auto_upgrade=False, timeout=timeout)
        dialect = self._database.dialect
        if not dialect.has_partitions:
            raise ConfigurationError(
                f"{dialect.name} has no partitions: a sweep removes events one by one there, as it does on any "
                "database where events are not partitioned; partition them on Postgres only"
            )
        events = events_table(self._database.schema)
        self._table = PartitionedTable(events, by=events.c.created_at)

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
        """Partition the events from now on. The present ones stay, in a first partition.

        Events can neither be stored nor read while an index on the present ones is built.

        Args:
            every: How long a time each partition is for. Partitions begin at multiples of it, in UTC.
            max_age: How long events are kept, as `maintain` will be given it.
            ahead: Partitions to make for times to come.

        Returns:
            False where the events are partitioned already.

        Raises:
            ConfigurationError: Partitions would not pay or are impossible, or there are partitions of another length.
            StoreBusy: The timeout has passed, and nothing has changed.
        """
        _check(every, max_age)

        async def change(connection: AsyncConnection) -> bool:
            if await self._table.is_partitioned(connection):
                found = _length(await self._table.partitions(connection))
                if found != every:
                    raise ConfigurationError(
                        f"the events are partitioned already, every {found}; to undo that first, "
                        f"{self._advice('events unpartition')}"
                    )
                return False
            await self._table.divide(connection, every, ahead=ahead)
            return True

        return await self._change(change)

    async def maintain(self, *, max_age: timedelta | None, ahead: int = AHEAD) -> Maintenance:
        """Drop the partitions whose events are all too old, and make those for times to come.

        The next sweep of each namespace updates the logs of sessions whose events were dropped.

        Args:
            max_age: How long events are kept; `None`: for ever. With several namespaces, the longest of theirs.
            ahead: Partitions to have for times to come.

        Raises:
            ConfigurationError: The events are not partitioned.
            StoreBusy: The timeout has passed before all was done.
        """
        dropped = await self._change(lambda connection: self._drop(connection, max_age))
        created: list[str] = []
        while (name := await self._change(lambda connection: self._add_next(connection, ahead))) is not None:
            created.append(name)
        default_in_use = await self._change(lambda connection: self._table.default_in_use(connection, EPOCH))
        return Maintenance(created=created, dropped=dropped, default_in_use=default_in_use)

    async def unpartition(self) -> bool:
        """Make one table again, with all events in it.

        Events can neither be stored nor read while they are copied.

        Returns:
            False where there were no partitions.

        Raises:
            StoreBusy: The timeout has passed, and nothing has changed.
        """

        async def change(connection: AsyncConnection) -> bool:
            if not await self._table.is_partitioned(connection):
                return False
            await self._table.unite(connection)
            return True

        return await self._change(change)

    async def _change(self, change: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
        """Make a change in a transaction of its own that blocks others only briefly."""
        database = self._database
        database.bind()
        begun = time.monotonic()

        async def attempt(attempt: Attempt) -> _T:
            connection = attempt.connection
            while True:
                try:
                    async with transaction(connection, database.dialect):
                        left = begun + 0.9 * database.timeout - time.monotonic()
                        # Timeouts of the server, because it would go on with a statement that the driver gives up.
                        await set_timeouts(connection, lock=LOCK_TIMEOUT, statement=left)
                        await connection.run_sync(database.dialect.lock_migrations)
                        return await change(connection)
                except DBAPIError as error:
                    state = sqlstate_of(error)
                    if state == TIMED_OUT:
                        raise StoreBusy(
                            f"the database {database.shown_url} took too long, and nothing has changed; give it more "
                            "time with --timeout (timeout=)"
                        ) from error
                    if state not in TRY_AGAIN:
                        raise
                    if time.monotonic() - begun > database.timeout / 2:
                        raise StoreBusy(
                            "the events were in use at each try to lock their table, and nothing has changed; "
                            "try again when there is less load, or for longer with --timeout (timeout=)"
                        ) from error
                await asyncio.sleep(random.uniform(*_PAUSE))  # noqa: S311

        async with database.lease(writes=False) as lease:
            return await lease.run(attempt)

    async def _drop(self, connection: AsyncConnection, max_age: timedelta | None) -> list[str]:
        found, now = await self._present(connection)
        if max_age is None:
            return []
        old = [one for one in found if one.until is not None and one.until <= now - max_age]
        # The last one stays, because the length of new partitions is taken from it.
        last = max((one.until for one in found if one.until is not None), default=None)
        names = [one.name for one in old if one.until != last]
        if names:
            await self._table.drop(connection, names)
        return names

    async def _add_next(self, connection: AsyncConnection, ahead: int) -> str | None:
        """Make the earliest partition that is missing, and return its name; `None` where there are enough."""
        found, now = await self._present(connection)
        every = _length(found)
        current = start_of_range(now, every)
        for number in range(ahead + 1):
            since, until = current + number * every, current + (number + 1) * every
            if any(one.until is not None and one.until > since and (one.since or since) < until for one in found):
                continue
            if number == 0 and await self._table.default_in_use(connection, since):
                # The events of this time are in the default partition.
                continue
            name = self._table.partition_name(since)
            await set_timeouts(connection, lock=LOCK_TIMEOUT, statement=ATTACH_TIMEOUT)
            try:
                await self._table.create(connection, since, until)
            except DBAPIError as error:
                if sqlstate_of(error) != TIMED_OUT:
                    raise
                raise StoreBusy(
                    f"the partition {name} was not made, because the default one holds so many events that looking "
                    "through them would take too long; try again when sweeps have removed them; or, to undo the "
                    f"partitions and begin anew, {self._advice('events unpartition')}"
                ) from error
            return name
        return None

    def _advice(self, command: str) -> str:
        return shown_command(command, url_of(self._database.engine), self._database.schema)

    async def _present(self, connection: AsyncConnection) -> tuple[list[Partition], datetime]:
        if not await self._table.is_partitioned(connection):
            raise ConfigurationError(
                f"the events are not partitioned; to partition them, {self._advice('events partition --every 1h')}"
            )
        now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
        return await self._table.partitions(connection), now


def _check(every: timedelta, max_age: timedelta | None) -> None:
    if every < SHORTEST or every % timedelta(seconds=1):
        raise ConfigurationError(f"--every (every=) {every} must be whole seconds, and a minute or more")
    if max_age is None:
        raise ConfigurationError(
            "without --events-max-age (max_age=) no partition is ever dropped, and partitions do not pay; give one"
        )
    if every > max_age:
        raise ConfigurationError(
            f"partitions for {every} would hold events for much longer than --events-max-age (max_age=) {max_age}; "
            "make them as short as that, or shorter"
        )
    if max_age / every > MAX_PARTITIONS:
        raise ConfigurationError(
            f"--events-max-age (max_age=) {max_age} is {max_age // every} partitions for {every}, and reading or "
            f"removing events looks into each; make them longer, so that there are {MAX_PARTITIONS} at most"
        )


def _length(partitions: Sequence[Partition]) -> timedelta:
    """Return how long a time the latest partition is for."""
    ranges = [(one.since, one.until) for one in partitions if one.since is not None and one.until is not None]
    since, until = max(ranges)
    return until - since
