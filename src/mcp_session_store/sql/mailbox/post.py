"""Posting messages: one statement for all that are posted at the time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from mcp_session_store.mailbox import HOLDER, SILENT_AFTER
from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.notifications import MAIL_CHANNELS
from mcp_session_store.sql.schema.tables import instances_table, messages_table, sessions_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.mailbox import NewMessage
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Post", "PostStatements"]

_POSTED = ("sender", "sequence", "key", "kind", "bytes", "body")
"""Columns whose values come with a message, but for the recipient."""


class Post(NamedTuple):
    """Messages that are stored together."""

    messages: Sequence[NewMessage]
    sizes: Sequence[int]
    """Bytes of each message's body."""
    size: int
    """Bytes of all bodies."""


class PostStatements:
    """Statements that store messages for the running instances of one namespace.

    What is stored already is left as it is. So a post may be repeated, whether it took effect or not: on Postgres, one
    that is still under way on the server is waited for, because both insert the same keys.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the instances.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        self._instances, self._messages = instances_table(schema), messages_table(schema)
        sessions = sessions_table(schema)
        self._of_session = sessions, Unindexed(sessions.c.namespace) == sa.literal(namespace, sa.Text)
        c = self._instances.c
        self._is_running = sa.and_(
            c.namespace == sa.literal(namespace, sa.Text),
            c.number.is_not(None),
            c.beat_at > StoreClock(-SILENT_AFTER.total_seconds()),
        )
        columns = self._messages.c
        if dialect.changes_in_with:
            self._posted = dialect.batch("posted", {name: columns[name].type for name in ("recipient", *_POSTED)})
            self._asked = dialect.batch("asked", {"number": sa.Integer()})
            self._store = dialect.precompiled(self._store_statement())
            self._post = self._post_at_once
        else:
            self._running = dialect.precompiled(sa.select(c.number).where(self._is_running))
            self._keys = dialect.batch("hinted", {"key": sa.Uuid()})
            self._holders = dialect.precompiled(
                sa.select(sessions.c.key, sessions.c.stream_holder).where(
                    self._keys.in_batch(sessions.c.key), self._of_session[1]
                )
            )
            given = {name: sa.bindparam(f"new_{name}", type_=columns[name].type) for name in ("recipient", *_POSTED)}
            values = given | {"created_at": StoreClock()}
            self._store_row = dialect.precompiled(
                dialect.insert_if_absent(self._messages, list(values), sa.select(*values.values()))
            )
            self._post = self._post_row_by_row

    def _store_statement(self) -> sa.Select[tuple[int]]:
        """Build the statement that stores messages, notifies their recipients, and returns which of those run."""
        posted, number = self._posted.c, self._instances.c.number
        sessions, in_namespace = self._of_session
        holder = sa.select(sessions.c.stream_holder).where(sessions.c.key == posted.key, in_namespace)
        is_holder = (posted.recipient == HOLDER) & (number == holder.scalar_subquery())
        is_for = sa.or_(number == posted.recipient, posted.recipient.is_(None), is_holder) & (number != posted.sender)
        values = {"recipient": number, **{name: posted[name] for name in _POSTED}, "created_at": StoreClock()}
        rows = sa.select(*values.values()).join_from(self._posted.rows, self._instances, is_for).where(self._is_running)
        stored = self._dialect.insert_if_absent(self._messages, list(values), rows)
        changed = stored.returning(self._messages.c.recipient).cte("stored")
        sent = NotificationChannel.notify_each(MAIL_CHANNELS, changed.c.recipient).cte("sent")
        # Joined, because a SELECT in WITH whose result is not read does not run.
        notified = sa.select(sa.func.count().label("recipients")).select_from(sent).subquery("notified")
        is_asked_for = sa.and_(self._asked.in_batch(number), self._is_running)
        return sa.select(number, notified.c.recipients).select_from(notified.outerjoin(self._instances, is_asked_for))

    async def post(self, attempt: Attempt, posts: Sequence[Post]) -> list[set[int]]:
        """Store messages, and return the recipients of each post that are not running."""
        messages = [row for post in posts for row in zip(post.messages, post.sizes, strict=True)]
        running: set[int] = set()
        if messages:
            running = await self._dialect.run(attempt.connection, self.steps(messages), writes=True)
        return [{message.recipient for message in post.messages if message.recipient} - running for post in posts]

    def steps(self, messages: Sequence[tuple[NewMessage, int]]) -> Steps[set[int]]:
        """Store messages, each given with the bytes of its body; return which of their recipients run."""
        return self._post(messages)

    def _row(self, message: NewMessage, size: int) -> tuple[object, ...]:
        key = self._dialect.driver_key(message.key)
        return message.sender, message.sequence, key, message.kind.value, size, message.body

    def _post_at_once(self, messages: Sequence[tuple[NewMessage, int]]) -> Steps[set[int]]:
        """Store messages by one statement, which is a transaction of its own."""
        rows = [(message.recipient, *self._row(message, size)) for message, size in messages]
        asked = {(message.recipient,) for message, _ in messages if message.recipient}
        parameters = self._posted.parameters(rows) | self._asked.parameters(sorted(asked))
        return {row[0] for row in (yield self._store, parameters)}

    def _post_row_by_row(self, messages: Sequence[tuple[NewMessage, int]]) -> Steps[set[int]]:
        """Store messages by a statement for each row. No instance comes or goes during the transaction."""
        running = {row[0] for row in (yield self._running, {})}
        holders: dict[object, int | None] = {}
        if keys := {self._dialect.driver_key(message.key) for message, _ in messages if message.recipient == HOLDER}:
            holders = {row[0]: row[1] for row in (yield self._holders, self._keys.parameters([(key,) for key in keys]))}
        rows = []
        for message, size in messages:
            row, recipient = self._row(message, size), message.recipient
            if recipient == HOLDER:
                recipient = holders.get(row[2]) or HOLDER
            recipients = running if recipient is None else running & {recipient}
            rows += [(number, *row) for number in recipients if number != message.sender]
        if rows:
            yield self._store_row, rows
        return running
