"""The statements on the events of sessions: storing them in order, and reading them page by page."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.records import EventKind, EventPage, StoredEvent
from mcp_session_store.sql.dialects.functions import ONE, NotLookedUp, StoreClock
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.sql.sessions.statements import live

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.sql.dml import ReturningUpdate

    from mcp_session_store.records import NewEvent
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Statement, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Append", "Events", "Grown", "Read"]

_as_number: Final = attrgetter("int")

PAGE_BYTES: Final = 1024**2
"""Bytes of messages, of all streams, between the first event of a page and the last."""
WINDOW: Final = 4
"""How many events of a session, of any stream, are looked through first for each that a page has room for."""
FOLLOWED_FOR: Final = 120.0
"""Seconds for which a session that is followed is hinted at."""


@dataclass(frozen=True, slots=True)
class Append:
    """Events that are to be stored together."""

    key: UUID
    events: Sequence[NewEvent]
    sizes: Sequence[int]
    """The bytes of each."""
    again: bool = False
    """Whether they may have been stored before."""


@dataclass(frozen=True, slots=True)
class Read:
    """One page that is to be read."""

    key: UUID
    stream: str
    after: int
    limit: int


class Grown(NamedTuple):
    """A log in which events have just been stored."""

    sequence: int
    """Of the newest event."""
    kept: int
    """How many events there are."""
    kept_bytes: int
    total_bytes: int
    """Of all messages that were ever stored."""


class Events:
    """Stores and reads the events of the sessions of one namespace.

    Args:
        dialect: The database they are in.
        schema: Where the tables are; the connection's default unless given.
        namespace: Whose sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        logs, events, sessions = logs_table(schema), events_table(schema), sessions_table(schema)
        name = sa.literal(namespace, sa.Text)
        mine = NotLookedUp(logs.c.namespace) == name
        now = StoreClock()

        def live_session(key: sa.ColumnElement[Any]) -> sa.Select[Any]:
            return sa.select(sessions.c.key).where(sessions.c.key == key, live(sessions, name, now))

        self._started = dialect.batch("started", {"key": sa.Uuid()})
        # Locked, so that a session that ends meanwhile does so before, or waits and takes its log along.
        started = self._started.found(lambda started: live_session(started.key).with_for_update(read=True)).subquery()
        nothing = sa.literal(0)
        values = {
            "key": started.c.key,
            "namespace": name,
            "sequence": nothing,
            "total_bytes": nothing,
            "trimmed": nothing,
            "trimmed_bytes": nothing,
        }
        self._start = dialect.often(dialect.insert_if_absent(logs, list(values), sa.select(*values.values())))

        self._growths = dialect.batch("grown", {"key": sa.Uuid(), "events": sa.BigInteger(), "bytes": sa.BigInteger()})
        may_grow = mine & live_session(logs.c.key).exists()
        growing = self._growths.found(
            lambda grown: sa.select(logs.c.key).where(logs.c.key == grown.key, may_grow).with_for_update(of=logs)
        ).cte("locked")

        def grown(number: sa.ColumnElement[int], size: sa.ColumnElement[int], *which: Any) -> ReturningUpdate[Any]:
            return (
                sa.update(logs)
                .where(*which)
                .values(
                    sequence=logs.c.sequence + number,
                    total_bytes=logs.c.total_bytes + size,
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

        many = grown(growing.c.events, growing.c.bytes, logs.c.key == growing.c.key)
        by = [sa.bindparam(name, type_=sa.BigInteger) for name in ("grown_events", "grown_bytes")]
        one = grown(*by, logs.c.key == sa.bindparam("grown_key", type_=sa.Uuid), may_grow)
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
        self._store: Statement | None = None
        """Where one statement does it all, it is `_grow`."""
        if dialect.changes_in_with:
            # A lone event is the most frequent case; Postgres plans a statement with arrays anew for so few.
            self._grow, self._grow_one = (
                dialect.often(self._all_at_once(events, change.cte("changed"), now)) for change in (many, one)
            )
        else:
            self._grow, self._grow_one = dialect.often(many), dialect.often(one)
            # Row by row, with the values that the log has grown to: there it is the fastest way.
            given = {column.name: sa.bindparam(f"new_{column.name}", type_=column.type) for column in events.c}
            self._store = dialect.often(sa.insert(events).values(given | {"created_at": now}))

        self._sought = dialect.batch("sought", {"key": sa.Uuid(), "stream": sa.Text(), "position": sa.BigInteger()})
        sought = self._sought.c
        # Nothing is changed while it is locked: whoever is about to store an event has stored it then.
        self._await = dialect.often(
            self._sought.found(lambda sought: sa.select(logs.c.key).where(logs.c.key == sought.key).with_for_update())
        )
        # From the newest on: what may have been stored was not long ago.
        there = (
            sa.select(events.c.sequence)
            .where(
                events.c.key == sought.key, events.c.stream == sought.stream, events.c.position == sought.position, mine
            )
            .join(logs, logs.c.key == events.c.key)
            .order_by(events.c.sequence.desc())
            .limit(1)
        )
        self._find = dialect.often(
            sa.select(sought.key, sought.stream, sought.position, there.scalar_subquery().label("sequence"))
        )

        wanted = (
            events.c.key == sa.bindparam("read_key", type_=sa.Uuid),
            events.c.sequence > sa.bindparam("read_after", type_=sa.BigInteger),
            # A range, or the planner of Postgres may read and sort all that follows.
            events.c.sequence <= sa.bindparam("read_up_to", type_=sa.BigInteger),
            events.c.stream == sa.bindparam("read_stream", type_=sa.Text),
        )
        # Where room ends, known before any message is read: those of other streams count, too.
        filled = sa.select(events.c.total_bytes + PAGE_BYTES).where(*wanted).order_by(events.c.sequence).limit(ONE)
        page = (
            sa.select(
                events.c.sequence,
                events.c.position,
                events.c.previous,
                events.c.kind,
                events.c.message,
            )
            .where(*wanted, events.c.total_bytes <= filled.scalar_subquery())
            .order_by(events.c.sequence)
            .limit(sa.bindparam("read_limit", type_=sa.Integer))
            .subquery("page")
        )
        oldest = (
            sa.select(events.c.sequence)
            .where(events.c.key == sa.bindparam("read_key", type_=sa.Uuid))
            .order_by(events.c.sequence)
            .limit(ONE)
        )
        # One statement: what it tells of the log is as old as the events.
        self._read = dialect.often(
            sa.select(
                logs.c.sequence.label("last"),
                sa.func.coalesce(oldest.scalar_subquery(), logs.c.sequence + 1).label("first"),
                (logs.c.total_bytes > filled.scalar_subquery()).label("is_full"),
                *page.c,
            )
            .select_from(logs.outerjoin(page, sa.true()))
            .where(logs.c.key == sa.bindparam("read_key", type_=sa.Uuid), mine)
            .order_by(page.c.sequence)
        )

        self._heads = dialect.batch("head", {"key": sa.Uuid()})
        self._head = sa.select(logs.c.key, logs.c.sequence).where(self._heads.among(logs.c.key), mine)
        soon = sa.or_(logs.c.followed_until.is_(None), logs.c.followed_until < StoreClock(FOLLOWED_FOR / 2))
        following = self._heads.found(
            lambda head: sa.select(logs.c.key).where(logs.c.key == head.key, mine, soon).with_for_update()
        ).cte("locked")
        self._follow = (
            sa.update(logs).where(logs.c.key == following.c.key).values(followed_until=StoreClock(FOLLOWED_FOR))
        )

    def _all_at_once(self, events: sa.Table, changed: sa.CTE, now: StoreClock) -> sa.Select[Any]:
        """A statement that lets logs grow, stores what they grow by, and tells of it."""
        returned = (changed.c[name] for name in ("key", "sequence", "kept", "kept_bytes", "total_bytes"))
        return sa.select(*returned, *self._told(changed)).add_cte(self._stored(events, changed, now).cte("stored"))

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
        steps = self._append(appends, repeated=attempt.repeated)
        return await self._dialect.run(attempt.connection, steps, writes=True)

    def _append(
        self, appends: Sequence[Append], *, repeated: bool
    ) -> Steps[tuple[list[int | None], dict[UUID, Grown]]]:
        first: list[int | None] = [None] * len(appends)
        if sought := [number for number, append in enumerate(appends) if repeated or append.again]:
            yield from self._find_among(appends, sought, first)
        wanted: dict[UUID, list[int]] = {}
        for number, append in enumerate(appends):
            if first[number] is None:
                wanted.setdefault(append.key, []).append(number)
        # In the order of keys: so logs are locked by all who store events.
        logs = {
            self._dialect.driver_key(key): [appends[number] for number in wanted[key]]
            for key in sorted(wanted, key=_as_number)
        }
        grown = (yield from self._append_to_logs(logs)) if logs else {}
        if missing := logs.keys() - grown.keys():
            # Their first events: they have no log yet.
            new = {key: appends for key, appends in logs.items() if key in missing}
            yield self._start, self._started.parameters([(key,) for key in new])
            grown |= yield from self._append_to_logs(new)
        by_key = {}
        for key, numbers in wanted.items():
            if (log := grown.get(self._dialect.driver_key(key))) is not None:
                by_key[key] = log
                sequence = log.sequence + 1
                for number in reversed(numbers):
                    sequence -= len(appends[number].events)
                    first[number] = sequence
        return first, by_key

    def _append_to_logs(self, wanted: Mapping[object, Sequence[Append]]) -> Steps[dict[object, Grown]]:
        growths: list[tuple[object, int, int]] = []
        added: list[tuple[object, int, int, str, int, int, str, str | None]] = []
        for key, appends in wanted.items():
            behind = sum([len(append.events) for append in appends])
            bytes_behind = sum([sum(append.sizes) for append in appends])
            growths.append((key, behind, bytes_behind))
            for append in appends:
                for event, size in zip(append.events, append.sizes, strict=True):
                    behind -= 1
                    bytes_behind -= size
                    kind = event.kind.value
                    place = event.stream, event.position, event.previous
                    added.append((key, behind, bytes_behind, *place, kind, event.message))
        grow, parameters = self._grow, self._growths.parameters(growths)
        if len(growths) == 1:
            key, behind, bytes_behind = growths[0]
            grow = self._grow_one
            parameters = {"grown_key": key, "grown_events": behind, "grown_bytes": bytes_behind}
        if self._store is None:
            parameters |= self._added.parameters(added)
        rows = yield grow, parameters
        grown = {row[0]: Grown(*row[1:5]) for row in rows}
        if self._store is not None and grown:
            yield self._store, [self._new_event(log, *event) for event in added if (log := grown.get(event[0]))]
        return grown

    @staticmethod
    def _new_event(
        log: Grown,
        key: object,
        behind: int,
        bytes_behind: int,
        stream: str,
        position: int,
        previous: int,
        kind: str,
        message: str | None,
    ) -> dict[str, object]:
        return {
            "new_key": key,
            "new_sequence": log.sequence - behind,
            "new_stream": stream,
            "new_position": position,
            "new_previous": previous,
            "new_kind": kind,
            "new_message": message,
            "new_total_bytes": log.total_bytes - bytes_behind,
        }

    def _find_among(self, appends: Sequence[Append], numbers: Sequence[int], first: list[int | None]) -> Steps[None]:
        """Note the sequences of those that were stored before, by somebody who did not learn of it."""
        sought = {}
        for number in numbers:
            event = appends[number].events[0]
            sought[number] = self._dialect.driver_key(appends[number].key), event.stream, event.position
        # A try before this one, whose connection was lost, may still be under way on the server.
        in_order = sorted(numbers, key=lambda number: appends[number].key.int)
        yield self._await, self._sought.parameters([sought[number] for number in in_order])
        rows = yield self._find, self._sought.parameters(list(sought.values()))
        there = {(key, stream, position): sequence for key, stream, position, sequence in rows}
        for number in numbers:
            first[number] = there.get(sought[number])

    async def page(self, attempt: Attempt, read: Read) -> EventPage | None:
        """Some events of one stream; `None` where the session has no log."""
        return await self._dialect.run(attempt.connection, self._page(read), writes=False)

    def _page(self, read: Read) -> Steps[EventPage | None]:
        events: list[StoredEvent] = []
        first = 0
        after, window = read.after, WINDOW * read.limit
        while True:
            wanted = read.limit - len(events)
            rows = yield (
                self._read,
                {
                    "read_key": self._dialect.driver_key(read.key),
                    "read_stream": read.stream,
                    "read_after": after,
                    "read_up_to": after + window,
                    "read_limit": wanted + 1,
                },
            )
            if not rows:
                return None
            last, oldest, is_full = rows[0][:3]
            if events and oldest > after + 1:
                # Removed between the two reads. The next page shows it.
                return EventPage(events=events, more=True, first=first, last=last)
            first = oldest
            found = [_stored_event(*row[3:]) for row in rows if row[3] is not None]
            events += found[:wanted]
            more = is_full or len(found) > wanted
            over = after + window >= last
            if more or over or len(events) == read.limit:
                return EventPage(events=events, more=more or not over, first=first, last=last)
            # The stream is one of many: the next of its events may be far.
            after, window = after + window, 4 * window

    async def heads(self, attempt: Attempt, keys: Collection[UUID]) -> dict[UUID, int]:
        """The sequence of the newest event of each session that has a log."""
        parameters = self._heads.parameters([(key,) for key in keys])
        return {row.key: row.sequence for row in await attempt.connection.execute(self._head, parameters)}

    async def follow(self, attempt: Attempt, keys: Collection[UUID]) -> None:
        """Have the next events of these sessions hinted at."""
        await attempt.connection.execute(self._follow, self._heads.parameters([(key,) for key in sorted(keys)]))


def _stored_event(sequence: int, position: int, previous: int, kind: str, message: str | None) -> StoredEvent:
    return StoredEvent(sequence=sequence, position=position, previous=previous, kind=EventKind(kind), message=message)
