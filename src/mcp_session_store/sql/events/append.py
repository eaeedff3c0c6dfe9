"""Storing the events of sessions: each log grows under its lock, so that commit order is sequence order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.events.tail import notification
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.sql.sessions.statements import live

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.sql.dml import ReturningUpdate

    from mcp_session_store.records import NewEvent
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Append", "EventWriter", "LogState"]


class Append(NamedTuple):
    """Events of one session that are stored together."""

    key: UUID
    events: Sequence[NewEvent]
    sizes: Sequence[int]
    """Bytes of each event's message."""
    size: int
    """Bytes of all messages."""
    again: bool = False
    """Whether a call before this one may have stored them."""


class LogState(NamedTuple):
    """State of a log after events were stored in it."""

    sequence: int
    """Sequence of the newest event."""
    kept: int
    """Number of events that are kept."""
    kept_bytes: int
    """Bytes of their messages."""


class EventWriter:
    """Stores the events of the sessions of one namespace.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        self._logs, self._events, self._sessions = logs_table(schema), events_table(schema), sessions_table(schema)
        self._namespace = sa.literal(namespace, sa.Text)

        self._started = dialect.batch("started", {"key": sa.Uuid()})
        self._start = dialect.precompiled(self._start_statement())
        if dialect.changes_in_with:
            self._growths = dialect.batch(
                "grown", {"key": sa.Uuid(), "events": sa.BigInteger(), "bytes": sa.BigInteger()}
            )
            # Each event says how far it lies behind the state that its log has grown to.
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
            # Another statement for one log, the most frequent case, because it takes the planner of Postgres less time.
            self._grow, self._grow_one = (
                dialect.precompiled(self._with_events(growth.cte("changed")))
                for growth in (self._growth_of_many(), self._growth_of_one())
            )
            self._append_to_logs = self._append_at_once
        else:
            self._growing = dialect.batch("growing", {"key": sa.Uuid()})
            self._look, self._grow_row, self._begin_row, self._store_row = map(
                dialect.precompiled, (self._look_statement(), *self._row_statements())
            )
            self._append_to_logs = self._append_row_by_row

        self._sought = dialect.batch("sought", {"key": sa.Uuid(), "stream": sa.Text(), "position": sa.BigInteger()})
        self._await = dialect.precompiled(self._await_statement())
        self._find = dialect.precompiled(self._find_statement())

    def _live_session(self, key: sa.ColumnElement[Any]) -> sa.Select[Any]:
        sessions = self._sessions
        return sa.select(sessions.c.key).where(sessions.c.key == key, live(sessions, self._namespace, StoreClock()))

    def _of_namespace(self) -> sa.ColumnElement[bool]:
        return Unindexed(self._logs.c.namespace) == self._namespace

    def _may_grow(self) -> sa.ColumnElement[bool]:
        return self._of_namespace() & self._live_session(self._logs.c.key).exists()

    def _start_statement(self) -> sa.Insert:
        """Build the statement that makes the logs of live sessions that have none."""
        # Locked, so that a session that ends meanwhile either ends before, or waits and removes the log with it.
        started = self._started.matching(
            lambda started: self._live_session(started.key).with_for_update(read=True)
        ).subquery()
        nothing = sa.literal(0)
        values = {
            "key": started.c.key,
            "namespace": self._namespace,
            "sequence": nothing,
            "total_bytes": nothing,
            "trimmed": nothing,
            "trimmed_bytes": nothing,
        }
        return self._dialect.insert_if_absent(self._logs, list(values), sa.select(*values.values()))

    def _growth_of_many(self) -> ReturningUpdate[Any]:
        logs = self._logs
        growing = self._growths.matching(
            lambda grown: (
                sa.select(logs.c.key).where(logs.c.key == grown.key, self._may_grow()).with_for_update(of=logs)
            )
        ).cte("locked")
        return self._growth(growing.c.events, growing.c.bytes, logs.c.key == growing.c.key)

    def _growth_of_one(self) -> ReturningUpdate[Any]:
        events, size = (sa.bindparam(name, type_=sa.BigInteger) for name in ("grown_events", "grown_bytes"))
        is_it = self._logs.c.key == sa.bindparam("grown_key", type_=sa.Uuid)
        return self._growth(events, size, is_it, self._may_grow())

    def _growth(
        self, number: sa.ColumnElement[int], size: sa.ColumnElement[int], *which: sa.ColumnElement[bool]
    ) -> ReturningUpdate[Any]:
        """Build the statement that makes room for events in logs, and returns the key and state of each."""
        logs = self._logs
        return (
            sa.update(logs)
            .where(*which)
            .values(
                sequence=logs.c.sequence + number,
                total_bytes=logs.c.total_bytes + size,
                oldest_at=sa.func.coalesce(logs.c.oldest_at, StoreClock(), type_=logs.c.oldest_at.type),
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

    def _with_events(self, grown: sa.CTE) -> sa.Select[Any]:
        """Build the statement that lets logs grow, stores the events that they grow by, and notifies of them."""
        state = (grown.c[name] for name in ("key", "sequence", "kept", "kept_bytes"))
        return sa.select(*state, *notification(self._dialect, grown)).add_cte(self._insertion(grown).cte("stored"))

    def _insertion(self, grown: sa.CTE) -> sa.Insert:
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
            "created_at": StoreClock(),
        }
        rows = sa.select(*values.values()).join_from(self._added.rows, grown, grown.c.key == added.key)
        return sa.insert(self._events).from_select(list(values), rows)

    def _look_statement(self) -> sa.Select[Any]:
        """Build the statement that returns the key and state of the logs of live sessions."""
        logs, growing = self._logs, self._growing
        return (
            sa.select(
                logs.c.key,
                logs.c.sequence,
                (logs.c.sequence - logs.c.trimmed).label("kept"),
                (logs.c.total_bytes - logs.c.trimmed_bytes).label("kept_bytes"),
                logs.c.total_bytes,
                logs.c.oldest_at.is_(None).label("is_empty"),
            )
            .join_from(growing.rows, logs, growing.joined_on(logs.c.key))
            .where(self._may_grow())
        )

    def _row_statements(self) -> tuple[sa.Update, sa.Update, sa.Insert]:
        """Build the statements that let a log grow, note when its oldest event was stored, and store an event.

        Their parameters are in the order of the tables' columns, the key of a log last.
        """
        logs, events = self._logs, self._events

        def given(*columns: sa.Column[Any]) -> dict[str, sa.BindParameter[Any]]:
            return {column.name: sa.bindparam(f"new_{column.name}", type_=column.type) for column in columns}

        grow = sa.update(logs).where(logs.c.key == sa.bindparam("grown_key", type_=sa.Uuid))
        new = given(*(column for column in events.c if column is not events.c.created_at))
        return (
            grow.values(given(logs.c.sequence, logs.c.total_bytes)),
            grow.values(oldest_at=StoreClock()),
            sa.insert(events).values(new | {"created_at": StoreClock()}),
        )

    def _await_statement(self) -> sa.Select[Any]:
        """Build the statement that waits for the transactions which store events in these logs.

        It changes nothing while it holds the locks: once it has them, those events are stored.
        """
        logs = self._logs
        return self._sought.matching(
            lambda sought: sa.select(logs.c.key).where(logs.c.key == sought.key).with_for_update()
        )

    def _find_statement(self) -> sa.Select[Any]:
        """Build the statement that looks for events by stream and position."""
        logs, events, sought = self._logs, self._events, self._sought.c
        # From the newest on, because the events in question were stored not long ago if at all.
        there = (
            sa.select(events.c.sequence)
            .where(
                events.c.key == sought.key,
                events.c.stream == sought.stream,
                events.c.position == sought.position,
                self._of_namespace(),
            )
            .join(logs, logs.c.key == events.c.key)
            .order_by(events.c.sequence.desc())
            .limit(1)
        )
        return sa.select(sought.key, sought.stream, sought.position, there.scalar_subquery().label("sequence"))

    async def append(
        self, attempt: Attempt, appends: Sequence[Append]
    ) -> tuple[list[int | None], list[tuple[UUID, LogState]]]:
        """Store events of any number of sessions.

        Returns:
            The sequence of the first event of each append, `None` where the session is not live; and the key and
            state of each log that has grown.
        """
        steps = self._append(appends, repeated=attempt.repeated)
        return await self._dialect.run(attempt.connection, steps, writes=True)

    def _append(
        self, appends: Sequence[Append], *, repeated: bool
    ) -> Steps[tuple[list[int | None], list[tuple[UUID, LogState]]]]:
        first: list[int | None] = [None] * len(appends)
        if sought := [number for number, append in enumerate(appends) if repeated or append.again]:
            yield from self._find_stored(appends, sought, first)
        of_sessions: dict[int, list[int]] = {}
        for number, append in enumerate(appends):
            if first[number] is None:
                of_sessions.setdefault(append.key.int, []).append(number)
        # In the order of the keys, in which all writers lock logs.
        numbers_of = {
            self._dialect.driver_key(appends[numbers[0]].key): numbers for _, numbers in sorted(of_sessions.items())
        }
        logs = {key: [appends[number] for number in numbers] for key, numbers in numbers_of.items()}
        grown = (yield from self._append_to_logs(logs)) if logs else {}
        if len(grown) < len(logs):
            # These sessions have no log yet.
            new = {key: appends for key, appends in logs.items() if key not in grown}
            yield self._start, self._started.parameters([(key,) for key in new])
            grown |= yield from self._append_to_logs(new)
        states = []
        for key, numbers in numbers_of.items():
            if (log := grown.get(key)) is not None:
                states.append((appends[numbers[0]].key, log))
                sequence = log.sequence + 1
                for number in reversed(numbers):
                    sequence -= len(appends[number].events)
                    first[number] = sequence
        return first, states

    def _append_at_once(self, wanted: Mapping[object, Sequence[Append]]) -> Steps[dict[object, LogState]]:
        """Store events by one statement, which is a transaction of its own."""
        growths: list[tuple[object, int, int]] = []
        added: list[tuple[object, int, int, str, int, int, str, str | None]] = []
        for key, appends in wanted.items():
            behind = sum([len(append.events) for append in appends])
            bytes_behind = sum([append.size for append in appends])
            growths.append((key, behind, bytes_behind))
            for append in appends:
                for event, size in zip(append.events, append.sizes, strict=True):
                    behind -= 1
                    bytes_behind -= size
                    place = event.stream, event.position, event.previous
                    added.append((key, behind, bytes_behind, *place, event.kind.value, event.message))
        grow, parameters = self._grow, self._growths.parameters(growths)
        if len(growths) == 1:
            key, behind, bytes_behind = growths[0]
            grow = self._grow_one
            parameters = {"grown_key": key, "grown_events": behind, "grown_bytes": bytes_behind}
        rows = yield grow, parameters | self._added.parameters(added)
        return {row[0]: LogState(*row[1:4]) for row in rows}

    def _append_row_by_row(self, wanted: Mapping[object, Sequence[Append]]) -> Steps[dict[object, LogState]]:
        """Store events by a statement for each row, which is fastest on SQLite.

        What was read of a log still holds when it is changed, because nothing else writes during the transaction.
        """
        grown: dict[object, LogState] = {}
        logs: list[tuple[int, int, object]] = []
        begun: list[tuple[object]] = []
        events: list[tuple[object, int, str, int, int, str, int, str | None]] = []
        for key, sequence, kept, kept_bytes, total_bytes, is_empty in (
            yield self._look, self._growing.parameters([(key,) for key in wanted])
        ):
            last, last_bytes = sequence, total_bytes
            for append in wanted[key]:
                for event, size in zip(append.events, append.sizes, strict=True):
                    last += 1
                    last_bytes += size
                    place = event.stream, event.position, event.previous
                    events.append((key, last, *place, event.kind.value, last_bytes, event.message))
            grown[key] = LogState(last, kept + last - sequence, kept_bytes + last_bytes - total_bytes)
            logs.append((last, last_bytes, key))
            if is_empty:
                begun.append((key,))
        if grown:
            yield self._grow_row, logs
            if begun:
                # Apart, because SQLite writes the index of a column that a statement sets, changed or not.
                yield self._begin_row, begun
            yield self._store_row, events
        return grown

    def _find_stored(self, appends: Sequence[Append], numbers: Sequence[int], first: list[int | None]) -> Steps[None]:
        """Note the sequences of the events that a call before this one stored, though its answer was lost."""
        sought = {}
        for number in numbers:
            event = appends[number].events[0]
            sought[number] = self._dialect.driver_key(appends[number].key), event.stream, event.position
        # Wait, because a try whose connection was lost may still be under way on the server.
        in_order = sorted(numbers, key=lambda number: appends[number].key.int)
        yield self._await, self._sought.parameters([sought[number] for number in in_order])
        rows = yield self._find, self._sought.parameters(list(sought.values()))
        there = {(key, stream, position): sequence for key, stream, position, sequence in rows}
        for number in numbers:
            first[number] = there.get(sought[number])
