"""The running instances: their heartbeats, and the locks that their deaths release."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.records import Heartbeat, instance_name
from mcp_session_store.sql.dialects.functions import StoreClock, driver_value
from mcp_session_store.sql.schema.tables import instances_table

if TYPE_CHECKING:
    from collections.abc import Collection

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Instances"]


class Instances:
    """Statements on instances, their last heartbeats and their locks.

    Args:
        dialect: The database's dialect.
        schema: The schema with the table; the connection's default unless given.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None) -> None:
        table = instances_table(schema)
        name, instance = sa.bindparam("beat_name", type_=sa.Text), sa.bindparam("beat_instance", type_=sa.Text)
        now, epoch = StoreClock(), sa.bindparam("beat_epoch", type_=sa.Text)
        beat = sa.update(table).where(table.c.name == name).values(beat_at=now, lock_epoch=epoch)
        self._beat = beat.returning(table.c.name)
        values: list[sa.ColumnElement[Any]] = [name, instance, now, now, epoch]
        columns = ["name", "instance", "started_at", "beat_at", "lock_epoch"]
        self._dialect = dialect
        self._begin = dialect.insert_if_absent(table, columns, sa.select(*values))
        self._remove = sa.delete(table).where(table.c.name == name)
        self._names = dialect.batch("named", {"name": sa.Text()})
        ago = sa.bindparam("beat_ago", type_=sa.Double)
        # A moment that cannot be read, as after a change by hand, must not hide the heartbeats of others.
        self._last_beats = sa.select(
            table.c.name, driver_value(table.c.beat_at), table.c.lock_epoch, driver_value(now.label("now"))
        ).where(self._names.in_batch(table.c.name))
        self._remove_silent = sa.delete(table).where(table.c.beat_at < StoreClock(-ago))

    async def beat(self, attempt: Attempt, instance: str, *, held: bool) -> None:
        """Record that an instance runs now.

        Args:
            attempt: Its connection is another than the one that holds the lock.
            instance: Id of the instance.
            held: Whether the instance believes that it holds its lock. It is recorded when others see the lock, too.
        """
        name, epoch = instance_name(instance), None
        if held:
            seen = await self._dialect.locks_seen(attempt.connection, [name])
            epoch = seen.epoch if seen.locked.get(name) else None
        parameters = {"beat_name": name, "beat_instance": instance, "beat_epoch": epoch}
        if (await attempt.connection.execute(self._beat, parameters)).first() is None:
            await attempt.connection.execute(self._begin, parameters)

    async def remove(self, attempt: Attempt, name: str) -> None:
        """Record that an instance has stopped."""
        await attempt.connection.execute(self._remove, {"beat_name": name})

    async def last_beats(self, attempt: Attempt, names: Collection[str]) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each instance, by name and without those that are unknown.

        One that cannot be read counts as one of now: the next heartbeat of an instance that lives repairs it.
        """
        parameters = self._names.parameters([(name,) for name in names])
        rows = (await attempt.connection.execute(self._last_beats, parameters)).all()
        # Older versions store no epoch, nor does an instance that can hold nothing.
        epochs = {row.name: row.lock_epoch for row in rows if row.lock_epoch is not None}
        released: set[str] = set()
        if epochs:
            # After the rows, so that a lock that was taken meanwhile is not missed.
            seen = await self._dialect.locks_seen(attempt.connection, epochs)
            # Locks of another epoch have vanished for all at once.
            released = {name for name, locked in seen.locked.items() if not locked and epochs[name] == seen.epoch}
        return {row.name: Heartbeat(ago=self._age(row), released=row.name in released) for row in rows}

    def _age(self, row: Any) -> timedelta:
        try:
            beat_at, now = self._dialect.moments([row.beat_at, row.now])
        except (TypeError, OverflowError):
            return timedelta(0)
        age: timedelta = now - beat_at
        return age

    async def remove_silent(self, attempt: Attempt, silent_for: timedelta) -> None:
        """Remove the instances that have sent no heartbeat for that long."""
        await attempt.connection.execute(self._remove_silent, {"beat_ago": silent_for.total_seconds()})
