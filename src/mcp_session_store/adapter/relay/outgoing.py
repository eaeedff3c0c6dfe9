"""Messages on their way to other instances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.mailbox import NewMessage
from mcp_session_store.stream_mail import STREAM_WAIT, NewStreamMessage, StreamMessageKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from mcp_session_store.mailbox import MessageKind

__all__ = ["Outgoing", "Saying"]

LEAST_BYTES: Final = 2048
"""Bytes that a message counts for at least."""


class Outgoing:
    """One message on its way.

    Args:
        recipient: Number of the instance that it is for; `None`: all others; `HOLDER`: the one that has the stream.
        key: Key of its session.
        kind: What it is.
        body: The message as JSON text.
        on_over: Called when it is known whether the message is stored for a recipient.
    """

    __slots__ = (
        "_over",
        "accepted",
        "body",
        "failure",
        "is_over",
        "key",
        "kind",
        "message",
        "on_over",
        "over_or_waiting",
        "recipient",
    )

    def __init__(
        self,
        recipient: int | None,
        key: UUID,
        kind: MessageKind | StreamMessageKind,
        body: str,
        on_over: Callable[[bool], None] | None = None,
    ) -> None:
        self.recipient = recipient
        self.key = key
        self.kind = kind
        self.body = body
        self.on_over = on_over
        self.message: NewMessage | NewStreamMessage | None = None
        """The message as it was first given to the mailbox, and is given again."""
        self.accepted = False
        """Whether it waits although its client got 202, or although nothing waits for it."""
        self.is_over = False
        """Whether the mailbox has answered."""
        self.failure: Exception | None = None
        """Why the mailbox did not take it."""
        self.over_or_waiting = Latch()
        """The mailbox has answered, or is away."""
        self._over: Latch | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, about."""
        return len(self.body)

    @property
    def weight(self) -> int:
        """Bytes that it counts for where the messages of one session are bounded."""
        return max(self.size, LEAST_BYTES)

    @property
    def is_late(self) -> bool:
        """Whether it has waited for so long that it is not posted any more."""
        return False

    def made(self, sender: int, sequence: int) -> NewMessage | NewStreamMessage:
        """Return the message for the mailbox."""
        assert not isinstance(self.kind, StreamMessageKind)
        return NewMessage(
            recipient=self.recipient, sender=sender, sequence=sequence, key=self.key, kind=self.kind, body=self.body
        )

    def end(self, failure: Exception | None = None) -> None:
        """Note that the mailbox has answered."""
        self.is_over = True
        self.failure = failure
        self.over_or_waiting.set()
        if self._over is not None:
            self._over.set()

    async def wait(self) -> None:
        """Wait until the mailbox has answered, which is away now."""
        if not self.is_over:
            if self._over is None:
                self._over = Latch()
            await self._over.wait()


class Saying(Outgoing):
    """What a copy says outside of a call, while the client's stream is not open here.

    Args:
        key: Key of the session.
        kind: What it is.
        body: The message as JSON text.
        on_over: Called when it is known whether it waits for the stream.
        session_is_heard: Returns whether the stream is open here, so that its client waits for the message.
    """

    __slots__ = ("_said_at", "_session_is_heard")

    def __init__(
        self,
        key: UUID,
        kind: StreamMessageKind,
        body: str,
        on_over: Callable[[bool], None],
        *,
        session_is_heard: Callable[[], bool],
    ) -> None:
        super().__init__(None, key, kind, body, on_over)
        self._said_at = clock.now()
        self._session_is_heard = session_is_heard

    @property
    def is_late(self) -> bool:
        if self.message is not None or clock.now() < self._said_at + STREAM_WAIT.total_seconds():
            return False
        return not self._session_is_heard()

    def made(self, sender: int, sequence: int) -> NewStreamMessage:
        assert isinstance(self.kind, StreamMessageKind)
        return NewStreamMessage(key=self.key, sender=sender, sequence=sequence, kind=self.kind, body=self.body)
