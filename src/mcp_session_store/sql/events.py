"""The statements on the events of sessions: storing them in order, and reading them page by page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.records import EventKind, EventPage, StoredEvent, message_bytes
from mcp_session_store.sql.dialects import ByteLength, NotLookedUp, StoreClock
from mcp_session_store.sql.statements import live
from mcp_session_store.sql.tables import events_table, logs_table, sessions_table
from mcp_session_store.sql.transactions import transaction

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from uuid import UUID

    from mcp_session_store.records import NewEvent
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects import Dialect

__all__ = ["Append", "Events", "Grown", "Read"]

PAGE_BYTES: Final = 1024**2
"""Bytes of messages in a page of events, give or take the last one."""
FOLLOWED_FOR: Final = 120.0
"""Seconds for which a session that is followed is hinted at."""


@dataclass(frozen=True, slots=True)
class Append:
    """Events that are to be stored together."""

    key: UUID
    events: Sequence[NewEvent]
    again: bool = False
    """Whether they may have been stored before."""


@dataclass(frozen=True, slots=True)
class Read:
    """One page that is to be read."""

    key: UUID
    stream: str
    after: int
    limit: int


@dataclass(frozen=True, slots=True)
class Grown:
    """A log in which events have just been stored."""

    sequence: int
    """Of the newest event."""
    kept: int
    """How many events there are."""
    kept_bytes: int


class Events:
    """Stores and reads the events of the sessions of one namespace.

    Args:
        dialect: The database they are in.
        schema: Where the tables are; the connection's default unless given.
        namespace: Whose sessions.
        standalone: Whether any session may have events, because there are no records of sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, standalone: bool) -> None:
        self._dialect = dialect
        logs, events, sessions = logs_table(schema), events_table(schema), sessions_table(schema)
        name = sa.literal(namespace, sa.Text)
        mine = NotLookedUp(logs.c.namespace) == name
        now = StoreClock()

        self._started = dialect.batch("started", {"key": sa.Uuid(), "start": sa.BigInteger()})
        started: sa.Select[Any] = sa.select(
            self._started.c.key, name, self._started.c.start, sa.literal(0), self._started.c.start, sa.literal(0)
        )
        if not standalone:
            # Locked, so that a session that ends meanwhile does so before, or waits and takes its log along.
            started = (
                started.join(sessions, sessions.c.key == self._started.c.key)
                .where(self._started.among(sessions.c.key), live(sessions, name, now))
                .order_by(sessions.c.key)
                .with_for_update(of=sessions, read=True)
            )
        columns = ["key", "namespace", "sequence", "total_bytes", "trimmed", "trimmed_bytes"]
        self._start = dialect.insert_if_absent(logs, columns, started)
        self._standalone = standalone

        self._growths = dialect.batch("grown", {"key": sa.Uuid(), "events": sa.BigInteger(), "bytes": sa.BigInteger()})
        growing = (
            sa.select(*self._growths.c)
            .join(logs, logs.c.key == self._growths.c.key)
            .where(self._growths.among(logs.c.key), mine)
            .order_by(logs.c.key)
            .with_for_update(of=logs)
            .cte("locked")
        )
        grown = (
            sa.update(logs)
            .where(logs.c.key == growing.c.key, self._growths.among(logs.c.key))
            .values(
                sequence=logs.c.sequence + growing.c.events,
                total_bytes=logs.c.total_bytes + growing.c.bytes,
                oldest_at=sa.func.coalesce(logs.c.oldest_at, now, type_=logs.c.oldest_at.type),
            )
            .returning(
                logs.c.key,
                logs.c.sequence,
                (logs.c.sequence - logs.c.trimmed).label("kept"),
                (logs.c.total_bytes - logs.c.trimmed_bytes).label("kept_bytes"),
                logs.c.total_bytes,
                logs.c.followed_until,
            )
        )
        # Each says how far it lies behind what its log has grown to.
        self._added = dialect.batch(
            "added",
            {
                "key": sa.Uuid(),
                "behind": sa.BigInteger(),
                "bytes_behind": sa.BigInteger(),
                "stream": sa.Text(),
                "position": sa.BigInteger(),
                "previous": sa.BigInteger(),
                "kind": sa.Text(),
                "message": sa.Text(),
            },
        )
        self._store: sa.Insert | None = None
        """Where one statement does it all, it is `_grow`."""
        if dialect.changes_in_with:
            changed = grown.cte("changed")
            stored = self._stored(events, changed, now).cte("stored")
            self._grow = dialect.often(
                sa.select(
                    changed.c.key,
                    changed.c.sequence,
                    changed.c.kept,
                    changed.c.kept_bytes,
                    changed.c.total_bytes,
                    *self._told(changed),
                ).add_cte(stored)
            )
        else:
            self._grow = dialect.often(grown)
            # Row by row, with the values that the log has grown to: there it is the fastest way.
            self._store = sa.insert(events).values(created_at=now)

        self._find = sa.select(events.c.key, events.c.stream, events.c.position, events.c.sequence).join(
            self._added.rows,
            sa.and_(
                events.c.key == self._added.c.key,
                self._added.among(events.c.key),
                events.c.stream == self._added.c.stream,
                events.c.position == self._added.c.position,
            ),
        )

        key = sa.bindparam("read_key", type_=sa.Uuid)
        size = sa.func.coalesce(ByteLength(events.c.message), 0)
        found = (
            sa.select(
                events.c.sequence,
                events.c.position,
                events.c.previous,
                events.c.kind,
                events.c.message,
                size.label("size"),
            )
            .where(
                events.c.key == key,
                events.c.sequence > sa.bindparam("read_after", type_=sa.BigInteger),
                events.c.stream == sa.bindparam("read_stream", type_=sa.Text),
            )
            .order_by(events.c.sequence)
            .limit(sa.bindparam("read_limit", type_=sa.Integer, literal_execute=True))
            .subquery("found")
        )
        page = sa.select(
            *found.c,
            (sa.func.sum(found.c.size).over(order_by=found.c.sequence) - found.c.size).label("before"),
            sa.func.count().over().label("found"),
        ).subquery("page")
        oldest = sa.select(events.c.sequence).where(events.c.key == key).order_by(events.c.sequence).limit(1)
        # One statement: what it tells of the log is as old as the events.
        self._read = (
            sa.select(
                logs.c.sequence.label("last"),
                sa.func.coalesce(oldest.scalar_subquery(), logs.c.sequence + 1).label("first"),
                page.c.sequence,
                page.c.position,
                page.c.previous,
                page.c.kind,
                page.c.message,
                page.c.found,
            )
            .select_from(logs.outerjoin(page, page.c.before < PAGE_BYTES))
            .where(logs.c.key == key, mine)
            .order_by(page.c.sequence)
        )

        self._heads = dialect.batch("head", {"key": sa.Uuid()})
        self._head = sa.select(logs.c.key, logs.c.sequence).where(self._heads.among(logs.c.key), mine)
        self._follow = (
            sa.update(logs)
            .where(
                self._heads.among(logs.c.key),
                mine,
                sa.or_(logs.c.followed_until.is_(None), logs.c.followed_until < StoreClock(FOLLOWED_FOR / 2)),
            )
            .values(followed_until=StoreClock(FOLLOWED_FOR))
        )

    def _stored(self, events: sa.Table, grown: sa.FromClause, now: StoreClock) -> sa.Insert:
        added = self._added.c
        values = {
            "key": added.key,
            "sequence": grown.c.sequence - added.behind,
            "stream": added.stream,
            "position": added.position,
            "previous": added.previous,
            "kind": added.kind,
            "message": added.message,
            "total_bytes": grown.c.total_bytes - added.bytes_behind,
            "created_at": now,
        }
        rows = sa.select(*values.values()).join_from(self._added.rows, grown, grown.c.key == added.key)
        return sa.insert(events).from_select(list(values), rows)

    def _told(self, grown: sa.CTE) -> list[sa.ColumnElement[Any]]:
        """Tell of those that somebody follows: as a column, because what nobody reads does not run."""
        channel = self._dialect.event_channel
        if channel is None:
            return []
        followed = channel.notification(grown.c.key).where(grown.c.followed_until > StoreClock())
        return [sa.cast(followed.scalar_subquery(), sa.Text).label("told")]

    async def append(self, attempt: Attempt, appends: Sequence[Append]) -> tuple[list[int | None], dict[UUID, Grown]]:
        """Store events of any number of sessions.

        Returns:
            The sequence of the first event of each append, `None` where the session is not live; and the logs.
        """
        repeated = [append for append in appends if append.again or attempt.repeated]
        there = await self._found(attempt, repeated) if repeated else {}
        first = [there.get((append.key, append.events[0].stream, append.events[0].position)) for append in appends]
        wanted: dict[UUID, list[NewEvent]] = {}
        offsets: dict[int, int] = {}
        for position, append in enumerate(appends):
            if first[position] is None:
                events = wanted.setdefault(append.key, [])
                offsets[position] = len(events)
                events.extend(append.events)
        if not wanted:
            return first, {}
        if self._store is None:
            grown = await self._append_each(attempt, wanted)
        else:
            async with transaction(attempt.connection, self._dialect):
                grown = await self._append_each(attempt, wanted)
        for position, offset in offsets.items():
            key = appends[position].key
            if (log := grown.get(key)) is not None:
                first[position] = log.sequence - len(wanted[key]) + offset + 1
        return first, grown

    async def _append_each(self, attempt: Attempt, wanted: Mapping[UUID, Sequence[NewEvent]]) -> dict[UUID, Grown]:
        grown = await self._append_to_logs(attempt, wanted)
        if missing := wanted.keys() - grown.keys():
            # Their first events: they have no log yet.
            start = time.time_ns() // 1_000_000 if self._standalone else 0
            rows = [(key, start) for key in sorted(missing)]
            await attempt.connection.execute(self._start, self._started.parameters(rows))
            grown |= await self._append_to_logs(attempt, {key: wanted[key] for key in missing})
        return grown

    async def _append_to_logs(self, attempt: Attempt, wanted: Mapping[UUID, Sequence[NewEvent]]) -> dict[UUID, Grown]:
        growths: list[tuple[UUID, int, int]] = []
        added: list[tuple[UUID, int, int, NewEvent]] = []
        for key in sorted(wanted):
            events = wanted[key]
            sizes = [message_bytes(event) for event in events]
            behind, bytes_behind = len(events), sum(sizes)
            growths.append((key, behind, bytes_behind))
            for event, size in zip(events, sizes, strict=True):
                behind -= 1
                bytes_behind -= size
                added.append((key, behind, bytes_behind, event))
        parameters = self._growths.parameters(growths)
        if self._store is None:
            rows = [
                (
                    key,
                    behind,
                    bytes_behind,
                    event.stream,
                    event.position,
                    event.previous,
                    event.kind.value,
                    event.message,
                )
                for key, behind, bytes_behind, event in added
            ]
            parameters |= self._added.parameters(rows)
        grown: dict[UUID, Grown] = {}
        totals: dict[UUID, int] = {}
        for key, sequence, kept, kept_bytes, total_bytes, *_ in await self._grow.all(attempt.connection, parameters):
            grown[key] = Grown(sequence, kept, kept_bytes)
            totals[key] = total_bytes
        if self._store is not None and grown:
            values = [
                {
                    "key": key,
                    "sequence": grown[key].sequence - behind,
                    "stream": event.stream,
                    "position": event.position,
                    "previous": event.previous,
                    "kind": event.kind.value,
                    "message": event.message,
                    "total_bytes": totals[key] - bytes_behind,
                }
                for key, behind, bytes_behind, event in added
                if key in grown
            ]
            await attempt.connection.execute(self._store, values)
        return grown

    async def _found(self, attempt: Attempt, appends: Sequence[Append]) -> dict[tuple[UUID, str, int], int]:
        """What was stored before, by somebody who did not learn of it: the sequences of first events."""
        rows = [
            (append.key, 0, 0, append.events[0].stream, append.events[0].position, -1, "", None) for append in appends
        ]
        result = await attempt.connection.execute(self._find, self._added.parameters(rows))
        return {(row.key, row.stream, row.position): row.sequence for row in result}

    async def page(self, attempt: Attempt, read: Read) -> EventPage | None:
        """Some events of one stream; `None` where the session has no log."""
        rows = (
            await attempt.connection.execute(
                self._read,
                {
                    "read_key": read.key,
                    "read_stream": read.stream,
                    "read_after": read.after,
                    "read_limit": read.limit + 1,
                },
            )
        ).all()
        if not rows:
            return None
        events = [
            StoredEvent(
                sequence=row.sequence,
                position=row.position,
                previous=row.previous,
                kind=EventKind(row.kind),
                message=row.message,
            )
            for row in rows[: read.limit]
            if row.sequence is not None
        ]
        more = bool(events) and rows[0].found > len(events)
        return EventPage(events=events, more=more, first=rows[0].first, last=rows[0].last)

    async def heads(self, attempt: Attempt, keys: Collection[UUID]) -> dict[UUID, int]:
        """The sequence of the newest event of each session that has a log."""
        parameters = self._heads.parameters([(key,) for key in keys])
        return {row.key: row.sequence for row in await attempt.connection.execute(self._head, parameters)}

    async def follow(self, attempt: Attempt, keys: Collection[UUID]) -> None:
        """Have the next events of these sessions hinted at."""
        await attempt.connection.execute(self._follow, self._heads.parameters([(key,) for key in sorted(keys)]))
