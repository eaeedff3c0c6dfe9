"""Mailbox in memory, the reference of its contract."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import anyio

from mcp_session_store.mailbox import (
    HOLDER,
    INSTANCE_KEPT,
    MESSAGE_LIFETIME,
    MESSAGE_PAGE,
    MESSAGE_PAGE_BYTES,
    MESSAGE_SWEEP_LIMIT,
    MESSAGES_KEPT,
    SILENT_AFTER,
    MailboxSweepReport,
    Message,
    MessagePage,
    RunningInstance,
    check_messages,
    check_presence,
)
from mcp_session_store.memory.data import Data, Instance, Mail
from mcp_session_store.memory.sessions import MemorySessionStore
from mcp_session_store.memory.stream_mail import MemoryStreamMail
from mcp_session_store.records import check_texts, instance_name
from mcp_session_store.settings import checked_type
from mcp_session_store.stream_mail import MARK_LIFETIME, STREAM_MESSAGE_LIFETIME

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mcp_session_store.mailbox import NewMessage, Presence
    from mcp_session_store.records import Heartbeat

__all__ = ["MemoryMailbox"]


class MemoryMailbox(MemoryStreamMail):
    """Mailbox beside a `MemorySessionStore`, in a dictionary.

    Args:
        store: Store of the sessions that the messages belong to.
    """

    def __init__(self, store: MemorySessionStore) -> None:
        checked_type("store", store, MemorySessionStore, "a MemorySessionStore")
        self._store = store
        self._data = store.data

    @property
    def namespace(self) -> str:
        return self._store.namespace

    @property
    def data(self) -> Data:
        """Instances and messages of all mailboxes that share them, and their sessions."""
        return self._data

    @property
    def hears(self) -> bool:
        return True

    async def beat(self, presence: Presence) -> bool:
        check_presence(presence)
        name, now = instance_name(presence.instance), self._data.now()
        row, other = self._data.instances.get(name), self._numbered(presence.number)
        if other not in (None, row):
            return False
        if other is None and presence.number is not None:
            self._remove_mail(presence.number)
        self._data.instances[name] = Instance(
            presence,
            namespace=self.namespace,
            started_at=now if row is None else row.started_at,
            beat_at=now,
            held=presence.held and name in self._data.held,
        )
        return True

    def _numbered(self, number: int | None) -> Instance | None:
        rows = self._data.instances.values()
        return None if number is None else next((row for row in rows if row.presence.number == number), None)

    def _remove_mail(self, number: int) -> None:
        for place in [place for place in self._data.mail if place[0] == number]:
            del self._data.mail[place]

    async def retire(self, instance: str) -> None:
        check_texts(instance=instance)
        row = self._data.instances.pop(instance_name(instance), None)
        if row is not None and row.presence.number is not None:
            self._remove_mail(row.presence.number)

    async def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        for name in names:
            check_texts(instance=name)
        return self._data.last_beats(names)

    async def instances(self) -> Sequence[RunningInstance]:
        beats = self._data.last_beats(self._data.instances)
        rows = [(name, row) for name, row in self._data.instances.items() if row.namespace == self.namespace]
        return [
            RunningInstance(
                instance=row.presence.instance,
                number=row.presence.number,
                server=row.presence.server,
                version=row.presence.version,
                residents=row.presence.residents,
                streams=row.presence.streams,
                started_at=row.started_at,
                heartbeat=beats[name],
                waiting=sum(recipient == row.presence.number for recipient, _, _ in self._data.mail),
            )
            for name, row in sorted(rows, key=lambda named: named[1].started_at)
        ]

    async def post(self, messages: Sequence[NewMessage]) -> set[int]:
        check_messages(messages)
        now = self._data.now()
        running = {
            row.presence.number
            for row in self._data.instances.values()
            if row.namespace == self.namespace and row.presence.number is not None and now - row.beat_at < SILENT_AFTER
        }
        posted = set()
        for message in messages:
            recipient = message.recipient
            if recipient == HOLDER:
                row = self._data.row(message.key, namespace=self.namespace)
                recipient = HOLDER if row is None or row.stream is None else row.stream.number
            recipients = running if recipient is None else running & {recipient}
            for recipient in recipients - {message.sender}:
                self._data.mail.setdefault((recipient, message.sender, message.sequence), Mail(message, now))
                posted.add(recipient)
        for number, on_hint in list(self._data.mail_listeners):
            if number in posted:
                on_hint()
        return {message.recipient for message in messages if message.recipient is not None} - running - {HOLDER}

    async def receive(self, recipient: int, *, delivered: Mapping[int, int], limit: int = MESSAGE_PAGE) -> MessagePage:
        waiting = sorted(place for place in self._data.mail if place[0] == recipient)
        for place in [place for place in waiting if place[2] <= delivered.get(place[1], -1)]:
            del self._data.mail[place]
            waiting.remove(place)
        now, size, messages = self._data.now(), 0, list[Message]()
        for place in waiting[:limit]:
            mail = self._data.mail[place]
            size += len(mail.message.body)
            if messages and size > MESSAGE_PAGE_BYTES:
                break
            messages.append(
                Message(
                    sender=mail.message.sender,
                    sequence=mail.message.sequence,
                    key=mail.message.key,
                    kind=mail.message.kind,
                    body=mail.message.body,
                    age=now - mail.posted_at,
                )
            )
        return MessagePage(messages=messages, more=len(messages) < len(waiting))

    async def listen(
        self,
        on_hint: Callable[[], None],
        *,
        instance: str,
        number: int | None = None,
        on_held: Callable[[], None] | None = None,
    ) -> None:
        check_texts(instance=instance)
        name, listener = instance_name(instance), (number, on_hint)
        self._data.mail_listeners.append(listener)
        self._data.held.add(name)
        if on_held is not None:
            on_held()
        try:
            await anyio.sleep_forever()
        finally:
            self._data.mail_listeners.remove(listener)
            self._data.held.discard(name)

    async def sweep(self, *, limit: int = MESSAGE_SWEEP_LIMIT) -> MailboxSweepReport:
        now = self._data.now()
        silent = [name for name, row in self._data.instances.items() if now - row.beat_at > INSTANCE_KEPT]
        for name in silent:
            del self._data.instances[name]
        beat_at = {
            row.presence.number: row.beat_at
            for row in self._data.instances.values()
            if now - row.beat_at < MESSAGES_KEPT
        }
        gone = [place for place in self._data.mail if place[0] not in beat_at]
        # Its recipient could read it for that long: it has sent a heartbeat after that, and reads before it sends one.
        unread = [
            place
            for place, mail in self._data.mail.items()
            if place[0] in beat_at and beat_at[place[0]] - mail.posted_at > MESSAGE_LIFETIME
        ]
        of_gone, of_unread = (
            Counter(self._data.mail.pop(place).message.kind.value for place in places)
            for places in (gone[:limit], unread[: max(limit - len(gone), 0)])
        )
        late = [
            place
            for place, mail in self._data.stream_mail.items()
            if now - mail.stored_at > (MARK_LIFETIME if mail.is_over else STREAM_MESSAGE_LIFETIME)
        ]
        of_late = [self._data.stream_mail.pop(place) for place in late[:limit]]
        return MailboxSweepReport(
            instances=len(silent),
            gone=of_gone,
            unread=of_unread,
            untaken=Counter(mail.said.kind.value for mail in of_late if not mail.is_over),
            more=len(gone) + len(unread) > limit or len(late) > limit,
        )
