"""Ends of sessions, and the removal of their journals, logs, events, messages and state with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.schema.tables import (
    events_table,
    journal_table,
    logs_table,
    messages_table,
    sessions_table,
    state_table,
    stream_messages_table,
)
from mcp_session_store.sql.sessions.records import as_number
from mcp_session_store.sql.sessions.statements import ended, live, locked, notify

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.records import EndReason
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Statement, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["End", "SessionRemoval"]


@dataclass(frozen=True, slots=True)
class End:
    """A session to end, and the reason."""

    key: UUID
    reason: EndReason


class SessionRemoval:
    """Statements that end sessions of one namespace, and remove all that belongs to them.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        sessions, name, now = sessions_table(schema), sa.literal(namespace, sa.Text), StoreClock()

        self._ends = dialect.batch("ended", {"key": sa.Uuid(), "reason": sa.Text()})
        ending = self._ends.matching(lambda ended: locked(sessions, ended.key, live(sessions, name, now))).cte("locked")
        self._end = dialect.precompiled(
            notify(
                dialect,
                sa.update(sessions)
                .where(self._ends.joined_on(sessions.c.key, ending))
                .values(ended(ending.c.reason) | {"changed_at": now})
                .returning(sessions.c.key, sessions.c.revision),
            )
        )
        self._ended_for_that_reason = dialect.precompiled(
            sa.select(sessions.c.key).join(
                self._ends.rows,
                sa.and_(
                    self._ends.joined_on(sessions.c.key),
                    Unindexed(sessions.c.namespace) == name,
                    sessions.c.end_reason == self._ends.c.reason,
                ),
            )
        )

        logs, events, journal = logs_table(schema), events_table(schema), journal_table(schema)
        self._removed = dialect.batch("removed", {"key": sa.Uuid()})
        self._remove_journals = dialect.precompiled(sa.delete(journal).where(self._removed.in_batch(journal.c.key)))
        locked_logs = sa.select(logs.c.key).where(self._removed.in_batch(logs.c.key)).order_by(logs.c.key)
        remove_logs = (
            sa.delete(logs)
            .where(logs.c.key.in_(locked_logs.with_for_update()), self._removed.in_batch(logs.c.key))
            .returning(logs.c.key, (logs.c.sequence - logs.c.trimmed).label("kept"))
        )
        # What another transaction has locked it removes itself. To wait for it could be a circle, because an instance
        # removes what it has read in another order.
        messages = messages_table(schema)
        of_stream = stream_messages_table(schema)
        removals = {
            f"removed_{table.name}": sa.delete(table).where(
                dialect.unlocked(table, self._removed.in_batch(table.c.key))
            )
            for table in (messages, of_stream)
        }
        # The end has locked the session, and waited for writes of its state.
        state = state_table(schema)
        removals["removed_state"] = sa.delete(state).where(self._removed.in_batch(state.c.key))
        self._remove_others: list[Statement] = []
        if dialect.changes_in_with:
            remove_logs = remove_logs.add_cte(*(removal.cte(name) for name, removal in removals.items()))
        else:
            self._remove_others = [dialect.precompiled(removal) for removal in removals.values()]
        self._remove_logs = dialect.precompiled(remove_logs)
        self._remove_events = dialect.precompiled(sa.delete(events).where(self._removed.in_batch(events.c.key)))
        self._count_rows = dialect.precompiled(
            sa.union_all(
                sa.select(logs.c.key, logs.c.sequence - logs.c.trimmed).where(self._removed.in_batch(logs.c.key)),
                sa.select(sessions.c.key, sessions.c.state_values).where(self._removed.in_batch(sessions.c.key)),
            )
        )

    async def end(self, attempt: Attempt, ends: Sequence[End]) -> list[bool]:
        """End sessions, and return whether each call did so."""
        # Of several calls for one session the first ends it, and the others find it ended.
        first: dict[UUID, End] = {}
        for end in ends:
            first.setdefault(end.key, end)
        wanted = [(self._dialect.driver_key(key), first[key].reason.value) for key in sorted(first, key=as_number)]
        run, connection = self._dialect.run, attempt.connection
        ended = await run(connection, self.end_within(wanted), writes=True, atomic=True)
        if attempt.repeated and len(ended) < len(wanted):
            # The first try may have ended them, if its commit succeeded and the answer was lost.
            ended |= await run(connection, self._find_ended(wanted), writes=False)
        return [end is first[end.key] and self._dialect.driver_key(end.key) in ended for end in ends]

    def _find_ended(self, ends: Sequence[tuple[object, str]]) -> Steps[set[object]]:
        rows = yield self._ended_for_that_reason, self._ends.parameters(ends)
        return {row[0] for row in rows}

    def end_within(self, ends: Sequence[tuple[object, str]]) -> Steps[set[object]]:
        """End the sessions that are live, within a transaction.

        Args:
            ends: The driver's keys and reasons, in the order of the keys.

        Returns:
            The driver's keys of the sessions that ended.
        """
        ended = yield self._end, self._ends.parameters(ends)
        yield from self.remove_with_session([(row[0], row[1]) for row in ended])
        return {row[0] for row in ended}

    def remove_with_session(self, ended: Collection[tuple[Any, int]]) -> Steps[None]:
        """Remove all that belongs to sessions that have ended within the transaction that runs.

        Args:
            ended: The driver's keys and revisions of the sessions. Only one whose revision is above 0 can have a
                journal.
        """
        # Under a key that cannot be read there is nothing else.
        ended = [(key, revision) for key, revision in ended if self._dialect.key(key) is not None]
        if not ended:
            return
        if with_journal := [key for key, revision in ended if revision]:
            yield self._remove_journals, self._parameters(with_journal)
        # A transaction that stores an event holds the lock of its log until the commit. So the events are removed by
        # a statement of their own: one that began before it had the locks would not see the latest events.
        keys = self._parameters([key for key, _ in ended])
        logs = yield self._remove_logs, keys
        for removal in self._remove_others:
            yield removal, keys
        if with_events := [key for key, kept in logs if kept]:
            yield self._remove_events, self._parameters(with_events)

    def row_counts(self, keys: Sequence[Any]) -> Steps[list[int]]:
        """Return how many events and values each session has, for keys as the driver takes and returns them."""
        counts = Counter[Any]()
        for key, count in (yield self._count_rows, self._parameters(keys)):
            counts[key] += count
        return [counts[key] for key in keys]

    def _parameters(self, keys: Collection[Any]) -> dict[str, object]:
        return self._removed.parameters([(key,) for key in sorted(keys)])
