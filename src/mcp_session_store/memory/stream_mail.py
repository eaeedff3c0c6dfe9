"""Stream messages in memory, the reference of their contract."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mcp_session_store.mailbox import HOLDER, Mailbox, MessageKind, NewMessage
from mcp_session_store.memory.data import StreamMail
from mcp_session_store.store import check_keys
from mcp_session_store.stream_mail import (
    STREAM_PAGE,
    STREAM_PAGE_BYTES,
    STREAM_QUEUE,
    STREAM_QUEUE_BYTES,
    STREAM_WAIT,
    Said,
    StreamMessage,
    StreamPage,
    Withdrawal,
    check_stream_messages,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from mcp_session_store.memory.data import Data
    from mcp_session_store.stream_mail import NewStreamMessage

__all__ = ["MemoryStreamMail"]


class MemoryStreamMail(Mailbox):
    """Stream messages of a `MemoryMailbox`."""

    _data: Data

    def _of(self, key: UUID) -> list[StreamMail]:
        """Return what is stored for the stream of a session, in the order of senders and their sequences."""
        return [mail for place, mail in sorted(self._data.stream_mail.items()) if place[0] == key]

    def _is_passed(self, key: UUID, sender: int, sequence: int) -> bool:
        """Return whether a later message of the same sender was given to the stream."""
        return any(
            mail.is_over and mail.taken_by is not None
            for mail in self._of(key)
            if mail.said.sender == sender and mail.said.sequence > sequence
        )

    async def say(self, messages: Sequence[NewStreamMessage]) -> Said:
        check_stream_messages(messages)
        said = Said()
        last: dict[UUID, NewStreamMessage] = {}
        for message in messages:
            place = message.key, message.sender, message.sequence
            mail = self._data.stream_mail.get(place)
            if mail is None and not self._is_passed(*place):
                if not self._is_taken_in(message):
                    said.dropped.add(message.sequence)
                    continue
                mail = self._data.stream_mail[place] = StreamMail(message, self._data.now())
            if mail is not None and mail.taken_by is None and not mail.is_over:
                last[message.key] = message
        for key, message in last.items():
            row = self._data.row(key, namespace=self.namespace)
            holder = None if row is None or row.stream is None else row.stream.number
            hint = NewMessage(
                recipient=HOLDER,
                sender=message.sender,
                sequence=message.sequence,
                key=key,
                kind=MessageKind.STREAM,
                body="",
            )
            if holder is None or holder == message.sender or await self._is_silent(hint, holder):
                said.unheard.add(key)
        return said

    async def _is_silent(self, hint: NewMessage, holder: int) -> bool:
        """Post a hint to a holder; return whether that does not run."""
        await self.post([hint])
        return not any(place[0] == holder and place[2] == hint.sequence for place in self._data.mail)

    def _is_taken_in(self, message: NewStreamMessage) -> bool:
        """Return whether there is room for a message, and its session has not ended."""
        row = self._data.row(message.key, namespace=self.namespace)
        now = self._data.now()
        sizes = [
            len(mail.said.body.encode())
            for mail in self._of(message.key)
            if mail.said.kind is message.kind and not mail.is_over and now - mail.stored_at < STREAM_WAIT
        ]
        return (
            row is not None
            and row.ended is None
            and len(sizes) < STREAM_QUEUE
            and (not sizes or sum(sizes) + len(message.body.encode()) <= STREAM_QUEUE_BYTES)
        )

    def _remove_given(self, key: UUID, holder: int, given: Mapping[int, int]) -> None:
        for mail in self._of(key):
            up_to = given.get(mail.said.sender, -1)
            is_given = mail.taken_by == holder or (mail.is_over and mail.taken_by is not None)
            if is_given and mail.said.sequence < up_to:
                del self._data.stream_mail[key, mail.said.sender, mail.said.sequence]
            elif is_given and mail.said.sequence == up_to:
                mail.is_over = True

    async def take(
        self, key: UUID, holder: int, *, given: Mapping[int, int], without_others: bool = False
    ) -> StreamPage:
        check_keys(key)
        self._remove_given(key, holder, given)
        row = self._data.row(key, namespace=self.namespace)
        if row is None or row.ended is not None or row.stream is None or row.stream.number != holder:
            return StreamPage(lost=True)
        dropped = Counter[str]()
        if without_others:
            for mail in self._of(key):
                if not mail.is_over and mail.taken_by not in (None, holder):
                    mail.is_over, mail.taken_by = True, None
                    dropped[mail.said.kind.value] += 1
        now, size, page = self._data.now(), 0, list[StreamMail]()
        waiting, held_up = self._waiting(key, holder, given, now)
        for mail in waiting[:STREAM_PAGE]:
            size += len(mail.said.body.encode())
            if page and size > STREAM_PAGE_BYTES:
                break
            mail.taken_by = holder
            page.append(mail)
        messages = [
            StreamMessage(
                sender=mail.said.sender,
                sequence=mail.said.sequence,
                kind=mail.said.kind,
                body=mail.said.body,
                age=now - mail.stored_at,
            )
            for mail in page
        ]
        return StreamPage(messages, more=len(page) < len(waiting), held_up=held_up, dropped=dropped)

    def _waiting(
        self, key: UUID, holder: int, given: Mapping[int, int], now: datetime
    ) -> tuple[list[StreamMail], bool]:
        """Return what the holder may take, in order, and whether what another has taken holds up any."""
        waiting: list[tuple[datetime, StreamMail]] = []
        held_up: set[int] = set()
        latest: dict[int, datetime] = {}
        for mail in self._of(key):
            sender = mail.said.sender
            if mail.is_over or mail.said.sequence <= given.get(sender, -1):
                continue
            if mail.taken_by not in (None, holder):
                held_up.add(sender)
            if sender not in held_up and now - mail.stored_at < STREAM_WAIT:
                # The clock may be put back; the order of one sender stays.
                latest[sender] = max(mail.stored_at, latest.get(sender, mail.stored_at))
                waiting.append((latest[sender], mail))
        return [mail for _, mail in sorted(waiting, key=lambda item: item[0])], bool(held_up)

    async def release(self, key: UUID, holder: int, *, given: Mapping[int, int]) -> None:
        check_keys(key)
        self._remove_given(key, holder, given)
        for mail in self._of(key):
            if not mail.is_over and mail.taken_by == holder:
                mail.taken_by = None

    async def withdraw(self, key: UUID, sender: int, sequence: int) -> Withdrawal:
        check_keys(key)
        mail = self._data.stream_mail.get((key, sender, sequence))
        if mail is None:
            return Withdrawal.GIVEN if self._is_passed(key, sender, sequence) else Withdrawal.WITHDRAWN
        if mail.taken_by is None:
            mail.is_over = True
            return Withdrawal.WITHDRAWN
        return Withdrawal.GIVEN if mail.is_over else Withdrawal.TAKEN
