"""The sweep of values that belong to no session, which is part of the sweep of sessions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mcp_session_store.sql.schema.tables import values_table
from mcp_session_store.sql.sessions.sweep import SweepResult, expired_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["ValueSweep"]


class ValueSweep:
    """Statement that removes expired values of a namespace.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the values.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        table = values_table(schema)
        limit = sa.bindparam("value_limit", type_=sa.Integer)
        locked = expired_values(schema=schema, namespace=namespace).limit(limit).with_for_update(skip_locked=True)
        self._remove_expired = dialect.precompiled(
            sa.delete(table).where(dialect.is_one_of(table.c.key, locked)).returning(table.c.key)
        )

    async def remove(self, attempt: Attempt, limits: Sequence[int]) -> list[SweepResult]:
        """Remove at most so many values, for each limit."""
        run, connection = self._dialect.run, attempt.connection
        return [await run(connection, self._remove(limit), writes=True) for limit in limits]

    def _remove(self, limit: int) -> Steps[SweepResult]:
        # Where writers exclude one another, the lock is held by now.
        began = time.monotonic()
        removed = yield self._remove_expired, {"value_limit": limit}
        held_up = time.monotonic() - began if self._dialect.single_writer else 0.0
        return SweepResult(len(removed), len(removed) == limit, held_up)
