"""The sweep of sessions: which sessions it takes, and how it handles them a few at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.sql.sessions.statements import ended, expiry
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.sessions.removal import SessionRemoval

__all__ = ["Sweep", "SweepCandidates", "SweepStep", "SweepStatements"]

EVENTS_PER_STEP: Final = 20_000
"""Events of all the sessions together that one step of a sweep ends, unless a single session has more."""


class SweepCandidates:
    """Sessions that a sweep takes: for each kind a query for their keys, in the order of an index.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        retention: The policy.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        table = sessions_table(schema)
        mine = table.c.namespace == sa.literal(namespace, sa.Text)
        not_ended = table.c.ended_at.is_(None)
        self.without_expiry = (
            None
            if retention.idle is None and retention.absolute is None
            else sa.select(table.c.key)
            .where(mine, not_ended, dialect.unlikely(table.c.expires_at.is_(None)))
            .order_by(table.c.expires_at, table.c.key)
        )
        """Live sessions without an expiry, though the policy has a limit; `None` where it has no limit."""
        self.expired = (
            sa.select(table.c.key)
            .where(mine, not_ended, dialect.unlikely(table.c.expires_at <= _ago(retention.sweep_grace)))
            .order_by(table.c.expires_at)
        )
        """Sessions that expired longer ago than the grace."""
        kept = retention.tombstone_kept
        self.old_tombstones = (
            None
            if kept is None
            else sa.select(table.c.key).where(mine, table.c.ended_at <= _ago(kept)).order_by(table.c.ended_at)
        )
        """Sessions that ended long enough ago to be removed; `None` where tombstones are kept for ever."""


def _ago(duration: timedelta) -> sa.ColumnElement[Any]:
    # A subquery, because Postgres uses no index for a function that may change within the statement, as a clock does.
    return sa.select(StoreClock(-duration.total_seconds())).scalar_subquery()


class SweepStatements:
    """Statements of a sweep. Each handles at most `limit` sessions, and returns the key and revision of each.

    A session that another transaction has locked is skipped, because it is in use or being swept. The condition is
    checked again once a session is locked.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace that all statements are limited to.
        retention: The policy.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        table = sessions_table(schema)
        candidates = SweepCandidates(dialect, schema=schema, namespace=namespace, retention=retention)
        # Written into the statement, because the planner of Postgres does not know that a parameter is small.
        limit = sa.bindparam("limit", type_=sa.Integer, literal_execute=True)

        def some(keys: sa.Select[Any], *, to_delete: bool = False) -> sa.ColumnElement[bool]:
            locked = keys.limit(limit).with_for_update(skip_locked=True, key_share=not to_delete)
            return dialect.is_one_of(table.c.key, locked)

        self.expired = candidates.expired.limit(limit)
        """Keys of the sessions that `end_expired` takes, unless another sweep is faster."""

        outcome = table.c.key, table.c.revision
        self.give_expiry = (
            None
            if candidates.without_expiry is None
            else sa.update(table)
            .where(some(candidates.without_expiry))
            # As if they were used now, because activity need not be reported of sessions without an expiry.
            .values(expires_at=expiry(retention, created_at=table.c.created_at, last_seen_at=StoreClock()))
            .returning(*outcome)
        )
        self.end_expired = (
            sa.update(table)
            .where(some(candidates.expired))
            .values(ended(sa.literal(EndReason.EXPIRED.value, sa.Text)))
            .returning(*outcome)
        )
        self.remove_tombstones = (
            None
            if candidates.old_tombstones is None
            else sa.delete(table).where(some(candidates.old_tombstones, to_delete=True)).returning(*outcome)
        )


@dataclass(frozen=True, slots=True)
class SweepStep:
    """A step of a sweep: one statement and its bounds."""

    statement: sa.Executable
    limit: int
    ends: bool
    """Whether the sessions have ended after it."""
    candidates: sa.Executable | None = None
    """Selects the sessions that it is about to end, so that fewer are taken at a time if they have many events."""


class Sweep:
    """Steps of a sweep of one namespace.

    Args:
        dialect: The database's dialect.
        statements: The statements for the policy.
        removal: Removes the journals and events of sessions that end.
    """

    def __init__(self, dialect: Dialect, *, statements: SweepStatements, removal: SessionRemoval) -> None:
        self.statements = statements
        """Statements for the policy; replaced when it is."""
        self._dialect = dialect
        self._removal = removal

    def steps(self, limit: int) -> tuple[SweepStep | None, SweepStep, SweepStep | None]:
        """Return the steps that give an expiry, end and purge; `None` for one that the policy makes needless."""
        sql = self.statements
        return (
            None if sql.give_expiry is None else SweepStep(sql.give_expiry, limit, ends=False),
            SweepStep(sql.end_expired, limit, ends=True, candidates=sql.expired),
            None if sql.remove_tombstones is None else SweepStep(sql.remove_tombstones, limit, ends=True),
        )

    async def run(self, attempt: Attempt, steps: Sequence[SweepStep]) -> list[tuple[int, bool]]:
        """Run steps, and return for each how many sessions it has handled and whether there may be more."""
        return [await self._run(attempt, step) for step in steps]

    async def _run(self, attempt: Attempt, step: SweepStep) -> tuple[int, bool]:
        execute = attempt.connection.execute
        if not step.ends:
            handled = len((await execute(step.statement, {"limit": step.limit})).all())
            return handled, handled == step.limit
        limit = step.limit
        if step.candidates is not None:
            keys = list((await execute(step.candidates, {"limit": limit})).scalars())
            if not keys:
                return 0, False
            totals = accumulate(await self._removal.event_counts(attempt, keys))
            few = sum(total <= EVENTS_PER_STEP for total in totals)
            limit = limit if few == len(keys) else max(1, few)
        async with transaction(attempt.connection, self._dialect):
            result = (await execute(step.statement, {"limit": limit})).all()
            await self._removal.remove_with_session(attempt, [(row.key, row.revision) for row in result])
        return len(result), len(result) == limit
