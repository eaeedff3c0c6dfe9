"""LISTEN and NOTIFY of Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.dml import ReturningUpdate

__all__ = ["NotificationChannel"]


class NotificationChannel:
    """Channel through which clients of a database notify one another at once that sessions have changed.

    All clients of a database share it, whatever their namespace and schema.

    Args:
        name: Name of the channel.
    """

    _MAX_KEYS: Final = 200
    """Number of keys in one notification at most, because a payload has at most 8000 bytes ("NOTIFY" in the manual)."""
    ANY: Final = "*"
    """Payload that stands for more keys than fit."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.send: Final = sa.select(sa.func.pg_notify(name, sa.bindparam("payload", type_=sa.Text)))
        """Statement that sends a payload."""

    def notify(self, key: sa.ColumnElement[UUID]) -> sa.Select[Any]:
        """Return a query that notifies, with the commit, of the keys that the caller selects, if there are any.

        It sends at most one notification, because each takes a lock on the whole server.
        """
        keys = sa.func.string_agg(sa.cast(key, sa.Text), ",")
        payload = sa.case((sa.func.count() <= self._MAX_KEYS, keys), else_=self.ANY)
        return sa.select(sa.func.pg_notify(self.name, payload).label("sent")).having(sa.func.count() > 0)

    @staticmethod
    def notify_each(prefix: str, recipient: sa.ColumnElement[int]) -> sa.Select[Any]:
        """Return a query that notifies, with the commit, on a channel of each recipient's own, once each.

        Args:
            prefix: Name of the channels, without the recipient's number.
            recipient: Numbers that the caller selects.
        """
        name = sa.literal(prefix, sa.Text) + sa.cast(recipient, sa.Text)
        return sa.select(sa.func.pg_notify(name, sa.literal("", sa.Text)).label("sent")).group_by(recipient)

    def with_notification(self, change: ReturningUpdate[Any]) -> sa.Select[Any]:
        """Return a statement that makes a change, notifies of its keys with the commit, and returns its columns."""
        changed = change.cte("changed")
        sent = self.notify(changed.c.key).select_from(changed).cte("sent")
        # Joined, because a SELECT in WITH whose result is not read does not run.
        return sa.select(*changed.c).select_from(changed.join(sent, sa.true()))

    async def listen(
        self, connection: AsyncConnection, *, on_payload: Callable[[str], None], on_loss: Callable[[], None]
    ) -> Callable[[], Awaitable[None]]:
        """Receive payloads on a connection that is used for nothing but to listen, until it is closed.

        Args:
            connection: Connection to Postgres.
            on_payload: Called with each payload that arrives.
            on_loss: Called when the connection is lost or closed.

        Returns:
            What ends that before the connection is closed.
        """

        def receive(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            on_payload(str(payload))

        def lose(_connection: object) -> None:
            on_loss()

        async def stop() -> None:
            driver.remove_termination_listener(lose)
            await driver.remove_listener(self.name, receive)

        pooled: Any = await connection.get_raw_connection()
        driver = pooled.dbapi_connection.driver_connection
        driver.add_termination_listener(lose)
        # asyncpg prepares the statement first: within a transaction a pooler keeps both on one server connection.
        async with driver.transaction():
            await driver.add_listener(self.name, receive)
        return stop
