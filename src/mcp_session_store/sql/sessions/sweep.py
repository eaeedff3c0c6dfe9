"""What is to be swept, and the statements that do so a little at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.sql.sessions.statements import ended, expiry

if TYPE_CHECKING:
    from datetime import timedelta

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Due", "SweepStatements"]


class Due:
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
            .where(mine, not_ended, dialect.rarely(table.c.expires_at.is_(None)))
            .order_by(table.c.expires_at, table.c.key)
        )
        """Live sessions without the expiry that the policy wants; `None` where it wants none."""
        self.expired = (
            sa.select(table.c.key)
            .where(mine, not_ended, dialect.rarely(table.c.expires_at <= _ago(retention.sweep_grace)))
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
        due = Due(dialect, schema=schema, namespace=namespace, retention=retention)
        # Written into the statement: of a parameter the planner of Postgres does not know that it is small.
        limit = sa.bindparam("limit", type_=sa.Integer, literal_execute=True)

        def some(keys: sa.Select[Any], *, to_delete: bool = False) -> sa.ColumnElement[bool]:
            locked = keys.limit(limit).with_for_update(skip_locked=True, key_share=not to_delete)
            return dialect.is_one_of(table.c.key, locked)

        self.expired = due.expired.limit(limit)
        """The keys of those that `end_expired` takes, unless somebody else is faster."""

        outcome = table.c.key, table.c.revision
        self.give_expiry = (
            None
            if due.without_expiry is None
            else sa.update(table)
            .where(some(due.without_expiry))
            # As if they were used now: while they had no expiry, nobody had to report when they were.
            .values(expires_at=expiry(retention, created_at=table.c.created_at, last_seen_at=StoreClock()))
            .returning(*outcome)
        )
        self.end_expired = (
            sa.update(table)
            .where(some(due.expired))
            .values(ended(sa.literal(EndReason.EXPIRED.value, sa.Text)))
            .returning(*outcome)
        )
        self.remove_tombstones = (
            None
            if due.old_tombstones is None
            else sa.delete(table).where(some(due.old_tombstones, to_delete=True)).returning(*outcome)
        )
