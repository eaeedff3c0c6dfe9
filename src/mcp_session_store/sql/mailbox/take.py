"""Messages for the streams of sessions: taking them, leaving them to the next holder, and withdrawing them.

Each statement is a transaction of its own on Postgres, and each call is right all the same when it is broken off
between two: what is repeated finds what was done.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.schema.tables import sessions_table, stream_messages_table
from mcp_session_store.stream_mail import (
    STREAM_PAGE,
    STREAM_PAGE_BYTES,
    STREAM_WAIT,
    StreamMessage,
    StreamMessageKind,
    StreamPage,
    Withdrawal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Take", "TakeStatements"]

_KINDS: Final = {kind.value: kind for kind in StreamMessageKind}


class Take(NamedTuple):
    """What waits for one stream, to be taken or released."""

    key: UUID
    holder: int
    given: Mapping[int, int]
    """Highest sequence that was given to the stream, by sender."""
    removed: Mapping[int, int]
    """Highest sequence that is known to be removed, by sender."""
    without_others: bool = False

    def newly_given(self, key: object) -> list[tuple[object, ...]]:
        """Return the holder, the senders of what is to be removed, and the sequences before the first and of the last.

        Args:
            key: The driver's key of the session.
        """
        return [
            (key, self.holder, sender, self.removed.get(sender, -1), sequence)
            for sender, sequence in self.given.items()
            if sequence > self.removed.get(sender, -1)
        ]


class _Found(NamedTuple):
    """A message that waits, without its body."""

    sender: int
    sequence: int
    size: int
    created_at: Any
    """Time at which it was stored, as the driver returned it."""
    taken_by: int | None
    is_late: int


class TakeStatements:
    """Statements that take messages for the streams of the sessions of one namespace.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        messages, sessions = stream_messages_table(schema), sessions_table(schema)
        c, s = messages.c, sessions.c
        is_live = (Unindexed(s.namespace) == sa.literal(namespace, sa.Text)) & Unindexed(s.ended_at).is_(None)
        is_late = sa.case((c.created_at > StoreClock(-STREAM_WAIT.total_seconds()), 0), else_=1)
        waits = c.body.is_not(None)

        place: dict[str, Any] = {"key": sa.Uuid(), "holder": sa.Integer(), "sender": sa.Integer()}
        self._given = dialect.batch("given", place | {"above": sa.BigInteger(), "up_to": sa.BigInteger()})
        given = self._given.c
        of_sender = (c.key == given.key, c.sender == given.sender)
        self._mark = dialect.precompiled(
            sa.update(messages)
            .where(
                dialect.unlocked(
                    messages,
                    *of_sender,
                    c.sequence == given.up_to,
                    c.taken_by == given.holder,
                    waits,
                    each=self._given,
                )
            )
            .values(body=sa.null())
        )
        self._remove = dialect.precompiled(
            sa.delete(messages).where(
                dialect.unlocked(
                    messages,
                    *of_sender,
                    c.sequence > given.above,
                    c.sequence < given.up_to,
                    c.taken_by.is_not(None),
                    sa.or_(c.body.is_(None), c.taken_by == given.holder),
                    each=self._given,
                )
            )
        )

        self._takes = dialect.batch("takes", {"key": sa.Uuid(), "holder": sa.Integer()})
        takes = self._takes.c
        is_held = (
            sa.exists()
            .where(s.key == c.key, s.stream_holder == takes.holder, is_live)
            .correlate(messages, self._takes.rows)
        )
        self._give_up = dialect.precompiled(
            sa.update(messages)
            .where(
                dialect.unlocked(
                    messages, c.key == takes.key, c.taken_by != takes.holder, waits, is_held, each=self._takes
                )
            )
            .values(body=sa.null(), taken_by=sa.null())
            .returning(c.key, c.kind)
        )
        self._find = dialect.precompiled(
            # A row without a message says that the stream is held.
            sa.select(s.key, s.stream_holder, c.sender, c.sequence, c.bytes, c.created_at, c.taken_by, is_late)
            .select_from(
                self._takes.rows.join(
                    sessions,
                    self._takes.joined_on(s.key) & (s.stream_holder == takes.holder) & is_live,
                ).outerjoin(messages, (c.key == s.key) & waits)
            )
            .order_by(s.key, c.sender, c.sequence)
        )
        self._picked = dialect.batch("picked", place | {"sequence": sa.BigInteger()})
        picked = self._picked.c
        # Others may have taken it, or the stream, since it was found.
        still_held = (
            sa.exists()
            .where(s.key == c.key, s.stream_holder == picked.holder, is_live)
            .correlate(messages, self._picked.rows)
        )
        self._holder = sa.bindparam("take_holder", type_=sa.Integer)
        self._take = dialect.precompiled(
            sa.update(messages)
            .where(
                dialect.unlocked(
                    messages,
                    c.key == picked.key,
                    c.sender == picked.sender,
                    c.sequence == picked.sequence,
                    sa.or_(c.taken_by.is_(None), c.taken_by == picked.holder),
                    waits,
                    still_held,
                    each=self._picked,
                )
            )
            .values(taken_by=self._holder)
            .returning(c.key, c.sender, c.sequence, c.kind, c.created_at, StoreClock(), c.body)
        )
        self._key = sa.bindparam("stream_key", type_=sa.Uuid)
        of_session = c.key == self._key
        self._release = dialect.precompiled(
            sa.update(messages)
            .where(dialect.unlocked(messages, of_session, c.taken_by == self._holder, waits))
            .values(taken_by=sa.null())
        )
        sender = sa.bindparam("stream_sender", type_=sa.Integer)
        sequence = sa.bindparam("stream_sequence", type_=sa.BigInteger)
        of_one = (of_session, c.sender == sender, c.sequence == sequence)
        self._withdraw = dialect.precompiled(
            sa.update(messages).where(*of_one, c.taken_by.is_(None)).values(body=sa.null()).returning(c.sequence)
        )
        # What was given is marked by the last message of its sender.
        passed = c.body.is_(None) & c.taken_by.is_not(None)
        self._find_one = dialect.precompiled(
            sa.select(sa.case((passed, 1), else_=0)).where(
                of_session, c.sender == sender, (c.sequence == sequence) | (passed & (c.sequence > sequence))
            )
        )

    async def take(self, attempt: Attempt, takes: Sequence[Take]) -> list[StreamPage]:
        """Remove what was given to streams, and take what waits for them."""
        return await self._dialect.run(attempt.connection, self._take_all(takes), writes=True)

    def _remove_given(self, takes: Iterable[Take]) -> Steps[None]:
        if given := [row for take in takes for row in take.newly_given(self._dialect.driver_key(take.key))]:
            parameters = self._given.parameters(given)
            # The marks first, so that what is removed is known to be given.
            yield self._mark, parameters
            yield self._remove, parameters

    def _take_all(self, takes: Sequence[Take]) -> Steps[list[StreamPage]]:
        yield from self._remove_given(takes)
        keys = [self._dialect.driver_key(take.key) for take in takes]
        dropped: dict[object, Counter[str]] = defaultdict(Counter)
        if alone := [(key, take.holder) for key, take in zip(keys, takes, strict=True) if take.without_others]:
            for key, kind in (yield self._give_up, self._takes.parameters(alone)):
                dropped[key][kind] += 1
        wanted = sorted({(key, take.holder) for key, take in zip(keys, takes, strict=True)})
        found: dict[tuple[object, int], list[_Found]] = {}
        for row in (yield self._find, self._takes.parameters(wanted)):
            messages = found.setdefault((row[0], row[1]), [])
            if row[2] is not None:
                messages.append(_Found(*row[2:]))
        pages = []
        for key, take in zip(keys, takes, strict=True):
            mine = found.get((key, take.holder))
            pages.append((yield from self._take_one(key, take, mine, dropped.pop(key, Counter()))))
        return pages

    def _take_one(
        self, key: object, take: Take, found: list[_Found] | None, dropped: Counter[str]
    ) -> Steps[StreamPage]:
        if found is None:
            return StreamPage(lost=True)
        free, held_up = _free(found, take)
        if not free:
            return StreamPage(held_up=held_up, dropped=dropped)
        page = _page(free)
        rows = yield (
            self._take,
            {"take_holder": take.holder}
            | self._picked.parameters([(key, take.holder, one.sender, one.sequence) for one in page]),
        )
        taken = {(row[1], row[2]): row for row in rows}
        messages = []
        missed: set[int] = set()
        for one in page:
            row = taken.get((one.sender, one.sequence))
            if row is None:
                # Another took it meanwhile, which holds up what follows.
                missed.add(one.sender)
            elif one.sender not in missed:
                messages.append(self._message(*row[1:]))
        return StreamPage(messages, more=len(page) < len(free), held_up=held_up or bool(missed), dropped=dropped)

    def _message(
        self, sender: int, sequence: int, kind: str, created_at: object, now: object, body: str
    ) -> StreamMessage:
        created, read = self._dialect.moments([created_at, now])
        age: timedelta = read - created
        return StreamMessage(
            sender=sender,
            sequence=sequence,
            kind=_KINDS.get(kind, StreamMessageKind.NOTIFICATION),
            body=body,
            age=age,
        )

    async def release(self, attempt: Attempt, take: Take) -> None:
        """Remove what was given to a stream, and leave what was taken and not given."""
        await self._dialect.run(attempt.connection, self._release_steps(take), writes=True)

    def _release_steps(self, take: Take) -> Steps[None]:
        yield from self._remove_given([take])
        yield self._release, {"stream_key": self._dialect.driver_key(take.key), "take_holder": take.holder}

    async def withdraw(self, attempt: Attempt, key: UUID, sender: int, sequence: int) -> Withdrawal:
        """Have a message not taken any more, if it is untaken."""
        return await self._dialect.run(attempt.connection, self._withdraw_steps(key, sender, sequence), writes=True)

    def _withdraw_steps(self, key: UUID, sender: int, sequence: int) -> Steps[Withdrawal]:
        one: dict[str, object] = {
            "stream_key": self._dialect.driver_key(key),
            "stream_sender": sender,
            "stream_sequence": sequence,
        }
        if (yield self._withdraw, one):
            return Withdrawal.WITHDRAWN
        rows = yield self._find_one, one
        if any(row[0] for row in rows):
            return Withdrawal.GIVEN
        return Withdrawal.TAKEN if rows else Withdrawal.WITHDRAWN


def _free(found: Sequence[_Found], take: Take) -> tuple[list[_Found], bool]:
    """Return what a holder may take, in order, and whether what others have taken holds up any.

    Args:
        found: Messages of the session, in the order of senders and their sequences.
        take: By which holder.
    """
    free: list[tuple[Any, _Found]] = []
    held_up: set[int] = set()
    latest: dict[int, Any] = {}
    for one in found:
        sender = one.sender
        if one.sequence <= take.given.get(sender, -1):
            continue
        if one.taken_by not in (None, take.holder):
            held_up.add(sender)
        elif sender not in held_up and not one.is_late:
            # The clock may be put back; the order of one sender stays.
            latest[sender] = max(one.created_at, latest.get(sender, one.created_at))
            free.append((latest[sender], one))
    return [one for _, one in sorted(free, key=itemgetter(0))], bool(held_up)


def _page(free: Sequence[_Found]) -> list[_Found]:
    """Return as many of the first messages as a page has room for."""
    page: list[_Found] = []
    size = 0
    for one in free[:STREAM_PAGE]:
        size += one.size
        if page and size > STREAM_PAGE_BYTES:
            break
        page.append(one)
    return page
