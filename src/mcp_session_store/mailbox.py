"""The contract of a mailbox: which instances are running, and the messages that they send one another."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.records import check_texts
from mcp_session_store.store import Store
from mcp_session_store.stream_mail import MAX_NUMBER, StreamMail, check_number, check_place

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from mcp_session_store.records import Heartbeat

__all__ = [
    "HOLDER",
    "INSTANCE_KEPT",
    "MAX_NUMBER",
    "MESSAGES_KEPT",
    "MESSAGE_LIFETIME",
    "MESSAGE_PAGE",
    "MESSAGE_PAGE_BYTES",
    "MESSAGE_SWEEP_LIMIT",
    "SILENT_AFTER",
    "Mailbox",
    "MailboxSweepReport",
    "Message",
    "MessageKind",
    "MessagePage",
    "NewMessage",
    "Presence",
    "RunningInstance",
    "check_messages",
    "check_presence",
]

HOLDER: Final = 0
"""Recipient of a message to the instance that has the stream of the message's session."""

MESSAGE_PAGE: Final = 200
"""Most messages of a page, unless `limit` is given."""

MESSAGE_PAGE_BYTES: Final = 1024**2
"""Most bytes of the bodies of a page, unless it has one message only."""

MESSAGE_LIFETIME: Final = timedelta(minutes=1)
"""Time for which a message is kept that its recipient could read and has not read."""

MESSAGE_SWEEP_LIMIT: Final = 1000
"""Most messages that one step of a sweep removes, unless `limit` is given."""

INSTANCE_KEPT: Final = timedelta(days=1)
"""Time for which an instance is kept after its last heartbeat."""

MESSAGES_KEPT: Final = timedelta(hours=1)
"""Time after the last heartbeat of an instance for which its messages are kept: it may be cut off, and come back."""

SILENT_AFTER: Final = timedelta(minutes=5)
"""Time after its last heartbeat from which on an instance is sent no messages."""


class MessageKind(StrEnum):
    """What a message is. The values are stored, and are attributes of a published metric."""

    ANSWER = "answer"
    """The client's answer to a request of the server."""
    PROGRESS = "progress"
    """`notifications/progress` for a request of the server."""
    CANCELLED = "cancelled"
    """`notifications/cancelled` for a request of the client."""
    NOTIFICATION = "notification"
    """Another notification of the client, which concerns all copies of its session."""
    CHANGE = "change"
    """What another copy has changed in the session's record: the new revision, and the journaled call that made it."""
    STREAM = "stream"
    """A hint that there is something to send on the session's stream."""
    STREAM_TAKEN = "stream_taken"
    """Another instance has the session's stream now."""
    STREAM_SENT = "stream_sent"
    """What the instance that had the stream before has sent on it."""
    CLOSE_STREAM = "close_stream"
    """The application closes the session's stream, which the client then opens again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Presence:
    """What an instance says of itself with each heartbeat."""

    instance: str
    """Id of the instance, whose part after the last colon is unique."""
    number: int | None = None
    """Number under which it is sent messages, from 1 to `MAX_NUMBER`; `None`: it is sent none."""
    held: bool = True
    """Whether to record that it holds what `Mailbox.listen` holds for it; false when it is about to release that."""
    server: str = ""
    """Name of the server that it runs."""
    version: str = ""
    """Version of this package."""
    residents: int = 0
    """Number of sessions in its memory."""
    streams: int = 0
    """Number of GET streams that are open on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningInstance:
    """An instance whose heartbeat is stored, as others see it."""

    instance: str
    number: int | None
    server: str
    version: str
    residents: int
    streams: int
    started_at: datetime
    heartbeat: Heartbeat
    waiting: int
    """Number of messages that it has not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewMessage:
    """A message to one instance, or to all others."""

    recipient: int | None
    """Number of the instance; `None`: every other instance of the namespace that has a number; `HOLDER`: the one that
    has the session's stream."""
    sender: int
    """Number of the instance that sends it."""
    sequence: int
    """The sender's own number of the message. Those that one sender posts rise, from its first message to its last."""
    key: UUID
    """Key of the session that the message belongs to."""
    kind: MessageKind
    body: str
    """The client's message as JSON text, or what the kind is about; nothing for a hint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """A message as its recipient reads it."""

    sender: int
    sequence: int
    key: UUID
    kind: MessageKind
    body: str
    age: timedelta
    """Time since it was posted, by the store's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagePage:
    """Messages for one instance, those of each sender in their order."""

    messages: Sequence[Message]
    more: bool
    """Whether there may be further messages, for which the page had no room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MailboxSweepReport:
    """What one step of a sweep removed."""

    instances: int = 0
    """Instances that have sent no heartbeat for `INSTANCE_KEPT`."""
    gone: Mapping[str, int] = field(default_factory=dict)
    """Number of messages whose recipient has stopped or is silent for `MESSAGES_KEPT`, by kind."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Number of messages that their recipient could have read within `MESSAGE_LIFETIME` and has not, by kind."""
    untaken: Mapping[str, int] = field(default_factory=dict)
    """Number of stream messages that no stream has taken within `STREAM_MESSAGE_LIFETIME`, by kind."""
    more: bool = False
    """Whether another step would find more."""


