"""The contract of stream messages: what copies say outside of calls, on its way to the client's stream elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from mcp_session_store.errors import InvalidValue
from mcp_session_store.records import check_texts
from mcp_session_store.store import check_keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

__all__ = [
    "MARK_LIFETIME",
    "MAX_NUMBER",
    "STREAM_MESSAGE_LIFETIME",
    "STREAM_PAGE",
    "STREAM_PAGE_BYTES",
    "STREAM_QUEUE",
    "STREAM_QUEUE_BYTES",
    "STREAM_WAIT",
    "NewStreamMessage",
    "Said",
    "StreamMail",
    "StreamMessage",
    "StreamMessageKind",
    "StreamPage",
    "Withdrawal",
    "check_number",
    "check_place",
    "check_stream_messages",
]

MAX_NUMBER: Final = (1 << 24) - 1
"""Highest number of an instance; the lowest is 1."""

STREAM_WAIT: Final = timedelta(seconds=30)
"""Time for which a stream message waits for a stream."""

STREAM_MESSAGE_LIFETIME: Final = timedelta(minutes=1)
"""Time after which a sweep removes one that no stream has taken."""

MARK_LIFETIME: Final = timedelta(minutes=10)
"""Time for which is known what of a sender went to the stream, so that what it says again after a failure is not."""

STREAM_QUEUE: Final = 100
"""Most notifications of a session that wait for its stream; and most questions."""

STREAM_QUEUE_BYTES: Final = 1024**2
"""Most bytes of their bodies, unless it is one only; and most bytes of those of questions."""

STREAM_PAGE: Final = 100
"""Most stream messages of a page."""

STREAM_PAGE_BYTES: Final = 1024**2
"""Most bytes of the bodies of a page, unless it has one message only."""


_MAX_SEQUENCE: Final = 2**63 - 1


class StreamMessageKind(StrEnum):
    """What a stream message is. The values are stored, and are attributes of a published metric."""

    NOTIFICATION = "stream_notification"
    QUESTION = "stream_question"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewStreamMessage:
    """What a copy says outside of a call, while the client's stream is not open on its instance."""

    key: UUID
    """Key of the session."""
    sender: int
    """Number of the instance that says it."""
    sequence: int
    """The sender's own number of the message: of the same sequence as those of `NewMessage`."""
    kind: StreamMessageKind
    body: str = field(repr=False)
    """The message as JSON text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMessage:
    """A message for the stream, as its holder takes it."""

    sender: int
    sequence: int
    kind: StreamMessageKind
    body: str = field(repr=False)
    age: timedelta
    """Time since it was stored, by the store's clock."""


@dataclass(frozen=True, slots=True)
class Said:
    """What became of messages that were said."""

    dropped: set[int] = field(default_factory=set)
    """Sequences of those that were not stored: too many wait, or the session is not live."""
    unheard: set[UUID] = field(default_factory=set)
    """Sessions of whose messages no instance was told, because none has their stream, or not one that runs.

    A stream that is opened at the same moment may miss them. So the caller posts a hint (`MessageKind.STREAM`) to the
    holder of each a second later.
    """


@dataclass(frozen=True, slots=True)
class StreamPage:
    """Messages for a stream, those of each sender in their order."""

    messages: Sequence[StreamMessage] = field(default_factory=list)
    more: bool = False
    """Whether there may be further messages, for which the page had no room."""
    held_up: bool = False
    """Whether messages wait because another instance has taken some before them, of the same sender."""
    lost: bool = False
    """Whether the instance does not have the stream any more, so that others may wait for it, or the session ended."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Number of messages that were given up by `without_others`, by kind."""


class Withdrawal(StrEnum):
    """What became of a message that its sender withdraws."""

    WITHDRAWN = "withdrawn"
    """It goes to no stream: it is withdrawn now, was given up, or is not known."""
    TAKEN = "taken"
    """A holder has taken it and not given it yet, or has not said so: it may be released, so ask again."""
    GIVEN = "given"
    """It was given to the stream."""


