"""The running instances: their heartbeats and numbers, and the locks that their deaths release."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.mailbox import RunningInstance
from mcp_session_store.records import Heartbeat, instance_name
from mcp_session_store.sql.dialects.functions import StoreClock, driver_value
from mcp_session_store.sql.schema.tables import instances_table, messages_table
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mcp_session_store.mailbox import Presence
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Instances"]


class _NumberTakenError(Exception):
    """Another instance has the number."""


class Instances:
    """Statements on instances, their last heartbeats, numbers and locks.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: Namespace in which instances are sent messages.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        table, messages = instances_table(schema), messages_table(schema)
        given = {name: sa.bindparam(f"beat_{name}", type_=table.c[name].type) for name in _GIVEN}
        now, in_namespace = StoreClock(), sa.literal(namespace, sa.Text)
        same = (
            table.c.name == given["name"],
            table.c.number.is_not_distinct_from(given["number"]),
            table.c.namespace == in_namespace,
        )
        changing = {name: given[name] for name in _GIVEN if name not in ("name", "instance", "number")}
        # The number is not set where it is the same, so that no index is written.
        self._beat = sa.update(table).where(*same).values(beat_at=now, **changing).returning(table.c.name)
        self._remove = (
            sa.delete(table).where(table.c.name == given["name"]).returning(table.c.number, table.c.started_at)
        )
        started_at = sa.func.coalesce(
            sa.bindparam("beat_started_at", type_=table.c.started_at.type), now, type_=table.c.started_at.type
        )
        values = {**given, "namespace": in_namespace, "started_at": started_at, "beat_at": now}
        inserted = dialect.insert_if_absent(table, list(values), sa.select(*values.values()))
        self._begin = inserted.returning(table.c.name)
        self._remove_messages = sa.delete(messages).where(messages.c.recipient == given["number"])
        self._names = dialect.batch("named", {"name": sa.Text()})
        # A moment that cannot be read, as after a change by hand, must not hide the heartbeats of others.
        beats = sa.select(
            table.c.name, driver_value(table.c.beat_at), table.c.lock_epoch, driver_value(now.label("now"))
        )
        self._last_beats = beats.where(self._names.in_batch(table.c.name))
        waiting = sa.select(sa.func.count()).where(messages.c.recipient == table.c.number).scalar_subquery()
        self._list = (
            beats.add_columns(
                table.c.instance,
                table.c.number,
                table.c.server,
                table.c.version,
                table.c.residents,
                table.c.streams,
                table.c.started_at,
                waiting.label("waiting"),
            )
            .where(sa.or_(table.c.namespace == in_namespace, table.c.namespace.is_(None)))
            .order_by(table.c.started_at, table.c.name)
        )

    async def beat(self, attempt: Attempt, presence: Presence, *, held: bool) -> bool:
        """Record that an instance runs now; return False where another has its number.

        Args:
            attempt: Its connection is another than the one that holds the lock.
            presence: What the instance says of itself.
            held: Whether the instance believes that it holds its lock. It is recorded when others see the lock, too.
        """
        name, epoch = instance_name(presence.instance), None
        if held:
            seen = await self._dialect.locks_seen(attempt.connection, [name])
            epoch = seen.epoch if seen.locked.get(name) else None
        parameters: dict[str, object] = {
            "beat_name": name,
            "beat_instance": presence.instance,
            "beat_lock_epoch": epoch,
            "beat_number": presence.number,
            "beat_server": presence.server,
            "beat_version": presence.version,
            "beat_residents": presence.residents,
            "beat_streams": presence.streams,
        }
        if (await attempt.connection.execute(self._beat, parameters)).first() is not None:
            return True
        return await self._register(attempt, parameters)

    async def _register(self, attempt: Attempt, parameters: dict[str, object]) -> bool:
        """Record an instance that is new, or has drawn another number. Its mailbox is empty then."""
        connection = attempt.connection
        try:
            async with transaction(connection, self._dialect):
                before = (await connection.execute(self._remove, parameters)).first()
                parameters["beat_started_at"] = None if before is None else before.started_at
                if (await connection.execute(self._begin, parameters)).first() is None:
                    raise _NumberTakenError
                if parameters["beat_number"] is not None and (
                    before is None or before.number != parameters["beat_number"]
                ):
                    # What was for an instance that had the number before.
                    await connection.execute(self._remove_messages, parameters)
        except _NumberTakenError:
            return False
        return True

    async def remove(self, attempt: Attempt, name: str) -> None:
        """Record that an instance has stopped, and remove what waits for it."""
        async with transaction(attempt.connection, self._dialect):
            before = (await attempt.connection.execute(self._remove, {"beat_name": name})).first()
            if before is not None and before.number is not None:
                await attempt.connection.execute(self._remove_messages, {"beat_number": before.number})

    async def last_beats(self, attempt: Attempt, names: Collection[str]) -> dict[str, Heartbeat]:
        """Return the last heartbeat of each instance, by name and without those that are unknown."""
        parameters = self._names.parameters([(name,) for name in names])
        return await self._heartbeats(attempt, (await attempt.connection.execute(self._last_beats, parameters)).all())

    async def _heartbeats(self, attempt: Attempt, rows: Sequence[Any]) -> dict[str, Heartbeat]:
        """Return heartbeats by name. One that cannot be read counts as one of now, because the next one repairs it."""
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

    async def running(self, attempt: Attempt) -> list[RunningInstance]:
        """Return the instances of the namespace, the oldest first, and those whose version stores no namespace."""
        rows = (await attempt.connection.execute(self._list)).all()
        beats = await self._heartbeats(attempt, rows)
        return [
            RunningInstance(
                instance=row.instance,
                number=row.number,
                server=row.server or "",
                version=row.version or "",
                residents=row.residents or 0,
                streams=row.streams or 0,
                started_at=row.started_at,
                heartbeat=beats[row.name],
                waiting=row.waiting,
            )
            for row in rows
        ]


_GIVEN = ("name", "instance", "lock_epoch", "number", "server", "version", "residents", "streams")
"""Columns whose values come with a heartbeat."""
