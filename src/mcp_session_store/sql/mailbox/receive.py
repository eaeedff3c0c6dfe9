"""Reading the messages for an instance, and removing those that it has read, in one way to the database and back."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.mailbox import MAX_NUMBER, MESSAGE_PAGE_BYTES, Message, MessageKind, MessagePage
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import messages_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Receive", "Received", "ReceiveStatements"]

_KINDS: Final = {kind.value: kind for kind in MessageKind}
_BEFORE_ALL: Final = (0, 2**63 - 1)
"""Place before that of the first message of any sender."""


class Receive(NamedTuple):
    """A page to read."""

    recipient: int
    delivered: Mapping[int, int]
    """Highest sequence that was read, by sender."""
    removed: Mapping[int, int]
    """Highest sequence that is known to be removed, by sender."""
    limit: int

    def to_remove(self) -> list[tuple[int, int, int]]:
        """Return the senders of what is to be removed, with the sequences before the first and of the last."""
        return [
            (sender, self.removed.get(sender, -1), sequence)
            for sender, sequence in self.delivered.items()
            if sequence > self.removed.get(sender, -1)
        ]

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return where unread messages may be: each a place, and the number of a sender before whose first they end.

        Together they leave out all that was read, and not only what is still there: rows that are removed stay in the
        index of Postgres while another transaction may see them, and must not be passed each time.
        """
        places = [_BEFORE_ALL, *sorted(self.delivered.items()), (MAX_NUMBER + 1, 0)]
        return [(*place, following[0]) for place, following in pairwise(places)]


class Received(NamedTuple):
    """A page that was read."""

    page: MessagePage
    unknown: Mapping[int, int]
    """Highest sequences of messages that are of a kind that only a newer version knows, by sender: they are dropped."""


