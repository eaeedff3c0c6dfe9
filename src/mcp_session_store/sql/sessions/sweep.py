"""The sweep of sessions: which sessions it takes, and how it handles them a few at a time."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.retention import MAY_BE_HELD
from mcp_session_store.sql.dialects.functions import ONE, StoreClock
from mcp_session_store.sql.schema.tables import sessions_table, values_table
from mcp_session_store.sql.sessions.statements import ended, expiry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Statement, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.sessions.removal import SessionRemoval

__all__ = ["ROWS_PER_STEP", "Sweep", "SweepCandidates", "SweepResult", "SweepStatements", "expired_values"]

ROWS_PER_STEP: Final = 20_000
"""Most events and values that are removed with the sessions of one step, unless a single session has more."""


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


def expired_values(*, schema: str | None, namespace: str) -> sa.Select[Any]:
    """Select the keys of values of no session whose time is over, in the order of an index.

    Args:
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the values.
    """
    table = values_table(schema)
    mine = table.c.namespace == sa.literal(namespace, sa.Text)
    return sa.select(table.c.key).where(mine, table.c.expires_at <= _ago(timedelta(0))).order_by(table.c.expires_at)


def _ago(duration: timedelta) -> sa.ColumnElement[Any]:
    # A subquery, because Postgres uses no index for a function that may change within the statement, as a clock does.
    return sa.select(StoreClock(-duration.total_seconds())).scalar_subquery()


class SweepStatement:
    """One kind of step: a statement that changes at most `limit` sessions, and returns of each the key, the revision,
    when it was created and the present time.

    A session that another transaction has locked is skipped, because it is in use or being swept. The condition is
    checked again once a session is locked.

    Args:
        dialect: The database's dialect.
        table: The table of sessions.
        keys: Selects the keys of the sessions to change.
        change: The change.
        ends: Whether the sessions have ended after it.
        loses_rows: Whether they may have events and state until then.
    """

    def __init__(
        self,
        dialect: Dialect,
        table: sa.Table,
        *,
        keys: sa.Select[Any],
        change: sa.Update | sa.Delete,
        ends: bool,
        loses_rows: bool = False,
    ) -> None:
        self.ends: Final = ends
        self.loses_rows: Final = loses_rows
        self._dialect = dialect
        self._table = table
        self._keys = keys
        self._change = change
        self._compiled: dict[tuple[int, bool], Statement] = {}

    def change(self, limit: int) -> Statement:
        """Return the statement for a limit."""
        return self._with_limit(limit, changes=True)

    def candidates(self, limit: int) -> Statement:
        """Return a query for the keys of the sessions that it would change, unless another sweep is faster."""
        return self._with_limit(limit, changes=False)

    def _with_limit(self, limit: int, *, changes: bool) -> Statement:
        if (statement := self._compiled.get((limit, changes))) is not None:
            return statement
        # Written into the statement, because the planner of Postgres does not know that a parameter is small.
        expression: sa.Executable
        expression = keys = self._keys.limit(sa.literal_column(str(limit), sa.Integer))
        if changes:
            locked = keys.with_for_update(skip_locked=True, key_share=isinstance(self._change, sa.Update))
            c = self._table.c
            expression = self._change.where(self._dialect.is_one_of(c.key, locked)).returning(
                c.key, c.revision, c.created_at, StoreClock()
            )
        statement = self._compiled[limit, changes] = self._dialect.precompiled(expression)
        return statement


class SweepStatements:
    """Statements of a sweep for a policy.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace that all statements are limited to.
        retention: The policy.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        table = sessions_table(schema)
        candidates = SweepCandidates(dialect, schema=schema, namespace=namespace, retention=retention)
        self.give_expiry = (
            None
            if candidates.without_expiry is None
            else SweepStatement(
                dialect,
                table,
                keys=candidates.without_expiry,
                # As if they were used now, because activity need not be reported of sessions without an expiry.
                change=sa.update(table).values(
                    expires_at=expiry(retention, created_at=table.c.created_at, last_seen_at=StoreClock())
                ),
                ends=False,
            )
        )
        self.end_expired = SweepStatement(
            dialect,
            table,
            keys=candidates.expired,
            change=sa.update(table).values(
                ended(sa.literal(EndReason.EXPIRED.value, sa.Text))
                # Instances that hold it hear of it, unless that is too long ago: a sweep of very many floods none.
                | {
                    "changed_at": sa.case(
                        (table.c.last_seen_at > StoreClock(-MAY_BE_HELD.total_seconds()), StoreClock()),
                        else_=table.c.changed_at,
                    )
                }
            ),
            ends=True,
            loses_rows=True,
        )
        self.remove_tombstones = (
            None
            if candidates.old_tombstones is None
            else SweepStatement(dialect, table, keys=candidates.old_tombstones, change=sa.delete(table), ends=True)
        )
        looked_for = (
            candidates.without_expiry,
            candidates.expired,
            candidates.old_tombstones,
            expired_values(schema=schema, namespace=namespace),
        )
        self.due = dialect.precompiled(
            sa.select(
                *(
                    sa.literal(0, sa.Integer) if keys is None else _finds_any(keys).label(f"due_{number}")
                    for number, keys in enumerate(looked_for)
                )
            )
        )
        """Whether there is anything for each kind of step, and whether there are values whose time is over."""


