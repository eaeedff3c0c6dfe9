"""What tailing a stream needs beside its events: the newest sequences, and notifications of new events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.event_log import STANDALONE_STREAM, STANDALONE_WAIT
from mcp_session_store.records import EventKind
from mcp_session_store.sql.dialects.functions import ONE, StoreClock, Unindexed
from mcp_session_store.sql.notifications import EVENT_CHANNEL
from mcp_session_store.sql.schema.tables import events_table, logs_table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Statement, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["LogTail", "notification"]

FOLLOWED_FOR: Final = 120.0
"""Seconds for which notifications of a session's events are sent after it was last followed."""


class LogTail:
    """Looks at the ends of the logs of one namespace, and asks for notifications when they grow.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        logs, events = logs_table(schema), events_table(schema)
        of_namespace = Unindexed(logs.c.namespace) == sa.literal(namespace, sa.Text)
        self._heads = dialect.batch("head", {"key": sa.Uuid()})
        self._head = dialect.precompiled(
            sa.select(logs.c.key, logs.c.sequence).where(self._heads.in_batch(logs.c.key), of_namespace)
        )
        earlier = events.alias("earlier")
        # From the newest one back, as far as events are recent; the planner knows no order of the times.
        before = (
            sa.select(earlier.c.sequence)
            .where(earlier.c.key == logs.c.key, earlier.c.created_at <= StoreClock(-STANDALONE_WAIT.total_seconds()))
            .order_by(earlier.c.sequence.desc())
            .limit(ONE)
            .correlate(logs)
            .scalar_subquery()
        )
        first = (
            sa.select(events.c.sequence - sa.literal(1, sa.BigInteger))
            .where(
                events.c.key == logs.c.key,
                events.c.sequence > sa.func.coalesce(before, logs.c.trimmed),
                events.c.stream == sa.literal(STANDALONE_STREAM, sa.Text),
                events.c.kind != sa.literal(EventKind.PRIMING.value, sa.Text),
            )
            .order_by(events.c.sequence)
            .limit(ONE)
            .correlate(logs)
            .scalar_subquery()
        )
        self._place = dialect.precompiled(
            sa.select(logs.c.key, sa.func.coalesce(first, logs.c.sequence)).where(
                self._heads.in_batch(logs.c.key), of_namespace
            )
        )
        soon = sa.or_(logs.c.followed_until.is_(None), logs.c.followed_until < StoreClock(FOLLOWED_FOR / 2))
        following = self._heads.matching(
            lambda head: sa.select(logs.c.key).where(logs.c.key == head.key, of_namespace, soon).with_for_update()
        ).cte("locked")
        self._follow = (
            sa.update(logs).where(logs.c.key == following.c.key).values(followed_until=StoreClock(FOLLOWED_FOR))
        )

    async def heads(self, attempt: Attempt, calls: Sequence[Collection[UUID]]) -> list[dict[UUID, int]]:
        """Return for each call the sequence of the newest event of each of its sessions that has a log."""
        return await self._sequences(attempt, self._head, calls)

    async def standalone_places(self, attempt: Attempt, calls: Sequence[Collection[UUID]]) -> list[dict[UUID, int]]:
        """Return for each call what `EventLog.standalone_places` returns."""
        return await self._sequences(attempt, self._place, calls)

    async def _sequences(
        self, attempt: Attempt, statement: Statement, calls: Sequence[Collection[UUID]]
    ) -> list[dict[UUID, int]]:
        steps = self._sequences_of(statement, set().union(*calls))
        found = await self._dialect.run(attempt.connection, steps, writes=False)
        return [{key: found[key] for key in keys if key in found} for keys in calls]

    def _sequences_of(self, statement: Statement, keys: Collection[UUID]) -> Steps[dict[UUID, int]]:
        by_driver_key = {self._dialect.driver_key(key): key for key in keys}
        rows = yield statement, self._heads.parameters([(key,) for key in by_driver_key])
        return {by_driver_key[key]: sequence for key, sequence in rows}

    async def follow(self, attempt: Attempt, keys: Collection[UUID]) -> None:
        """Request notifications of the next events of these sessions."""
        await attempt.connection.execute(self._follow, self._heads.parameters([(key,) for key in sorted(keys)]))


def notification(dialect: Dialect, grown: sa.CTE) -> list[sa.ColumnElement[Any]]:
    """Return the column of a statement that notifies of the logs in it that are followed; nothing without a channel.

    A column, because a SELECT in WITH whose result is not read does not run.

    Args:
        dialect: The database's dialect.
        grown: The logs, with `key` and `followed_until`.
    """
    if not dialect.has_notifications:
        return []
    followed = EVENT_CHANNEL.notify(grown.c.key).where(grown.c.followed_until > StoreClock())
    return [sa.cast(followed.scalar_subquery(), sa.Text).label("notified")]