def check_number(name: str, number: int) -> None:
    """Refuse what is no number of an instance.

    Raises:
        InvalidValue: The number is not within its bounds.
    """
    if not 1 <= number <= MAX_NUMBER:
        raise InvalidValue(f"{name} is not between 1 and {MAX_NUMBER}")


def check_place(sender: int, sequence: int) -> None:
    """Refuse what is no sender of a message, or no sequence.

    Raises:
        InvalidValue: A number is not within its bounds.
    """
    check_number("sender", sender)
    if not 0 <= sequence <= _MAX_SEQUENCE:
        raise InvalidValue(f"sequence is not between 0 and {_MAX_SEQUENCE}")


def check_stream_messages(messages: Sequence[NewStreamMessage]) -> None:
    """Refuse stream messages of which one cannot be stored.

    Raises:
        InvalidValue: A body holds a NUL or a lone surrogate, or a number is not within its bounds.
        ConfigurationError: A key is no UUID.
    """
    for message in messages:
        check_keys(message.key)
        check_texts(body=message.body)
        check_place(message.sender, message.sequence)


class StreamMail(ABC):
    """Messages that wait for the streams of sessions; part of a `Mailbox`.

    What a copy says outside of a call goes to the client's GET stream. Where that is not open on the same instance, the
    message is stored for the session. The holder of the stream, which is the instance whose `StreamClaim` was the last
    to take it, *takes* what waits, and says with its next call what it has *given* to the client's connection.

    * Order: messages of one sender are taken in the order of their sequences. Between senders they go by the times at
      which they were stored.
    * Once: a message is taken by one instance at a time. What an instance has taken and not given goes to the next
      holder when it is released, and not before.
    * Repetition: each call may be repeated after a failure. What was given to a stream is not taken again, although it
      is said again within `MARK_LIFETIME`.
    * Loss: a message is lost only where it waits for longer than `STREAM_WAIT`, where its session ends, or where the
      holder that has taken it dies.
    """

    @abstractmethod
    async def say(self, messages: Sequence[NewStreamMessage]) -> Said:
        """Store messages for the streams of their sessions, and hint at them to the holders.

        In the same transaction each holder that is another instance, and runs, is posted one message of the kind
        `MessageKind.STREAM` for each session, under a sequence of these. So calls of `post` and of this method are made
        one after the other.

        A session has `STREAM_QUEUE` notifications and as many questions at most that wait, and `STREAM_QUEUE_BYTES` of
        each, about; what is beyond is dropped.

        Args:
            messages: Messages of one sender, in the order of their sequences.

        Raises:
            InvalidValue: A message cannot be stored. Nothing of the call is.
        """

    @abstractmethod
    async def take(
        self, key: UUID, holder: int, *, given: Mapping[int, int], without_others: bool = False
    ) -> StreamPage:
        """Return messages for the stream of a session that wait, and remove those that were given to its connection.

        What was returned before and not given is returned again. One call at a time is made for a session. Where the
        instance does not have the stream any more, what was given is removed, and a page without messages says so.

        Args:
            key: Key of the session.
            holder: Number of the instance, which has the stream.
            given: Highest sequence that this instance has given to the connection, by sender.
            without_others: Whether to drop what another instance has taken, instead of waiting for its release: it has
                had time to do so.
        """

    @abstractmethod
    async def release(self, key: UUID, holder: int, *, given: Mapping[int, int]) -> None:
        """Leave what an instance has taken and not given to the next holder, and remove what it has given.

        Args:
            key: Key of the session.
            holder: Number of the instance.
            given: Highest sequence that it has given to the connection, by sender.
        """

    @abstractmethod
    async def withdraw(self, key: UUID, sender: int, sequence: int) -> Withdrawal:
        """Have a message not taken any more, unless an instance has taken it. May be repeated.

        Args:
            key: Key of the session.
            sender: Number of the instance that has said it, which alone calls this.
            sequence: The sender's own number of the message.
        """
