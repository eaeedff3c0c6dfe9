"""Statements on the records of sessions, and the conditions that other statements share with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.sql.dialects.functions import MOMENT, After, ArrivalClock, StoreClock, TextsByName, Unindexed
from mcp_session_store.sql.notifications import SESSION_CHANNEL
from mcp_session_store.sql.schema.tables import logs_table, sessions_table, state_table, stream_messages_table
from mcp_session_store.stream_mail import STREAM_WAIT

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["SessionStatements", "ended", "expiry", "live", "locked", "notify"]

_KEY: Final[dict[str, TypeEngine[Any]]] = {"key": sa.Uuid()}
_CREATED: Final = (
    "key",
    "initialize_params",
    "protocol_version",
    "client_name",
    "client_version",
    "principal_digest",
    "principal_display",
    "instance_hint",
)
"""Columns whose values come with a new session."""


def live(
    table: sa.Table, namespace: sa.ColumnElement[str], moment: sa.ColumnElement[datetime], *, by_key: bool = True
) -> sa.ColumnElement[bool]:
    """Return the condition that a session is of a namespace, has not ended, and had not expired at a moment.

    Args:
        table: The table of sessions.
        namespace: The namespace.
        moment: A time by the database's clock.
        by_key: Whether the statement finds the sessions by their keys alone.
    """
    column: Callable[[sa.Column[Any]], sa.ColumnElement[Any]] = Unindexed if by_key else lambda column: column
    return sa.and_(
        column(table.c.namespace) == namespace,
        column(table.c.ended_at).is_(None),
        sa.or_(table.c.expires_at.is_(None), moment < table.c.expires_at),
    )


def expiry(
    retention: RetentionPolicy, *, created_at: sa.ColumnElement[datetime], last_seen_at: sa.ColumnElement[datetime]
) -> sa.ColumnElement[Any]:
    """Return when a session that was used expires by a policy: `RetentionPolicy.expiry` in SQL."""
    if retention.idle is None and retention.absolute is None:
        return sa.null()
    if retention.idle is None or retention.absolute is None:
        limit, moment = (retention.absolute, created_at) if retention.idle is None else (retention.idle, last_seen_at)
        assert limit is not None
        return After(moment, limit.total_seconds())
    idle = After(last_seen_at, retention.idle.total_seconds())
    absolute = After(created_at, retention.absolute.total_seconds())
    return sa.case((idle < absolute, idle), else_=absolute)


def locked(sessions: sa.Table, key: sa.ColumnElement[Any], condition: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Select one session, if it fulfils a condition, and lock it until the end of the transaction."""
    selected = sa.select(sessions.c.key).where(sessions.c.key == key, condition)
    return selected.with_for_update(of=sessions, key_share=True)


def ended(reason: sa.ColumnElement[str]) -> dict[str, Any]:
    """Return the values that end a session. Its params are removed, because a tombstone has no use for them."""
    return {
        "ended_at": StoreClock(),
        "end_reason": reason,
        "initialize_params": "",
        "state_values": sa.literal(0, sa.Integer),
        "state_bytes": sa.literal(0, sa.BigInteger),
    }


def notify(dialect: Dialect, change: ReturningUpdate[Any]) -> sa.Select[Any] | ReturningUpdate[Any]:
    """Return a change that notifies other instances where the database supports that.

    Args:
        dialect: The database's dialect.
        change: The change, which returns the session's key first.
    """
    return SESSION_CHANNEL.with_notification(change) if dialect.has_notifications else change


# Each statement is one object and not made for each call, because SQLAlchemy keeps with a statement the key under
# which it finds the compiled one in its cache.


