"""Removing the events of sessions that go on: those that are too old, and those that are too many."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.event_log import LEAST_EVENT_SWEEP
from mcp_session_store.sql.dialects.functions import ONE, ByteLength, Unindexed, driver_value
from mcp_session_store.sql.schema.tables import events_table, logs_table, sessions_table
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.retention import EventPolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["EventTrimming", "logs_per_step", "remaining_columns"]

LOGS_PER_STEP: Final = 100
"""Most logs that one step of a sweep trims."""
KEPT: Final = 0.9
"""Part of a log's limit that is kept when the limit is exceeded, so that a log is trimmed once per tenth of it."""


def logs_per_step(limit: int) -> int:
    """Return how many logs a step of a sweep trims, when it is to remove so many events.

    Few where they are few events, because an update of a log costs as much as the removal of many events.
    """
    return min(LOGS_PER_STEP, max(1, limit // LEAST_EVENT_SWEEP))


def remaining_columns(logs: sa.Table, events: sa.Table) -> dict[str, sa.ColumnElement[Any]]:
    """Return the values of a log's columns that describe the events it has left, by name.

    They are read from the oldest event that is there, because events may have been dropped with a partition.
    """

    def of_oldest(value: sa.ColumnElement[Any]) -> sa.ScalarSelect[Any]:
        of_log = sa.select(value).where(events.c.key == logs.c.key)
        return of_log.order_by(events.c.sequence).limit(ONE).scalar_subquery()

    return {
        "trimmed": sa.func.coalesce(of_oldest(events.c.sequence - 1), logs.c.sequence),
        "trimmed_bytes": sa.func.coalesce(of_oldest(_bytes_before(events)), logs.c.total_bytes),
        "oldest_at": of_oldest(events.c.created_at),
    }


def _bytes_before(events: sa.Table) -> sa.ColumnElement[int]:
    return events.c.total_bytes - sa.func.coalesce(ByteLength(events.c.message), 0)


class TrimResult(NamedTuple):
    """Result of trimming logs."""

    logs: int
    """Number of logs trimmed: those that no other transaction had locked."""
    removed: int
    """Number of events removed."""
    more: bool
    """Whether these logs have more events to remove."""
    held_up: float
    """Seconds for which all other writers were held up; 0 where they do not wait for one another."""


class EventTrimming:
    """Statements that remove the oldest events of live sessions.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        policy: The policy that says which events.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, policy: EventPolicy) -> None:
        self._dialect = dialect
        self._policy = policy
        logs, events, sessions = logs_table(schema), events_table(schema), sessions_table(schema)
        name = sa.literal(namespace, sa.Text)
        too_old: sa.ColumnElement[Any] = (
            sa.null() if policy.max_age is None else dialect.sweep_cutoff(events, policy.max_age)
        )
        self._due = (
            None
            if policy.max_age is None
            else sa.select(driver_value(logs.c.key))
            .where(logs.c.namespace == name, logs.c.oldest_at <= too_old)
            .order_by(logs.c.oldest_at)
            .limit(sa.bindparam("limit", type_=sa.Integer, literal_execute=True))
        )
        self._keys = dialect.batch("trimmed", {"key": sa.Uuid()})
        self._lock = (
            sa.select(logs.c.key, logs.c.sequence, logs.c.total_bytes, logs.c.trimmed, logs.c.trimmed_bytes)
            .where(self._keys.in_batch(logs.c.key), Unindexed(logs.c.namespace) == name)
            .order_by(logs.c.key)
        )
        self._ranges = dialect.batch(
            "range",
            {
                "key": sa.Uuid(),
                "by_count": sa.BigInteger(),
                "by_bytes": sa.BigInteger(),
                "newest": sa.BigInteger(),
                "at_most": sa.BigInteger(),
            },
        )
        range_ = self._ranges.c
        # The newest event is kept, however large. This condition is first, because the size of an event may have to be
        # read.
        by_bytes = sa.and_(events.c.sequence < range_.newest, _bytes_before(events) < range_.by_bytes)
        reasons = [events.c.sequence <= range_.by_count, by_bytes]
        if policy.max_age is not None:
            reasons.append(events.c.created_at <= too_old)
        # One log after the other, here and in the removal, so that only the range of each is read, however many.
        last = sa.select(sa.func.max(events.c.sequence)).where(
            events.c.key == range_.key, events.c.sequence <= range_.at_most, sa.or_(*reasons)
        )
        self._find = sa.select(range_.key, last.scalar_subquery().label("up_to"))
        self._cuts = dialect.batch("cut", {"key": sa.Uuid(), "up_to": sa.BigInteger()})
        cut = self._cuts.c
        # Conditions that follow from others, because without them Postgres would read the whole table, or whole logs.
        self._remove = dialect.delete_joined(
            events,
            self._cuts.joined_on(events.c.key),
            events.c.sequence <= cut.up_to,
            events.c.sequence <= sa.bindparam("highest", type_=sa.BigInteger),
        )

        self._update_logs = (
            sa.update(logs).where(self._keys.in_batch(logs.c.key)).values(remaining_columns(logs, events))
        )
        # Without a record nothing will end the session: the record was removed by a version of this package that knows
        # no events. A subquery for each log, because the planner would join with all sessions.
        record = sa.select(sessions.c.key).where(sessions.c.key == logs.c.key).limit(ONE)
        self._remove_empty = sa.delete(logs).where(
            self._keys.in_batch(logs.c.key),
            Unindexed(logs.c.oldest_at).is_(None),
            record.scalar_subquery().is_(None),
        )

    async def due(self, attempt: Attempt, *, limit: int) -> list[UUID]:
        """Return some sessions with events that are too old, at most `limit`."""
        if self._due is None:
            return []
        found = (await attempt.connection.execute(self._due, {"limit": limit})).scalars()
        keys = [key for value in found if (key := self._dialect.key(value)) is not None]
        if keys:
            # Bring in what the step before has written, so that no commit has to while others wait.
            await self._dialect.checkpoint(attempt.connection)
        return keys

    def exceeded(self, kept: int, kept_bytes: int) -> bool:
        """Return whether a log with so many events and bytes has to be trimmed."""
        return kept > self._policy.max_events_per_session or kept_bytes > self._policy.max_bytes_per_session

    async def trim(self, attempt: Attempt, keys: Sequence[UUID], *, limit: int, wait: bool) -> TrimResult:
        """Remove the events of these sessions that the policy does not keep.

        Args:
            attempt: The connection.
            keys: The sessions.
            limit: Events removed of each at most.
            wait: Whether to wait for logs that other transactions have locked, or to skip them.
        """
        execute = attempt.connection.execute
        async with transaction(attempt.connection, self._dialect):
            began = time.monotonic()
            lock = self._lock.with_for_update(skip_locked=not wait)
            logs = (await execute(lock, self._keys.parameters([(key,) for key in sorted(keys)]))).all()
            if not logs:
                return TrimResult(logs=0, removed=0, more=False, held_up=0.0)
            at_most = {log.key: min(log.trimmed + limit, log.sequence) for log in logs}
            ranges = [(log.key, *self._limits(log), at_most[log.key]) for log in logs]
            found = await execute(self._find, self._ranges.parameters(ranges))
            cuts = [(key, up_to) for key, up_to in found if up_to is not None]
            removed = 0
            if cuts:
                parameters = self._cuts.parameters(cuts) | {"highest": max(up_to for _, up_to in cuts)}
                removed = (await execute(self._remove, parameters)).rowcount
            locked = self._keys.parameters([(log.key,) for log in logs])
            await execute(self._update_logs, locked)
            await execute(self._remove_empty, locked)
        held_up = time.monotonic() - began if self._dialect.single_writer else 0.0
        sequences = {log.key: log.sequence for log in logs}
        more = any(up_to == at_most[key] < sequences[key] for key, up_to in cuts)
        return TrimResult(logs=len(logs), removed=removed, more=more, held_up=held_up)

    def _limits(self, log: Any) -> tuple[int, int, int]:
        """Return the sequence up to which events are too many; the total of bytes up to which they are too large, and
        the sequence of the newest event, which is kept."""
        policy = self._policy
        by_count, by_bytes, newest = log.trimmed, 0, 0
        if log.sequence - log.trimmed > policy.max_events_per_session:
            by_count = log.sequence - int(KEPT * policy.max_events_per_session)
        if log.total_bytes - log.trimmed_bytes > policy.max_bytes_per_session:
            by_bytes, newest = log.total_bytes - int(KEPT * policy.max_bytes_per_session), log.sequence
        return by_count, by_bytes, newest