class ReceiveStatements:
    """Statements that read the messages for an instance, and remove those that it has read.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None) -> None:
        self._dialect = dialect
        self._messages = messages_table(schema)
        c = self._messages.c
        self._recipient = sa.bindparam("read_recipient", type_=c.recipient.type)
        self._limit = sa.bindparam("read_limit", type_=sa.Integer)
        if dialect.changes_in_with:
            self._removed = dialect.batch(
                "removed", {"sender": sa.Integer(), "above": sa.BigInteger(), "up_to": sa.BigInteger()}
            )
            self._ranges = dialect.batch(
                "ranged", {"sender": sa.Integer(), "height": sa.BigInteger(), "following": sa.Integer()}
            )
            self._read = dialect.precompiled(self._read_statement())
            self._receive = self._receive_at_once
        else:
            sender, above, up_to = (sa.bindparam(name, type_=sa.BigInteger) for name in ("sender", "above", "up_to"))
            self._remove_row = dialect.precompiled(
                sa.delete(self._messages).where(
                    c.recipient == self._recipient, c.sender == sender, c.sequence > above, c.sequence <= up_to
                )
            )
            height, following = (sa.bindparam(name, type_=sa.BigInteger) for name in ("height", "following"))
            found = self._found(sender, height, following)
            self._find = dialect.precompiled(
                sa.select(c.sender, c.sequence, c.key, c.kind, c.created_at, StoreClock(), c.bytes)
                .where(*found)
                .order_by(c.sender, c.sequence)
                .limit(self._limit)
            )
            self._picked = dialect.batch("picked", {"sender": sa.Integer(), "sequence": sa.BigInteger()})
            self._bodies = dialect.precompiled(
                sa.select(c.sender, c.sequence, c.body).join_from(
                    self._picked.rows,
                    self._messages,
                    sa.and_(
                        c.recipient == self._recipient,
                        self._picked.joined_on(c.sender),
                        c.sequence == self._picked.c.sequence,
                    ),
                )
            )
            self._receive = self._receive_step_by_step

    def _found(
        self, sender: sa.ColumnElement[int], height: sa.ColumnElement[int], following: sa.ColumnElement[int]
    ) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the conditions of a range, which is one of the primary key's."""
        c = self._messages.c
        return (
            c.recipient == self._recipient,
            sa.tuple_(c.sender, c.sequence) > sa.tuple_(sender, height),
            c.sender < following,
        )

    def _read_statement(self) -> sa.Select[Any]:
        """Build the statement that removes messages and reads others."""
        c, removed, ranged = self._messages.c, self._removed.c, self._ranges.c
        # What an end of its session has locked goes with that; waiting for it would hold up all other sessions.
        removable = self._dialect.unlocked(
            self._messages,
            c.recipient == self._recipient,
            c.sender == removed.sender,
            c.sequence > removed.above,
            c.sequence <= removed.up_to,
            each=self._removed,
        )
        remove = sa.delete(self._messages).where(removable)
        found = (
            sa.select(c.sender, c.sequence, c.key, c.kind, c.created_at, c.bytes, c.body)
            .where(*self._found(ranged.sender, ranged.height, ranged.following))
            .order_by(c.sender, c.sequence)
            .limit(self._limit + 1)
            .lateral("found")
        )
        in_order = found.c.sender, found.c.sequence
        page = (
            sa.select(
                found.c.sender,
                found.c.sequence,
                found.c.key,
                found.c.kind,
                found.c.created_at,
                StoreClock().label("now"),
                found.c.body,
                sa.func.count().over().label("found"),
                sa.func.row_number().over(order_by=in_order).label("place"),
                sa.func.sum(found.c.bytes).over(order_by=in_order).label("total_bytes"),
            )
            .select_from(self._ranges.rows.join(found, sa.true()))
            .subquery("page")
        )
        fits = sa.or_(page.c.total_bytes <= sa.literal(MESSAGE_PAGE_BYTES, sa.BigInteger), page.c.place == 1)
        return (
            sa.select(*(column for column in page.c if column.name not in ("place", "total_bytes")))
            .where(page.c.place <= self._limit, fits)
            .order_by(page.c.place)
            .add_cte(remove.cte("gone"))
        )

    async def receive(self, attempt: Attempt, receive: Receive, *, removes: bool) -> Received:
        """Remove what was read, and return what is next."""
        # Ranges that are read one after the other are read at the same moment, or a message would be found without one
        # of another sender that was posted before it.
        atomic = not self._dialect.changes_in_with and bool(receive.delivered)
        return await self._dialect.run(attempt.connection, self._receive(receive), writes=removes, atomic=atomic)

    def _receive_at_once(self, receive: Receive) -> Steps[Received]:
        """Do both by one statement."""
        rows = yield (
            self._read,
            {"read_recipient": receive.recipient, "read_limit": receive.limit}
            | self._ranges.parameters(receive.ranges())
            | self._removed.parameters(receive.to_remove()),
        )
        return self._received(rows, more=bool(rows) and rows[0][7] > len(rows))

    def _receive_step_by_step(self, receive: Receive) -> Steps[Received]:
        """Do both by a statement for each range, in one visit to the thread of the connection."""
        if to_remove := receive.to_remove():
            yield self._remove_row, [(receive.recipient, *range_) for range_ in to_remove]
        found: list[Sequence[Any]] = []
        for sender, height, following in receive.ranges():
            found += yield (
                self._find,
                {
                    "read_recipient": receive.recipient,
                    "sender": sender,
                    "height": height,
                    "following": following,
                    "read_limit": receive.limit + 1 - len(found),
                },
            )
            if len(found) > receive.limit:
                break
        picked: list[Sequence[Any]] = []
        size = 0
        for row in found[: receive.limit]:
            size += row[6]
            if picked and size > MESSAGE_PAGE_BYTES:
                break
            picked.append(row)
        if not picked:
            return self._received([], more=False)
        bodies = yield (
            self._bodies,
            {"read_recipient": receive.recipient} | self._picked.parameters([row[:2] for row in picked]),
        )
        by_place = {(sender, sequence): body for sender, sequence, body in bodies}
        rows = [(*row[:6], by_place[row[0], row[1]]) for row in picked if (row[0], row[1]) in by_place]
        return self._received(rows, more=len(found) > len(picked))

    def _received(self, rows: Sequence[Sequence[Any]], *, more: bool) -> Received:
        messages: list[Message] = []
        unknown: dict[int, int] = {}
        for sender, sequence, key, kind, created_at, now, body, *_ in rows:
            known, session = _KINDS.get(kind), self._dialect.key(key)
            if known is None or session is None:
                unknown[sender] = sequence
                continue
            messages.append(
                Message(
                    sender=sender,
                    sequence=sequence,
                    key=session,
                    kind=known,
                    body=body,
                    age=self._age(created_at, now),
                )
            )
        return Received(MessagePage(messages=messages, more=more), unknown)

    def _age(self, created_at: object, now: object) -> timedelta:
        created, read = self._dialect.moments([created_at, now])
        age: timedelta = read - created
        return age
