"""The running instances, by their heartbeats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.records import instance_name
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import instances_table

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import timedelta

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Instances"]


class Instances:
    """Statements on instances and their last heartbeats.

    Args:
        dialect: The database's dialect.
        schema: The schema with the table; the connection's default unless given.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None) -> None:
        table = instances_table(schema)
        name, instance = sa.bindparam("beat_name", type_=sa.Text), sa.bindparam("beat_instance", type_=sa.Text)
        now = StoreClock()
        self._beat = sa.update(table).where(table.c.name == name).values(beat_at=now).returning(table.c.name)
        values: list[sa.ColumnElement[Any]] = [name, instance, now, now]
        columns = ["name", "instance", "started_at", "beat_at"]
        self._begin = dialect.insert_if_absent(table, columns, sa.select(*values))
        self._remove = sa.delete(table).where(table.c.name == name)
        self._names = dialect.batch("named", {"name": sa.Text()})
        ago = sa.bindparam("beat_ago", type_=sa.Double)
        self._last_beats = sa.select(table.c.name, table.c.beat_at, now.label("now")).where(
            self._names.in_batch(table.c.name)
        )
        self._remove_silent = sa.delete(table).where(table.c.beat_at < StoreClock(-ago))

    async def beat(self, attempt: Attempt, instance: str) -> None:
        """Record that an instance runs now."""
        parameters = {"beat_name": instance_name(instance), "beat_instance": instance}
        if (await attempt.connection.execute(self._beat, parameters)).first() is None:
            await attempt.connection.execute(self._begin, parameters)

    async def remove(self, attempt: Attempt, name: str) -> None:
        """Record that an instance has stopped."""
        await attempt.connection.execute(self._remove, {"beat_name": name})

    async def last_beats(self, attempt: Attempt, names: Collection[str]) -> dict[str, timedelta]:
        """Return how long ago each instance sent a heartbeat, by name and without those that are unknown."""
        parameters = self._names.parameters([(name,) for name in names])
        rows = await attempt.connection.execute(self._last_beats, parameters)
        return {row.name: row.now - row.beat_at for row in rows}

    async def remove_silent(self, attempt: Attempt, silent_for: timedelta) -> None:
        """Remove the instances that have sent no heartbeat for that long."""
        await attempt.connection.execute(self._remove_silent, {"beat_ago": silent_for.total_seconds()})
