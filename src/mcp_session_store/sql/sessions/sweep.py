"""The sweep of sessions: which of them are to be swept, and the statements that do so a little at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.sql.database import transaction
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.sql.sessions.statements import ended, expiry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.sessions.removal import SessionRemoval

__all__ = ["Sweep", "SweepCandidates", "SweepStep", "SweepStatements"]

EVENTS_PER_STEP: Final = 20_000
"""Events that the sessions have together which one step of a sweep ends, unless a single one has more."""


class SweepCandidates:
    """The sessions that a sweep takes, each kind as a query for their keys in the order of an index.

    Args:
        dialect: The database they are in.
        schema: Where the tables are; the connection's default unless given.
        namespace: Whose sessions.
        retention: The policy that says so.
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
        """Live sessions without the expiry that the policy wants; `None` where it wants none."""
        self.expired = (
            sa.select(table.c.key)
            .where(mine, not_ended, dialect.unlikely(table.c.expires_at <= _ago(retention.sweep_grace)))
            .order_by(table.c.expires_at)
        )
        """Those that expired longer ago than the grace."""
        kept = retention.tombstone_kept
        self.old_tombstones = (
            None
            if kept is None
            else sa.select(table.c.key).where(mine, table.c.ended_at <= _ago(kept)).order_by(table.c.ended_at)
        )
        """Those that ended long enough ago to be removed; `None` where they are kept for ever."""


def _ago(duration: timedelta) -> sa.ColumnElement[Any]:
    # A subquery: Postgres compares an index with no function that may change within the statement, as a clock.
    return sa.select(StoreClock(-duration.total_seconds())).scalar_subquery()


class SweepStatements:
    """Each handles at most `limit` sessions, and returns the key and revision of each; `None` where there is nothing.

    A session that another instance has locked is passed over: it is in use, or being swept. What makes it due is
    looked at again once it is locked.

    Args:
        dialect: The database they are for.
        schema: Where the tables are; the connection's default unless given.
        namespace: To which all statements are limited.
        retention: What they follow.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        table = sessions_table(schema)
        candidates = SweepCandidates(dialect, schema=schema, namespace=namespace, retention=retention)
        # Written into the statement: of a parameter the planner of Postgres does not know that it is small.
        limit = sa.bindparam("limit", type_=sa.Integer, literal_execute=True)

        def some(keys: sa.Select[Any], *, to_delete: bool = False) -> sa.ColumnElement[bool]:
            locked = keys.limit(limit).with_for_update(skip_locked=True, key_share=not to_delete)
            return dialect.is_one_of(table.c.key, locked)

        self.expired = candidates.expired.limit(limit)
        """The keys of those that `end_expired` takes, unless somebody else is faster."""

        outcome = table.c.key, table.c.revision
        self.give_expiry = (
            None
            if candidates.without_expiry is None
            else sa.update(table)
            .where(some(candidates.without_expiry))
            # As if they were used now: while they had no expiry, nobody had to report when they were.
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
    """One statement of a sweep, and how it is run."""

    statement: sa.Executable
    limit: int
    ends: bool
    """Whether the sessions that it handles have ended."""
    candidates: sa.Executable | None = None
    """Tells which sessions it is about to end: those with very many events are fewer at a time."""


class Sweep:
    """Runs the steps of a sweep of one namespace.

    Args:
        dialect: The database.
        statements: The statements, which follow the policy.
        removal: Removes what belongs to sessions that end.
    """

    def __init__(self, dialect: Dialect, *, statements: SweepStatements, removal: SessionRemoval) -> None:
        self.statements = statements
        """May be replaced when the policy changes."""
        self._dialect = dialect
        self._removal = removal

    def steps(self, limit: int) -> tuple[SweepStep | None, SweepStep, SweepStep | None]:
        """The steps that give an expiry, end, and purge, in this order; `None` for one that has nothing to do."""
        sql = self.statements
        return (
            None if sql.give_expiry is None else SweepStep(sql.give_expiry, limit, ends=False),
            SweepStep(sql.end_expired, limit, ends=True, candidates=sql.expired),
            None if sql.remove_tombstones is None else SweepStep(sql.remove_tombstones, limit, ends=True),
        )

    async def run(self, attempt: Attempt, steps: Sequence[SweepStep]) -> list[tuple[int, bool]]:
        """How many sessions each step has handled, and whether there may be more."""
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
