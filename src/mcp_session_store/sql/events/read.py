"""Reading the events of sessions: one stream, page by page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.records import EventKind, EventPage, StoredEvent
from mcp_session_store.sql.dialects.functions import ONE, Unindexed
from mcp_session_store.sql.schema.tables import events_table, logs_table
from mcp_session_store.sql.sessions.decoding import is_readable_text

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["EventReader", "Read"]

PAGE_BYTES: Final = 1024**2
"""Bytes of messages, of all streams, between the first event of a page and the last."""
WINDOW: Final = 4
"""Events of a session, of any stream, that are looked through first for each event that a page has room for."""

_KINDS: Final = {kind.value: kind for kind in EventKind}


@dataclass(frozen=True, slots=True)
class Read:
    """A page to read."""

    key: UUID
    stream: str
    after: int
    limit: int


class EventReader:
    """Reads the events of the sessions of one namespace.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        logs, events = logs_table(schema), events_table(schema)
        of_namespace = Unindexed(logs.c.namespace) == sa.literal(namespace, sa.Text)
        wanted = (
            events.c.key == sa.bindparam("read_key", type_=sa.Uuid),
            events.c.sequence > sa.bindparam("read_after", type_=sa.BigInteger),
            # A range, because otherwise the planner of Postgres may read and sort all events that follow.
            events.c.sequence <= sa.bindparam("read_up_to", type_=sa.BigInteger),
            events.c.stream == sa.bindparam("read_stream", type_=sa.Text),
        )
        # The total of bytes at which the page is full, known before any message is read: other streams count, too.
        filled = sa.select(events.c.total_bytes + PAGE_BYTES).where(*wanted).order_by(events.c.sequence).limit(ONE)
        page = (
            sa.select(
                events.c.sequence,
                events.c.position,
                events.c.previous,
                events.c.kind,
                events.c.message,
            )
            .where(*wanted, events.c.total_bytes <= filled.scalar_subquery())
            .order_by(events.c.sequence)
            .limit(sa.bindparam("read_limit", type_=sa.Integer))
            .subquery("page")
        )
        oldest = (
            sa.select(events.c.sequence)
            .where(events.c.key == sa.bindparam("read_key", type_=sa.Uuid))
            .order_by(events.c.sequence)
            .limit(ONE)
        )
        # One statement, so that the state of the log is as old as the events.
        self._read = dialect.precompiled(
            sa.select(
                logs.c.sequence.label("last"),
                sa.func.coalesce(oldest.scalar_subquery(), logs.c.sequence + 1).label("first"),
                (logs.c.total_bytes > filled.scalar_subquery()).label("is_full"),
                *page.c,
            )
            .select_from(logs.outerjoin(page, sa.true()))
            .where(logs.c.key == sa.bindparam("read_key", type_=sa.Uuid), of_namespace)
            .order_by(page.c.sequence)
        )

    async def page(self, attempt: Attempt, read: Read) -> EventPage | None:
        """Return some events of one stream; `None` where the session has no log."""
        return await self._dialect.run(attempt.connection, self._page(read), writes=False)

    def _page(self, read: Read) -> Steps[EventPage | None]:
        events: list[StoredEvent] = []
        first = 0
        after, window = read.after, WINDOW * read.limit
        while True:
            wanted = read.limit - len(events)
            rows = yield (
                self._read,
                {
                    "read_key": self._dialect.driver_key(read.key),
                    "read_stream": read.stream,
                    "read_after": after,
                    "read_up_to": after + window,
                    "read_limit": wanted + 1,
                },
            )
            if not rows:
                return None
            last, oldest, is_full = rows[0][:3]
            if events and oldest > after + 1:
                # Events were removed between the two reads; the next page shows the gap.
                return EventPage(events=events, more=True, first=first, last=last)
            first = oldest
            found = [row[3:] for row in rows if row[3] is not None]
            events += [event for row in found[:wanted] if (event := _stored_event(*row)) is not None]
            more = is_full or len(found) > wanted
            if more and found and not events:
                # None can be read. A page must not be empty while there is more.
                after, window = found[:wanted][-1][0], WINDOW * read.limit
                continue
            over = after + window >= last
            if more or over or len(events) == read.limit:
                return EventPage(events=events, more=more or not over, first=first, last=last)
            # The next event of the stream may be far, because the stream is one of many.
            after, window = after + window, 4 * window


def _stored_event(sequence: int, position: Any, previous: Any, kind: Any, message: str | None) -> StoredEvent | None:
    """Return the event in a row; `None` for one that cannot be read, which its reader misses like one that was removed.

    An event of a kind that only a newer version of this package knows is passed on like a notification.
    """
    if message is not None and not is_readable_text(message):
        return None
    if not isinstance(position, int) or not isinstance(previous, int):
        return None
    known = _KINDS.get(kind) or (EventKind.PRIMING if message is None else EventKind.NOTIFICATION)
    return StoredEvent(sequence=sequence, position=position, previous=previous, kind=known, message=message)
