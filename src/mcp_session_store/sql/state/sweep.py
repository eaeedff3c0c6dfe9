"""The sweep of state: values whose time is over, and those of sessions that an older version has ended."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.retention import StateSweepReport
from mcp_session_store.sql.dialects.functions import MOMENT, StoreClock, Unindexed
from mcp_session_store.sql.schema.tables import sessions_table, state_table
from mcp_session_store.sql.sessions.sweep import ROWS_PER_STEP

if TYPE_CHECKING:
    from datetime import datetime

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Statement, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["StateSweep"]

LOOK_BACK: Final = timedelta(hours=1)
"""How long before its first sweep a process looks for sessions that an older version ended. What is older goes with the
session's tombstone."""


class StateSweep:
    """Statements that remove state that nothing reads any more.

    An older version that ends a session knows no state: the session's row then still counts values, which the end by
    this version sets to 0. Of ended sessions, those are looked at that have ended since the last look.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        overlap: How long an end may take to become visible after its date.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, overlap: timedelta) -> None:
        self._dialect = dialect
        self._overlap = overlap
        self._since: datetime | None = None
        sessions, state, now = sessions_table(schema), state_table(schema), StoreClock()
        name = sa.literal(namespace, sa.Text)
        limit = sa.bindparam("limit", type_=sa.Integer)
        # A subquery, because Postgres uses no index for a function that may change within the statement.
        over = state.c.expires_at <= sa.select(now).scalar_subquery()
        self._find_over = dialect.precompiled(
            sa.select(state.c.key, state.c.name)
            .where(state.c.namespace == name, dialect.unlikely(over))
            .order_by(state.c.expires_at)
            .limit(limit)
        )
        self._keys = dialect.batch("swept", {"key": sa.Uuid()})
        self._lock = dialect.precompiled(
            sa.select(sessions.c.key)
            .where(self._keys.in_batch(sessions.c.key), Unindexed(sessions.c.namespace) == name)
            .order_by(sessions.c.key)
            .with_for_update(key_share=True, skip_locked=True)
        )
        self._values = dialect.batch("over", {"key": sa.Uuid(), "name": sa.Text()})
        self._remove_over = dialect.precompiled(
            dialect.delete_joined(
                state,
                self._values.joined_on(state.c.key),
                state.c.name == self._values.c.name,
                Unindexed(state.c.expires_at) <= now,
            ).returning(state.c.key, state.c.bytes)
        )
        self._less = dialect.batch("less", {"key": sa.Uuid(), "values": sa.Integer(), "bytes": sa.BigInteger()})
        less = self._less.c
        self._count = dialect.precompiled(
            sa.update(sessions)
            .where(self._less.joined_on(sessions.c.key))
            .values(
                state_values=sessions.c.state_values - less["values"], state_bytes=sessions.c.state_bytes - less.bytes
            )
        )
        since = sa.func.coalesce(
            sa.bindparam("ended_since", type_=MOMENT), StoreClock(-LOOK_BACK.total_seconds()), type_=MOMENT
        )
        ended = (
            sa.select(sessions.c.key, sessions.c.state_values)
            .where(
                sessions.c.namespace == name,
                sessions.c.ended_at >= sa.select(since).scalar_subquery(),
                Unindexed(sessions.c.state_values) > 0,
            )
            .order_by(sessions.c.ended_at)
            .limit(limit)
        ).subquery("ended")
        # The first row is the time of the look.
        self._find_ended = dialect.precompiled(
            sa.union_all(
                sa.select(sa.null().label("key"), now.label("now"), sa.literal(0, sa.Integer).label("state_values")),
                sa.select(ended.c.key, sa.null().label("now"), ended.c.state_values),
            )
        )
        self._remove_all = dialect.precompiled(
            sa.delete(state).where(self._keys.in_batch(state.c.key)).returning(state.c.key)
        )
        self._clear = dialect.precompiled(
            sa.update(sessions)
            .where(self._keys.in_batch(sessions.c.key))
            .values(state_values=sa.literal(0, sa.Integer), state_bytes=sa.literal(0, sa.BigInteger))
        )

    async def sweep(self, attempt: Attempt, limit: int) -> StateSweepReport:
        """Do one step, and report it."""
        run, connection = self._dialect.run, attempt.connection
        report = StateSweepReport()
        # Read first, so that a sweep without work waits for no writer.
        over = await run(connection, self._rows_of(self._find_over, {"limit": limit}), writes=False)
        if over:
            report += await run(connection, self._remove(over, limit), writes=True, atomic=True)
        since = None if self._since is None else self._dialect.driver_moment(self._since)
        asked = {"ended_since": since, "limit": limit}
        rows = await run(connection, self._rows_of(self._find_ended, asked), writes=False)
        ((now,),) = ([row[1]] for row in rows if row[0] is None)
        (now,) = self._dialect.moments([now])
        ended = [(key, count) for key, _, count in rows if key is not None]
        few = sum(total <= ROWS_PER_STEP for total in accumulate(count for _, count in ended))
        if ended:
            keys = [key for key, _ in ended[: max(1, few)]]
            cleared = await run(connection, self._remove_with_session(keys), writes=True, atomic=True)
            report = StateSweepReport(
                removed=report.removed + cleared.removed,
                more=report.more or cleared.more,
                longest=max(report.longest, cleared.longest),
            )
        if few == len(ended) < limit:
            self._since = now - self._overlap
        return report

    def _rows_of(self, statement: Statement, parameters: dict[str, object]) -> Steps[Rows]:
        return (yield statement, parameters)

    def _remove(self, values: Rows, limit: int) -> Steps[StateSweepReport]:
        """Remove values whose time is over, except of sessions that another transaction has locked."""
        began = time.monotonic()
        locked = {row[0] for row in (yield self._lock, self._parameters([key for key, _ in values]))}
        if not locked:
            return StateSweepReport()
        over = sorted((key, name) for key, name in values if key in locked)
        removed = yield self._remove_over, self._values.parameters(over)
        counts, sizes = Counter(row[0] for row in removed), Counter[Any]()
        for key, size in removed:
            sizes[key] += size
        if removed:
            yield self._count, self._less.parameters([(key, counts[key], sizes[key]) for key in sorted(counts)])
        return self._report(len(removed), len(values) == limit, began)

    def _remove_with_session(self, keys: list[Any]) -> Steps[StateSweepReport]:
        """Remove the values that sessions have left behind, except of those that another transaction has locked."""
        began = time.monotonic()
        locked = yield self._lock, self._parameters(keys)
        if not locked:
            return StateSweepReport()
        parameters = self._parameters([row[0] for row in locked])
        removed = yield self._remove_all, parameters
        yield self._clear, parameters
        return self._report(len(removed), bool(removed), began)

    def _report(self, removed: int, more: bool, began: float) -> StateSweepReport:
        held_up = time.monotonic() - began if self._dialect.single_writer else 0.0
        return StateSweepReport(removed=removed, more=more, longest=held_up)

    def _parameters(self, keys: list[Any]) -> dict[str, object]:
        return self._keys.parameters([(key,) for key in sorted(set(keys))])
