"""Removing messages that will not be read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mcp_session_store.mailbox import MESSAGE_LIFETIME, MESSAGES_KEPT
from mcp_session_store.sql.dialects.functions import After, StoreClock
from mcp_session_store.sql.schema.tables import instances_table, messages_table, stream_messages_table
from mcp_session_store.stream_mail import MARK_LIFETIME, STREAM_MESSAGE_LIFETIME

if TYPE_CHECKING:
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["MessageSweep"]


class MessageSweep:
    """Statements that remove the messages of all namespaces that will not be read.

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
        self._gone, self._unread = (
            sa.delete(messages).where(dialect.unlocked(messages, condition, limit=limit)).returning(messages.c.kind)
            for condition in (
                sa.not_(sa.exists().where(has_number, may_come_back).correlate(messages)),
                sa.exists().where(has_number, was_unread).correlate(messages),
            )
        )
        of_stream = stream_messages_table(schema)
        waits, created_at = of_stream.c.body.is_not(None), of_stream.c.created_at
        untaken = waits & (created_at < StoreClock(-STREAM_MESSAGE_LIFETIME.total_seconds()))
        mark = of_stream.c.body.is_(None) & (created_at < StoreClock(-MARK_LIFETIME.total_seconds()))
        self._untaken, self._marks = (
            sa.delete(of_stream).where(dialect.unlocked(of_stream, condition, limit=limit)).returning(of_stream.c.kind)
            for condition in (untaken, mark)
        )

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
