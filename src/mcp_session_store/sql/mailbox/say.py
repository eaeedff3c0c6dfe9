"""Messages for the streams of sessions: storing them, and hinting at them to the holders of the streams."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from mcp_session_store.mailbox import HOLDER, SILENT_AFTER, MessageKind, NewMessage
from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.schema.tables import instances_table, sessions_table, stream_messages_table
from mcp_session_store.stream_mail import STREAM_QUEUE, STREAM_QUEUE_BYTES, STREAM_WAIT, Said

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.mailbox.post import PostStatements
    from mcp_session_store.stream_mail import NewStreamMessage

__all__ = ["Say", "SayStatements"]


class Say(NamedTuple):
    """Messages that are stored together."""

    messages: Sequence[NewStreamMessage]
    sizes: Sequence[int]
    """Bytes of each message's body."""
    size: int
    """Bytes of all bodies."""


class SayStatements:
    """Statements that store messages for the streams of the sessions of one namespace.

    On Postgres each is a transaction of its own: a call that is broken off between two is repeated, and finds what it
    has done.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        posting: Statements that post hints.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, posting: PostStatements) -> None:
        self._dialect = dialect
        self._posting = posting
        messages, sessions, instances = (
            stream_messages_table(schema),
            sessions_table(schema),
            instances_table(schema),
        )
        c, s = messages.c, sessions.c
        is_live = (Unindexed(s.namespace) == sa.literal(namespace, sa.Text)) & Unindexed(s.ended_at).is_(None)
        is_late = sa.case((c.created_at > StoreClock(-STREAM_WAIT.total_seconds()), 0), else_=1)
        waits = c.body.is_not(None)
        self._sessions = dialect.batch("spoken", {"key": sa.Uuid()})
        runs = sa.exists().where(
            instances.c.number == s.stream_holder, instances.c.beat_at > StoreClock(-SILENT_AFTER.total_seconds())
        )
        self._find_sessions = dialect.precompiled(
            sa.select(s.key, s.stream_holder, runs.correlate(sessions)).where(self._sessions.in_batch(s.key), is_live)
        )
        self._find_stored = dialect.precompiled(
            sa.select(c.key, c.sender, c.sequence, c.kind, c.bytes, c.taken_by, sa.case((waits, 1), else_=0), is_late)
            .where(self._sessions.in_batch(c.key))
            .order_by(c.key, c.sender, c.sequence)
        )
        names = ("key", "sender", "sequence", "kind", "bytes", "body")
        self._new = dialect.batch("said", {name: c[name].type for name in names})
        values = {name: self._new.c[name] for name in names} | {"created_at": StoreClock()}
        self._store = dialect.precompiled(
            dialect.insert_if_absent(messages, list(values), sa.select(*values.values()).select_from(self._new.rows))
        )

    async def say(self, attempt: Attempt, says: Sequence[Say]) -> list[Said]:
        """Store messages, and hint at them to the holders of their streams."""
        return await self._dialect.run(attempt.connection, self._say(says), writes=True)

    def _say(self, says: Sequence[Say]) -> Steps[list[Said]]:
        by_driver_key = {self._dialect.driver_key(m.key): m.key for say in says for m in say.messages}
        if not by_driver_key:
            return [Said() for _ in says]
        keys = self._sessions.parameters([(key,) for key in by_driver_key])
        sessions = {by_driver_key[row[0]]: row[1:] for row in (yield self._find_sessions, keys)}
        stored = _Stored(by_driver_key, (yield self._find_stored, keys))
        rows = []
        hints: dict[tuple[UUID, int], NewMessage] = {}
        outcomes = []
        for say in says:
            said = Said()
            for message, size in zip(say.messages, say.sizes, strict=True):
                if message.key not in sessions:
                    said.dropped.add(message.sequence)
                elif not stored.knows(message):
                    if stored.add(message, size):
                        key = self._dialect.driver_key(message.key)
                        rows.append((key, message.sender, message.sequence, message.kind.value, size, message.body))
                    else:
                        said.dropped.add(message.sequence)
                if stored.waits(message):
                    hints[message.key, message.sender] = NewMessage(
                        recipient=HOLDER,
                        sender=message.sender,
                        sequence=message.sequence,
                        key=message.key,
                        kind=MessageKind.STREAM,
                        body="",
                    )
                    holder, runs = sessions[message.key]
                    if holder in (None, message.sender) or not runs:
                        said.unheard.add(message.key)
            outcomes.append(said)
        if rows:
            yield self._store, self._new.parameters(rows)
        if hints:
            # After the messages, so that on Postgres one who claims the stream meanwhile is hinted at, or sees them.
            in_order = sorted(hints.values(), key=lambda hint: (hint.sender, hint.sequence))
            yield from self._posting.steps([(hint, 0) for hint in in_order])
        return outcomes


class _Stored:
    """What is stored for the streams of some sessions, and is to be."""

    def __init__(self, keys: Mapping[object, UUID], rows: Rows) -> None:
        self._known: dict[tuple[UUID, int, int], bool] = {}
        """Whether a message waits and is untaken, by its place."""
        self._passed: dict[tuple[UUID, int], int] = {}
        """Highest sequence that was given, by session and sender."""
        self._room: dict[tuple[UUID, str], list[int]] = defaultdict(lambda: [0, 0])
        """Number and bytes of the messages that wait, by session and kind."""
        for driver_key, sender, sequence, kind, size, taken_by, waits, is_late in rows:
            key = keys[driver_key]
            self._known[key, sender, sequence] = bool(waits) and taken_by is None
            if not waits and taken_by is not None:
                self._passed[key, sender] = sequence
            if waits and not is_late:
                self._count(key, kind, size)

    def _count(self, key: UUID, kind: str, size: int) -> None:
        room = self._room[key, kind]
        room[0] += 1
        room[1] += size

    def knows(self, message: NewStreamMessage) -> bool:
        """Return whether a message was stored before."""
        place = message.key, message.sender, message.sequence
        return place in self._known or message.sequence <= self._passed.get(place[:2], -1)

    def add(self, message: NewStreamMessage, size: int) -> bool:
        """Note a message that is to be stored, if there is room for it."""
        number, in_bytes = self._room[message.key, message.kind.value]
        if number >= STREAM_QUEUE or (number and in_bytes + size > STREAM_QUEUE_BYTES):
            return False
        self._count(message.key, message.kind.value, size)
        self._known[message.key, message.sender, message.sequence] = True
        return True

    def waits(self, message: NewStreamMessage) -> bool:
        """Return whether a message waits and is untaken."""
        return self._known.get((message.key, message.sender, message.sequence), False)
