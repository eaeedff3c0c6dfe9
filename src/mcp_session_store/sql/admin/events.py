"""The events of a namespace for operators: the logs of sessions, the events of one, statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.admin.reader import NO_CURSOR, Reader, decode_cursor, encode_cursor
from mcp_session_store.sql.admin.session_list import LATEST, readable
from mcp_session_store.sql.dialects.functions import MOMENT, ByteLength, driver_value
from mcp_session_store.sql.dialects.partitions import Partition, PartitionedTable
from mcp_session_store.sql.events.trim import remaining_columns
from mcp_session_store.sql.schema.tables import events_table, instances_table, logs_table
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.retention import EventPolicy

__all__ = ["EventDirectory", "EventStatistics", "LogDetails", "LogPage", "LoggedEvent", "StoredInstance", "StoredLog"]

_LOGS: Final = "logs"
"""Name of the list in its cursors."""
_SMALL: Final = 64 * 1024
"""Bytes of a message up to which it is read without being asked for, to show what it is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLog:
    """Log of one session. Times are by the database's clock."""

    key: UUID
    namespace: str
    events: int
    """Number of events kept."""
    bytes: int
    """Bytes of the messages kept."""
    first: int
    """Sequence of the oldest event kept; without any, of the next event."""
    last: int
    """Sequence of the newest event."""
    oldest_at: datetime | None
    """When the oldest event kept was stored; `None` without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPage:
    """A page of the list of logs."""

    logs: Sequence[StoredLog]
    as_of: datetime
    """Time of the read, by the database's clock."""
    next: str | None
    """Cursor of the next page; `None` on the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedEvent:
    """One event of a session."""

    sequence: int
    stream: str
    position: int
    kind: str
    """An `EventKind`, or a kind that only a newer version of this package knows."""
    created_at: datetime
    """When the event was stored."""
    bytes: int
    """Bytes of its message."""
    message: str | None = field(repr=False)
    """JSON-RPC message, as JSON text. `None` without one, and for a large one unless messages were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogDetails:
    """Log of a session, and a page of its events."""

    log: StoredLog
    events: Sequence[LoggedEvent]
    as_of: datetime
    """Time of the read, by the database's clock."""
    next: int | None
    """Sequence after which the next page begins; `None` on the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredInstance:
    """An instance that sends heartbeats."""

    instance: str
    started_at: datetime
    beat_at: datetime
    """When it last sent a heartbeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventStatistics:
    """Counts and sizes of the stored events."""

    as_of: datetime
    """Time of the read, by the database's clock."""
    sessions: int
    """Number of sessions with events."""
    events: int
    bytes: int
    """Bytes of their messages."""
    oldest_at: datetime | None
    """When the oldest event was stored; `None` without any."""
    table_bytes: int
    """Size of the tables, with the events of all namespaces; on SQLite, of the file."""
    index_bytes: int | None
    """Size of their indexes beside that; `None` on SQLite, where they are in the file."""
    instances: Sequence[StoredInstance]
    """Instances of all namespaces with the latest heartbeats."""
    partitions: Sequence[Partition]
    """Partitions of the table of events; empty without any."""


