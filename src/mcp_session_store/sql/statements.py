"""The SQL of the session store: every statement, built once for each store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.retention import NEW_SESSION_LIFETIME
from mcp_session_store.sql.dialects import StoreClock
from mcp_session_store.sql.tables import sessions_table

if TYPE_CHECKING:
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.sql.dialects import Dialect

__all__ = ["SessionStatements"]

_KEY: Final[dict[str, TypeEngine[Any]]] = {"key": sa.Uuid()}

# One object for each statement, and not one for each call: SQLAlchemy remembers with a statement what it
# needs to find it in its cache of compiled ones.


class SessionStatements:
    """The statements on the table of sessions of one namespace.

    Those that change several rows lock them in the order of their keys first: two instances that
    change the same sessions then wait for each other, and never in a circle.

    Args:
        dialect: The database they are for.
        schema: Where the tables are; the connection's default unless given.
        namespace: To which all statements are limited.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        table = self._table = sessions_table(schema)
        self._namespace = sa.literal(namespace, sa.Text)
        now = StoreClock()
        # In the order of the fields that `_record` in `session_store` expects.
        record = (
            table.c.key,
            table.c.namespace,
            table.c.initialize_params,
            table.c.protocol_version,
            table.c.client_name,
            table.c.client_version,
            table.c.principal_digest,
            table.c.principal_display,
            table.c.instance_hint,
            table.c.created_at,
            table.c.last_seen_at,
            table.c.expires_at,
            table.c.restores,
            table.c.revision,
        )

        self.creates = dialect.batch(
            "created",
            {
                column: table.c[column].type
                for column in (
                    "key",
                    "initialize_params",
                    "protocol_version",
                    "client_name",
                    "client_version",
                    "principal_digest",
                    "principal_display",
                    "instance_hint",
                )
            },
        )
        given = {column.name: column for column in self.creates.c}
        values = given | {
            "namespace": self._namespace,
            "created_at": now,
            "last_seen_at": now,
            "expires_at": StoreClock(NEW_SESSION_LIFETIME.total_seconds()),
            "restores": sa.literal(0, sa.Integer),
            "revision": sa.literal(0, sa.Integer),
        }
        self.create = dialect.insert_if_absent(table, list(values), sa.select(*values.values())).returning(
            table.c.key, table.c.created_at, table.c.last_seen_at, table.c.expires_at
        )

        self.loads = dialect.batch("loaded", _KEY)
        self.load = sa.select(*record).where(self.loads.among(table.c.key), self._live(now))

        self.claims = dialect.batch("claimed", {"key": sa.Uuid(), "instance": sa.Text(), "restores": sa.Integer()})
        claimed = (
            sa.select(*self.claims.c)
            .join(table, table.c.key == self.claims.c.key)
            .where(self.claims.among(table.c.key), self._live(now))
            .order_by(table.c.key)
            .with_for_update(of=table, key_share=True)
            .cte("locked")
        )
        counted_already = (table.c.instance_hint == claimed.c.instance) & (table.c.restores > claimed.c.restores)
        self.claim = (
            sa.update(table)
            .where(table.c.key == claimed.c.key, self.claims.among(table.c.key))
            .values(
                instance_hint=claimed.c.instance,
                restores=table.c.restores + sa.case((counted_already, 0), else_=1),
                last_seen_at=now,
                expires_at=sa.null(),
            )
            .returning(*record)
        )

        self.replace_initialize = (
            sa.update(table)
            .where(table.c.key == sa.bindparam("replaced_key", type_=sa.Uuid), self._live(now))
            .values(
                initialize_params=sa.bindparam("replaced_params"),
                protocol_version=sa.bindparam("replaced_protocol_version"),
                client_name=sa.bindparam("replaced_client_name"),
                client_version=sa.bindparam("replaced_client_version"),
                revision=table.c.revision + 1,
            )
            .returning(table.c.key)
        )

        self.touches = dialect.batch("touched", {"key": sa.Uuid(), "first_age": sa.Double(), "last_age": sa.Double()})
        touched = (
            sa.select(*self.touches.c)
            .join(table, table.c.key == self.touches.c.key)
            .where(self.touches.among(table.c.key), self._live(StoreClock(-self.touches.c.first_age)))
            .order_by(table.c.key)
            .with_for_update(of=table, key_share=True)
            .cte("locked")
        )
        last = StoreClock(-touched.c.last_age)
        self.touch = (
            sa.update(table)
            .where(table.c.key == touched.c.key, self.touches.among(table.c.key))
            .values(
                last_seen_at=sa.case((table.c.last_seen_at < last, last), else_=table.c.last_seen_at),
                expires_at=sa.null(),
            )
            .returning(table.c.key)
        )

        self.ends = dialect.batch("ended", {"key": sa.Uuid(), "reason": sa.Text()})
        ended = (
            sa.select(*self.ends.c)
            .join(table, table.c.key == self.ends.c.key)
            .where(self.ends.among(table.c.key), self._live(now))
            .order_by(table.c.key)
            .with_for_update(of=table, key_share=True)
            .cte("locked")
        )
        self.end = (
            sa.update(table)
            .where(table.c.key == ended.c.key, self.ends.among(table.c.key))
            .values(ended_at=now, end_reason=ended.c.reason)
            .returning(table.c.key)
        )
        self.ended_for_that_reason = sa.select(table.c.key).join(
            self.ends.rows,
            sa.and_(
                table.c.key == self.ends.c.key,
                self.ends.among(table.c.key),
                table.c.namespace == self._namespace,
                table.c.end_reason == self.ends.c.reason,
            ),
        )

    def _live(self, moment: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """That a session is of this namespace, has not ended, and had not expired at a moment."""
        table = self._table
        return sa.and_(
            table.c.namespace == self._namespace,
            table.c.ended_at.is_(None),
            sa.or_(table.c.expires_at.is_(None), moment < table.c.expires_at),
        )