def check_presence(presence: Presence) -> None:
    """Refuse a presence that cannot be stored.

    Raises:
        InvalidValue: A text holds a NUL or a lone surrogate, or the number is not within its bounds.
    """
    check_texts(instance=presence.instance, server=presence.server, version=presence.version)
    if presence.number is not None:
        check_number("number", presence.number)


def check_messages(messages: Sequence[NewMessage]) -> None:
    """Refuse messages of which one cannot be stored.

    Raises:
        InvalidValue: A body holds a NUL or a lone surrogate, or a number is not within its bounds.
    """
    for message in messages:
        check_texts(body=message.body)
        check_place(message.sender, message.sequence)
        if message.recipient not in (None, HOLDER):
            check_number("recipient", message.recipient)


class Mailbox(StreamMail, Store):
    """Store of the running instances of one namespace, and of the messages that they send one another.

    An instance says with each heartbeat that it runs. It may have a number, which no other instance has at the same
    time, and is then sent messages.

    The rules for all methods are those of `SessionStore`, with these differences:

    * Order: messages of one sender are read in the order of their sequences, provided that it posts one call at a time.
      There is no order between senders.
    * Repetition: a message that is posted again after a failure is stored once at most, unless it was read and removed
      meanwhile. So a recipient remembers the highest sequence of each sender, and passes that on as `delivered`:
      a message up to it is never read again.
    * Loss: a message that `post` has stored is lost only where its recipient stops or dies, where its session ends,
      where the recipient does not read it for `MESSAGE_LIFETIME` although it sends heartbeats, or where it sends none
      for `MESSAGES_KEPT`. A recipient that comes back from an outage reads before it sends its next heartbeat.
    * Size: a message is of any size that a request may have. A page has fewer messages where they are large.
    """

    @property
    def hears(self) -> bool:
        """Whether hints of new messages arrive now, so that the mailbox need be read only rarely without one."""
        return False

    @abstractmethod
    async def beat(self, presence: Presence) -> bool:
        """Record that an instance is running. May be repeated.

        Returns:
            False where another instance has the number; then nothing is recorded.

        Raises:
            InvalidValue: A text cannot be stored, or the number is not within its bounds.
        """

    @abstractmethod
    async def retire(self, instance: str) -> None:
        """Record that an instance has stopped; what waits for it is removed. May be repeated.

        Args:
            instance: Id of the instance, as given to `beat`.

        Raises:
            InvalidValue: No instance can have this id.
        """

    @abstractmethod
    async def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        """Return the last heartbeats of instances, of any namespace.

        Args:
            names: Parts after the last colon of the instances' ids.

        Returns:
            The heartbeats by name, without instances that have stopped or are unknown.

        Raises:
            InvalidValue: No instance can have one of these names.
        """

    @abstractmethod
    async def instances(self) -> Sequence[RunningInstance]:
        """Return the instances of this namespace that have not stopped, the oldest first.

        An instance of a version that stores no namespace is returned by every mailbox.
        """

    @abstractmethod
    async def post(self, messages: Sequence[NewMessage]) -> set[int]:
        """Store messages, all or none, durably before this returns. A message of an instance to itself is not stored.

        Nor is one to the `HOLDER` of a stream that no running instance has; the answer says nothing of it.

        Args:
            messages: Messages of one sender, in the order of their sequences.

        Returns:
            The numbers of recipients that no running instance of this namespace has; what is for them is not stored.
            An instance that has sent no heartbeat for `SILENT_AFTER` is not running.

        Raises:
            InvalidValue: A message cannot be stored. Nothing of the call is.
        """

    @abstractmethod
    async def receive(self, recipient: int, *, delivered: Mapping[int, int], limit: int = MESSAGE_PAGE) -> MessagePage:
        """Return messages for an instance that it has not read, and remove those that it has.

        Args:
            recipient: Number of the instance, which alone calls this.
            delivered: Highest sequence that it has read, by sender.
            limit: Most messages to return.
        """

    async def listen(
        self,
        on_hint: Callable[[], None],  # noqa: ARG002
        *,
        instance: str,  # noqa: ARG002
        number: int | None = None,  # noqa: ARG002
        on_held: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> None:
        """Pass on hints that an instance has new messages, and hold what its death releases, until cancelled.

        Hints may be late, duplicated or lost; `receive` is authoritative. A mailbox without hints waits for ever, as
        this method does.

        The death of the process releases what is held, so that others learn of it at once; a mailbox in which nothing
        can be held leaves that to the heartbeats. It is no longer held when this ends.

        Args:
            on_hint: Called when there may be messages.
            instance: Id of the instance that listens.
            number: Its number, where it is sent messages.
            on_held: Called when something is held, so that the instance has the next `beat` store that at once.

        Raises:
            StoreUnavailable: Nothing is held any more, and no more hints come; the call should be repeated.
            InvalidValue: No instance can have this id.
        """
        await anyio.sleep_forever()

    @abstractmethod
    async def sweep(self, *, limit: int = MESSAGE_SWEEP_LIMIT) -> MailboxSweepReport:
        """Remove instances that are long silent, and messages that will not be read. Repeated while there is `more`.

        Args:
            limit: Most messages that this step removes.
        """
