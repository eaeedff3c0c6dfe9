"""What tailing a stream needs beside its events: the newest sequences, and notifications of new events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.notifications import EVENT_CHANNEL
from mcp_session_store.sql.schema.tables import logs_table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
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
        logs = logs_table(schema)
        of_namespace = Unindexed(logs.c.namespace) == sa.literal(namespace, sa.Text)
        self._heads = dialect.batch("head", {"key": sa.Uuid()})
        self._head = dialect.precompiled(
            sa.select(logs.c.key, logs.c.sequence).where(self._heads.in_batch(logs.c.key), of_namespace)
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
        heads = await self._dialect.run(attempt.connection, self._heads_of(set().union(*calls)), writes=False)
        return [{key: heads[key] for key in keys if key in heads} for keys in calls]

    def _heads_of(self, keys: Collection[UUID]) -> Steps[dict[UUID, int]]:
        by_driver_key = {self._dialect.driver_key(key): key for key in keys}
        rows = yield self._head, self._heads.parameters([(key,) for key in by_driver_key])
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
