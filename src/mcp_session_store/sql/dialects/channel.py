"""LISTEN and NOTIFY of Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.dml import ReturningUpdate

__all__ = ["HintChannel"]


class HintChannel:
    """How clients of a database tell each other at once that something changed: LISTEN and NOTIFY of Postgres.

    All of a database share it, whatever their namespace and schema.

    Args:
        name: The channel's.
    """

    _MAX_KEYS: Final = 200
    """Keys that one notification tells of: a payload may have 8000 bytes ("NOTIFY" in the manual)."""
    ANY: Final = "*"
    """The payload that stands for more keys than one has room for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.send: Final = sa.select(sa.func.pg_notify(name, sa.bindparam("payload", type_=sa.Text)))
        """Sends a payload."""

    def notification(self, key: sa.ColumnElement[UUID]) -> sa.Select[Any]:
        """Tells, with the commit, of the keys that the caller selects; of none, nothing is told.

        One notification at most: each takes a lock on the whole server.
        """
        keys = sa.func.string_agg(sa.cast(key, sa.Text), ",")
        payload = sa.case((sa.func.count() <= self._MAX_KEYS, keys), else_=self.ANY)
        return sa.select(sa.func.pg_notify(self._name, payload).label("sent")).having(sa.func.count() > 0)

    def sent_with(self, change: ReturningUpdate[Any]) -> sa.Select[Any]:
        """A statement that makes a change, tells of its keys with the commit, and returns what the change returns."""
        changed = change.cte("changed")
        sent = self.notification(changed.c.key).select_from(changed).cte("sent")
        # Joined, because a SELECT in WITH that nobody reads does not run.
        return sa.select(*changed.c).select_from(changed.join(sent, sa.true()))

    async def subscribe(
        self, connection: AsyncConnection, *, on_payload: Callable[[str], None], on_loss: Callable[[], None]
    ) -> None:
        """Receive what is sent, on a connection that does nothing else, until it is closed.

        Args:
            connection: To a database of this kind.
            on_payload: Called with each payload that arrives.
            on_loss: Called when the connection is lost or closed.
        """
        pooled: Any = await connection.get_raw_connection()
        driver = pooled.dbapi_connection.driver_connection
        driver.add_termination_listener(lambda _: on_loss())
        # asyncpg prepares the statement first: within a transaction a pooler keeps both on one server connection.
        async with driver.transaction():
            await driver.add_listener(self._name, lambda _connection, _pid, _channel, payload: on_payload(payload))