class EventDirectory(Reader):
    """Events of a namespace, for operators. See `Reader`."""

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        timeout: float = OPERATOR_TIMEOUT,
    ) -> None:
        super().__init__(url_or_engine, namespace=namespace, schema=schema, timeout=timeout)
        self._logs = logs_table(self.database.schema)
        self._events = events_table(self.database.schema)
        self._instances = instances_table(self.database.schema)

    async def page(self, *, limit: int = 50, after: str | None = None) -> LogPage:
        """Return a page of the list of logs that have events: those with the oldest events first.

        One range scan along an index, and a look at the oldest event of each log. A log whose oldest events are
        removed meanwhile may appear again on a later page; none is left out.

        Args:
            limit: Logs on the page at most.
            after: `next` of the page before.

        Raises:
            ConfigurationError: The cursor does not belong to this list.
        """
        position = None
        if after is not None:
            name, position = decode_cursor(after) or ("", ())
            if name != _LOGS or len(position) != 2:
                raise ConfigurationError(f"{after!r} is not a cursor of a list of logs; {NO_CURSOR}")

        async def read(connection: AsyncConnection, now: datetime) -> LogPage:
            rows = (await connection.execute(self.page_statement(limit=limit + 1, after=position))).all()
            cursor = None
            if len(rows) > limit:
                last = rows[limit - 1]
                at = last.noted_at or LATEST, self.database.dialect.key(last.key) or UUID(int=0)
                cursor = encode_cursor(_LOGS, at)
            stored = (self._stored(row) for row in rows[:limit])
            return LogPage(logs=[log for log in stored if log], as_of=now, next=cursor)

        return await self.read(read)

    def page_statement(self, *, limit: int, after: Sequence[Any] | None) -> sa.Select[Any]:
        """Build the statement behind a page: at most `limit` logs, those after a position in the list."""
        c = self._logs.c
        conditions = [c.namespace == self._namespace]
        if after is None:
            conditions.append(c.oldest_at.is_not(None))
        else:
            bounds = [sa.literal(value, column.type) for value, column in zip(after, (c.oldest_at, c.key), strict=True)]
            conditions.append(sa.tuple_(c.oldest_at, c.key) > sa.tuple_(*bounds))
        return self._select().where(*conditions).order_by(c.oldest_at, c.key).limit(limit)

    async def find(
        self,
        key: UUID,
        *,
        stream: str | None = None,
        limit: int = 50,
        after: int = 0,
        messages: bool = False,
    ) -> LogDetails | None:
        """Return the log of one session with a page of its events, in their order; `None` where it has no log.

        Args:
            key: The session.
            stream: One stream of it; all unless given.
            limit: Events on the page at most.
            after: `next` of the page before.
            messages: Whether to read large messages, too.
        """
        c, size = self._events.c, sa.func.coalesce(ByteLength(self._events.c.message), 0)
        message: sa.ColumnElement[Any] = c.message if messages else sa.case((size <= _SMALL, c.message))
        statement = (
            sa.select(
                c.sequence, c.stream, c.position, c.kind, c.created_at, size.label("bytes"), message.label("message")
            )
            .where(c.key == key, c.sequence > after)
            .order_by(c.sequence)
            .limit(limit + 1)
        )
        if stream is not None:
            statement = statement.where(c.stream == stream)

        async def read(connection: AsyncConnection, now: datetime) -> LogDetails | None:
            of_key = self._select().where(self._logs.c.key == key, self._logs.c.namespace == self._namespace)
            log = (await connection.execute(of_key)).one_or_none()
            if log is None or (stored := self._stored(log)) is None:
                return None
            events = [_logged(row) for row in (await connection.execute(statement)).mappings()]
            more = len(events) > limit
            return LogDetails(
                log=stored,
                events=events[:limit],
                as_of=now,
                next=events[limit - 1].sequence if more else None,
            )

        return await self.read(read)

    async def statistics(self, *, top: int = 10) -> EventStatistics:
        """Return counts and sizes. Reads the logs of the sessions, and no events.

        Events that were dropped with a partition are therefore counted until the next sweep.

        Args:
            top: Instances returned at most.
        """
        c = self._logs.c
        counted = sa.select(
            sa.func.count(c.oldest_at).label("sessions"),
            sa.cast(sa.func.coalesce(sa.func.sum(c.sequence - c.trimmed), 0), sa.BigInteger).label("events"),
            sa.cast(sa.func.coalesce(sa.func.sum(c.total_bytes - c.trimmed_bytes), 0), sa.BigInteger).label("bytes"),
            sa.func.min(c.oldest_at, type_=MOMENT).label("oldest_at"),
        ).where(c.namespace == self._namespace)
        of_instances = self._instances.c
        latest = (
            sa.select(of_instances.instance, of_instances.started_at, of_instances.beat_at)
            .order_by(of_instances.beat_at.desc(), of_instances.name)
            .limit(top)
        )
        dialect = self.database.dialect
        partitioned = PartitionedTable(self._events, by=self._events.c.created_at)

        async def read(connection: AsyncConnection, now: datetime) -> EventStatistics:
            counts = (await connection.execute(counted)).mappings().one()
            instances = (await connection.execute(latest)).mappings()
            stored = await connection.execute(dialect.stored_bytes([self._events, self._logs]))
            table_bytes, index_bytes = stored.one()
            return EventStatistics(
                as_of=now,
                **counts,
                table_bytes=table_bytes,
                index_bytes=index_bytes,
                instances=[StoredInstance(**row) for row in instances],
                partitions=await partitioned.partitions(connection) if dialect.has_partitions else [],
            )

        return await self.read(read)

    async def preview(self, policy: EventPolicy) -> int:
        """Return how many events a sweep by a policy would remove now.

        Reads all events of the sessions whose oldest event is too old.
        """
        if policy.max_age is None:
            return 0
        logs, events = self._logs.c, self._events.c
        too_old = self.database.dialect.sweep_cutoff(self._events, policy.max_age)
        due = sa.select(logs.key).where(logs.namespace == self._namespace, logs.oldest_at <= too_old)
        statement = sa.select(sa.func.count()).where(events.key.in_(due), events.created_at <= too_old)

        async def read(connection: AsyncConnection, now: datetime) -> int:  # noqa: ARG001
            return (await connection.execute(statement)).scalar_one()

        return await self.read(read)

    def _select(self) -> sa.Select[Any]:
        c = self._logs.c
        left = [value.label(f"left_{name}") for name, value in remaining_columns(self._logs, self._events).items()]
        return sa.select(driver_value(c.key), c.sequence, c.total_bytes, c.oldest_at.label("noted_at"), *left)

    def _stored(self, row: Any) -> StoredLog | None:
        """Return the log in a row; `None` for one that cannot be read."""
        counts = row.sequence, row.total_bytes, row.left_trimmed, row.left_trimmed_bytes
        key = self.database.dialect.key(row.key)
        if key is None or not all(isinstance(count, int) for count in counts):
            return None
        return StoredLog(
            key=key,
            namespace=self._namespace,
            events=row.sequence - row.left_trimmed,
            bytes=row.total_bytes - row.left_trimmed_bytes,
            first=row.left_trimmed + 1,
            last=row.sequence,
            oldest_at=row.left_oldest_at,
        )


def _logged(row: Any) -> LoggedEvent:
    """Return the event in a row; a text that cannot be read is left out."""
    message = None if row["message"] is None else readable(row["message"]) or None
    return LoggedEvent(**{**row, "message": message, "stream": readable(row["stream"]), "kind": readable(row["kind"])})
