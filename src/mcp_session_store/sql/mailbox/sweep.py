"""Removing messages that will not be read, and instances that are long silent."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from mcp_session_store.mailbox import INSTANCE_KEPT, MESSAGE_LIFETIME, MESSAGES_KEPT
from mcp_session_store.sql.dialects.functions import ONE, After, StoreClock
from mcp_session_store.sql.schema.tables import instances_table, messages_table, stream_messages_table
from mcp_session_store.stream_mail import MARK_LIFETIME, STREAM_MESSAGE_LIFETIME

if TYPE_CHECKING:
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["MessageSweep", "SweepLook"]


class SweepLook(NamedTuple):
    """Whether there is anything to remove."""

    messages: bool
    """Messages whose recipient is gone, or has not read them."""
    of_streams: bool
    """Stream messages that no stream took, and marks."""
    instances: bool
    """Instances that are long silent."""


def _any(table: sa.Table, condition: sa.ColumnElement[bool]) -> sa.Exists:
    return sa.select(ONE).select_from(table).where(condition).exists()


class MessageSweep:
    """Statements that remove the messages of all namespaces that will not be read, and long silent instances.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None) -> None:
        messages, instances = messages_table(schema), instances_table(schema)
        has_number = instances.c.number == messages.c.recipient
        may_come_back = instances.c.beat_at > StoreClock(-MESSAGES_KEPT.total_seconds())
        # Its recipient could read it for that long: it has sent a heartbeat after that, and reads before it sends one.
        was_unread = instances.c.beat_at > After(messages.c.created_at, MESSAGE_LIFETIME.total_seconds())
        limit = sa.bindparam("sweep_limit", type_=sa.Integer)
        gone = sa.not_(sa.exists().where(has_number, may_come_back).correlate(messages))
        unread = sa.exists().where(has_number, was_unread).correlate(messages)
        of_stream = stream_messages_table(schema)
        waits, created_at = of_stream.c.body.is_not(None), of_stream.c.created_at
        untaken = waits & (created_at < StoreClock(-STREAM_MESSAGE_LIFETIME.total_seconds()))
        mark = of_stream.c.body.is_(None) & (created_at < StoreClock(-MARK_LIFETIME.total_seconds()))
        silent = instances.c.beat_at < StoreClock(-INSTANCE_KEPT.total_seconds())
        self._look = sa.select(
            sa.or_(_any(messages, gone), _any(messages, unread)).label("messages"),
            sa.or_(_any(of_stream, untaken), _any(of_stream, mark)).label("of_streams"),
            _any(instances, silent).label("instances"),
        )
        self._gone, self._unread, self._untaken, self._marks = (
            sa.delete(table).where(dialect.unlocked(table, condition, limit=limit)).returning(table.c.kind)
            for table, condition in ((messages, gone), (messages, unread), (of_stream, untaken), (of_stream, mark))
        )
        self._silent = sa.delete(instances).where(silent).returning(instances.c.name)

    async def look(self, attempt: Attempt) -> SweepLook:
        """Return what a sweep would find; one statement for all, because most find nothing."""
        return SweepLook(*(await attempt.connection.execute(self._look)).one())

    async def remove_silent(self, attempt: Attempt) -> int:
        """Remove the instances that are long silent, and return how many there were."""
        return len((await attempt.connection.execute(self._silent)).all())

    async def remove_of_streams(self, attempt: Attempt, *, limit: int) -> tuple[Counter[str], bool]:
        """Remove stream messages that no stream took, and marks.

        Returns:
            How many of the former by kind, and whether these were all.
        """
        parameters = {"sweep_limit": limit}
        untaken = Counter((await attempt.connection.execute(self._untaken, parameters)).scalars())
        marks = len((await attempt.connection.execute(self._marks, parameters)).all())
        return untaken, limit not in (untaken.total(), marks)

    async def remove(self, attempt: Attempt, *, limit: int) -> tuple[Counter[str], Counter[str]]:
        """Remove messages whose recipient is gone, and then those that it has not read; return how many by kind."""
        parameters = {"sweep_limit": limit}
        gone = Counter((await attempt.connection.execute(self._gone, parameters)).scalars())
        unread = Counter((await attempt.connection.execute(self._unread, parameters)).scalars())
        return gone, unread