def _finds_any(keys: sa.Select[Any]) -> sa.ColumnElement[int]:
    """Return 1 where a query finds anything, else 0.

    Without EXISTS, for which Postgres drops the order, and with it the index.
    """
    return sa.case((keys.limit(ONE).scalar_subquery().is_(None), 0), else_=1)


class SweepStep(NamedTuple):
    """A step of a sweep."""

    statement: SweepStatement
    limit: int


class SweepResult(NamedTuple):
    """What a step of a sweep has done."""

    handled: int = 0
    """Number of sessions."""
    more: bool = False
    """Whether there may be more to do."""
    held_up: float = 0.0
    """Seconds for which it held up all other writers; 0 where they do not wait for one another."""
    lives: Sequence[float] = ()
    """Seconds that each of the sessions has lived."""


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

    def steps(self, limit: int) -> list[SweepStep | None]:
        """Return the steps that give an expiry, end and purge; `None` for one that the policy makes needless."""
        sql = self.statements
        kinds = (sql.give_expiry, sql.end_expired, sql.remove_tombstones)
        return [None if kind is None else SweepStep(kind, limit) for kind in kinds]

    async def due(self, attempt: Attempt) -> Sequence[int]:
        """Return for each of the steps whether it would find anything, and the same for the removal of values.

        One statement for all, because most sweeps find nothing.
        """
        due = await self._dialect.run(attempt.connection, self._look(), writes=False)
        if any(due):
            # Bring in what the step before has written, so that no commit has to while others wait.
            await self._dialect.checkpoint(attempt.connection)
        return due

    def _look(self) -> Steps[Sequence[int]]:
        (row,) = yield self.statements.due, {}
        return tuple(row)

    async def run(self, attempt: Attempt, steps: Sequence[SweepStep]) -> list[SweepResult]:
        """Run steps, and return the result of each."""
        return [await self._run(attempt, step) for step in steps]

    async def _run(self, attempt: Attempt, step: SweepStep) -> SweepResult:
        run, connection = self._dialect.run, attempt.connection
        statement, limit = step
        if statement.loses_rows:
            limit = await run(connection, self._with_few_rows(statement, limit), writes=False)
            if limit == 0:
                return SweepResult()
        return await run(connection, self._change(statement, limit), writes=True, atomic=True)

    def _with_few_rows(self, statement: SweepStatement, limit: int) -> Steps[int]:
        """Return how many sessions can be ended at once, so that not too many rows are removed with them."""
        keys = [key for (key,) in (yield statement.candidates(limit), {})]
        if not keys:
            return 0
        readable = [key for key in keys if self._dialect.key(key) is not None]
        totals = accumulate((yield from self._removal.row_counts(readable)))
        few = sum(total <= ROWS_PER_STEP for total in totals)
        return limit if few == len(readable) else max(1, few)

    def _change(self, statement: SweepStatement, limit: int) -> Steps[SweepResult]:
        change = statement.change(limit)
        # Where writers exclude one another, these steps run in the connection's thread, and the lock is held by now.
        began = time.monotonic()
        changed = yield change, {}
        if statement.ends:
            yield from self._removal.remove_with_session([(row[0], row[1]) for row in changed])
        held_up = time.monotonic() - began if self._dialect.single_writer else 0.0
        return SweepResult(len(changed), len(changed) == limit, held_up, self._lives(changed))

    def _lives(self, rows: Rows) -> list[float]:
        """Return how long the sessions in rows have lived, those aside whose time of creation cannot be read."""
        lives = []
        for _, _, *moments in rows:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                created_at, now = self._dialect.moments(moments)
                lives.append((now - created_at).total_seconds())
        return lives