class SessionStatements:
    """Statements on the records of the sessions of one namespace.

    Those that change several rows lock them first, one after the other in the order of their batch, which is the
    order of their keys: two instances that change the same sessions wait for each other, but never in a circle.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace that all statements are limited to.
        retention: The policy by which sessions expire.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, retention: RetentionPolicy) -> None:
        self._dialect = dialect
        self._retention = retention
        self._namespace = sa.literal(namespace, sa.Text)
        table = self._table = sessions_table(schema)
        self._state = state_table(schema)

        self.record: Final = self._record()
        """Columns of a record, in the order that `read_record` expects."""
        self.creates = dialect.batch("created", {column: table.c[column].type for column in _CREATED})
        self.create = dialect.precompiled(self._creation())
        self.loads = dialect.batch("loaded", _KEY)
        self.load = dialect.precompiled(
            sa.select(
                *self.record,
                StoreClock().label("loaded_at"),
                self._newest_event(logs_table(schema)),
                self._watched(),
                self._absence(),
            ).where(self.loads.in_batch(table.c.key), Unindexed(table.c.namespace) == self._namespace)
        )
        self.claims = dialect.batch("claimed", {"key": sa.Uuid(), "instance": sa.Text(), "restores": sa.Integer()})
        self.claim = dialect.precompiled(self._claim())
        self.watches = dialect.batch("claimed", _KEY)
        self.watched = dialect.precompiled(self._watched_of_claimed())
        self.replace_initialize = self._replacement()
        self.touches = dialect.batch(
            "touched",
            {
                "key": sa.Uuid(),
                "first_age": sa.Double(),
                "last_age": sa.Double(),
                "instance": sa.Text(),
                "restores": sa.Integer(),
                "used": sa.Integer(),
                "stream_number": sa.Integer(),
                "stream_age": sa.Double(),
                "stream_term": sa.Integer(),
            },
        )
        self.touch = dialect.precompiled(self._touch())
        self.holders = dialect.batch("held", _KEY)
        self.find_holders = dialect.precompiled(self._holders(stream_messages_table(schema)))
        self.until = dialect.precompiled(sa.select(StoreClock()))
        self.changes = dialect.precompiled(self._changes())

    def _creation(self) -> ReturningInsert[Any]:
        table, now = self._table, StoreClock()
        given = {column.name: column for column in self.creates.c}
        values = given | {
            "namespace": self._namespace,
            "created_at": now,
            "last_seen_at": now,
            "expires_at": StoreClock(self._retention.new_session_lifetime.total_seconds()),
            "restores": sa.literal(0, sa.Integer),
            "revision": sa.literal(0, sa.Integer),
        }
        insert = self._dialect.insert_if_absent(table, list(values), sa.select(*values.values()))
        return insert.returning(table.c.key, table.c.created_at, table.c.last_seen_at, table.c.expires_at)

    def _record(self) -> tuple[sa.Column[Any], ...]:
        c = self._table.c
        return (
            c.key,
            c.namespace,
            c.initialize_params,
            c.protocol_version,
            c.client_name,
            c.client_version,
            c.principal_digest,
            c.principal_display,
            c.instance_hint,
            c.restores,
            c.revision,
            c.created_at,
            c.last_seen_at,
            c.expires_at,
        )

    def _claim(self) -> ReturningUpdate[Any]:
        table, now = self._table, StoreClock()
        claimed = self.claims.matching(lambda claimed: locked(table, claimed.key, self._live(now))).cte("locked")
        return (
            sa.update(table)
            .where(self.claims.joined_on(table.c.key, claimed))
            .values(
                instance_hint=claimed.c.instance,
                restores=self._counted(claimed),
                last_seen_at=now,
                expires_at=expiry(self._retention, created_at=table.c.created_at, last_seen_at=now),
            )
            # In the order of a load; when it was loaded, and the newest event, a claim does not say. SQLite takes the
            # columns of a subquery here for those of the changed row, so that watched values are read after it.
            .returning(*self.record, sa.null(), sa.null(), table.c.state_values)
        )

    def _counted(self, claimed: sa.CTE) -> sa.ColumnElement[int]:
        """Return the number of restores after a claim: no fewer than it names, and one more by another instance."""
        c = self._table.c
        counted = c.restores + sa.case((c.instance_hint != claimed.c.instance, 1), else_=0)
        return sa.case((counted < claimed.c.restores, claimed.c.restores), else_=counted)

    def _replacement(self) -> sa.Select[Any] | ReturningUpdate[Any]:
        table, now = self._table, StoreClock()
        return notify(
            self._dialect,
            sa.update(table)
            .where(table.c.key == sa.bindparam("replaced_key", type_=sa.Uuid), self._live(now))
            .values(
                initialize_params=sa.bindparam("replaced_params"),
                protocol_version=sa.bindparam("replaced_protocol_version"),
                client_name=sa.bindparam("replaced_client_name"),
                client_version=sa.bindparam("replaced_client_version"),
                revision=table.c.revision + 1,
                changed_at=now,
            )
            .returning(table.c.key),
        )

    def _touch(self) -> ReturningUpdate[Any]:
        table = self._table
        # Ages count back from the arrival of the report, so that waiting for a lock makes no session older.
        touched = self.touches.matching(
            lambda touched: locked(table, touched.key, self._live(ArrivalClock(-touched.first_age)))
        ).cte("locked")
        last = ArrivalClock(-touched.c.last_age)
        seen = sa.case(((touched.c.used == 1) & (table.c.last_seen_at < last), last), else_=table.c.last_seen_at)
        return (
            sa.update(table)
            .where(self.touches.joined_on(table.c.key, touched))
            .values(
                # Both stay as they are where the activity is no claim, whose instance is NULL.
                instance_hint=sa.func.coalesce(touched.c.instance, table.c.instance_hint),
                restores=self._counted(touched),
                last_seen_at=seen,
                expires_at=sa.case(
                    (
                        touched.c.used == 1,
                        expiry(self._retention, created_at=table.c.created_at, last_seen_at=seen),
                    ),
                    else_=table.c.expires_at,
                ),
                **self._claimed_stream(touched),
            )
            # A report may arrive so late that the session has expired again; and none extends the absolute limit.
            .returning(table.c.key, table.c.expires_at, StoreClock().label("now"))
        )

    def _claimed_stream(self, touched: sa.CTE) -> dict[str, sa.ColumnElement[Any]]:
        """Return the columns about the stream after its claim, if it is claimed; see `SessionStore.touch`."""
        c, number, term = self._table.c, touched.c.stream_number, touched.c.stream_term
        # NULL where nothing is claimed.
        opened_at = ArrivalClock(-touched.c.stream_age)
        is_first = number.is_not(None) & c.stream_holder.is_(None)
        is_later = c.stream_opened_at < opened_at
        is_taken = (c.stream_holder != number) & (term == 0) & is_later
        is_renamed = c.stream_term == term
        return {
            "stream_holder": sa.case((is_first | is_taken | is_renamed, number), else_=c.stream_holder),
            "stream_term": sa.case((is_first | is_taken, sa.func.coalesce(c.stream_term, 0) + 1), else_=c.stream_term),
            "stream_former": sa.case((is_taken, c.stream_holder), else_=c.stream_former),
            "stream_opened_at": sa.case(
                (is_first | is_taken | ((c.stream_holder == number) & is_later), opened_at), else_=c.stream_opened_at
            ),
        }

    def _holders(self, messages: sa.Table) -> sa.Select[Any]:
        """Select who has the streams of sessions, and whether messages wait for them."""
        c = self._table.c
        waits = sa.exists().where(
            messages.c.key == c.key,
            messages.c.body.is_not(None),
            messages.c.created_at > StoreClock(-STREAM_WAIT.total_seconds()),
        )
        waiting = waits.correlate(self._table)
        return sa.select(c.key, c.stream_holder, c.stream_term, c.stream_former, waiting).where(
            self.holders.in_batch(c.key), c.stream_holder.is_not(None)
        )

    def _changes(self) -> sa.Select[Any]:
        table = self._table
        # Joined to the clock, so that the time is returned when nothing changed, too.
        clock = sa.select(StoreClock().label("until")).subquery("clock")
        changed = (table.c.namespace == self._namespace) & (
            table.c.changed_at >= sa.bindparam("changed_since", type_=MOMENT)
        )
        return sa.select(clock.c.until, table.c.key, table.c.revision, table.c.end_reason).select_from(
            clock.outerjoin(table, changed)
        )

    def _newest_event(self, logs: sa.Table) -> sa.ColumnElement[int]:
        """Return the sequence of a session's newest event, 0 without a log."""
        # A log has the namespace of its session.
        newest = sa.select(logs.c.sequence).where(logs.c.key == self._table.c.key).scalar_subquery()
        return sa.func.coalesce(newest, 0).label("newest_event")

    def _watched(self) -> sa.ColumnElement[str | None]:
        """Return the watched values of a session's state as a JSON object of texts, at no cost without state."""
        c = self._state.c
        watched = sa.select(TextsByName(c.name, c.value)).where(c.key == self._table.c.key, self._is_watched())
        return sa.case((self._table.c.state_values > 0, watched.scalar_subquery())).label("watched")

    def _watched_of_claimed(self) -> sa.Select[Any]:
        c = self._state.c
        watched = sa.select(c.key, TextsByName(c.name, c.value))
        return watched.where(self.watches.in_batch(c.key), self._is_watched()).group_by(c.key)

    def _is_watched(self) -> sa.ColumnElement[bool]:
        c = self._state.c
        not_over = sa.or_(c.expires_at.is_(None), StoreClock() < c.expires_at)
        return sa.and_(c.watched == sa.literal(1, sa.Integer), not_over)

    def _absence(self) -> sa.ColumnElement[Any]:
        """Return NULL for a live session, and else why it is not live: the reason of its end, or that it expired."""
        return sa.case(
            (self._live(StoreClock()), sa.null()),
            else_=sa.func.coalesce(self._table.c.end_reason, EndReason.EXPIRED.value),
        ).label("absence")

    def _live(self, moment: sa.ColumnElement[datetime]) -> sa.ColumnElement[bool]:
        return live(self._table, self._namespace, moment)
