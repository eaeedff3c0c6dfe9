"""The outbox: messages of clients on their way to other instances, posted in their order."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Pace, report_failure
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.responses import ShuttingDown, TooManyWait
from mcp_session_store.adapter.session_log import GONE
from mcp_session_store.errors import InvalidValue, SessionStoreError, StoreUnavailable
from mcp_session_store.mailbox import MessageKind, NewMessage

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.outage import Gate, RequestWait
    from mcp_session_store.adapter.session_log import SessionLog

__all__ = ["Outbox", "Outgoing"]

logger = logging.getLogger(__name__)

MAX_ACCEPTED: Final = 10_000
"""Number of messages that may be accepted and not posted, while the store is away."""
MAX_ACCEPTED_BYTES: Final = 16 * 1024**2
"""Bytes of their bodies."""
MAX_ACCEPTED_OF_SESSION: Final = 2 * 1024**2
"""Bytes of those of one session, unless there is one only, so that no client takes all the room."""
WINDOW: Final = 60.0
"""Seconds within which the messages of one session are bounded."""
MAX_POSTED_BYTES: Final = 64 * 1024**2
"""Bytes that the clients of one session may post within that time, because a recipient may not read them."""
LEAST_BYTES: Final = 2048
"""Bytes that a message counts for at least."""
POSTED_AT_ONCE: Final = 250
"""Most messages that are posted in one call."""
POST_INTERVAL: Final = 0.015
"""Seconds between the beginnings of two posts, in which messages gather; a lone one is posted at once."""
BYTES_AT_ONCE: Final = 1024**2
"""Bytes of their bodies, beyond which a message is posted alone."""
LARGE: Final = 256 * 1024
"""Bytes beyond which a message may be what the mailbox does not take in time, while it answers otherwise."""
REFUSALS: Final = 2
"""Number of times that a large message fails alone, with heartbeats that succeed in between, until it is given up: the
messages of all other sessions wait behind it."""
MAX_REPORTED: Final = 1000
"""Number of instances whose absence is remembered as logged; beyond it, each is logged again."""
RETRY_INTERVAL: Final = 0.25
"""Seconds between two tries to post the last messages when the manager stops."""

NOT_STORED: Final = "not stored"
"""Reason to drop a message: the store does not take it."""
STOPPED: Final = "not posted"
"""Reason to drop a message: the instance stops, and the store is away."""
AWAY: Final = "away"
"""Reason to drop a message that can be done without: the store is away."""


class Outgoing:
    """One message on its way.

    Args:
        recipient: Number of the instance that it is for; `None`: all others.
        key: Key of its session.
        kind: What it is.
        body: The message as JSON text.
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
        "over_or_waiting",
        "recipient",
    )

    def __init__(self, recipient: int | None, key: UUID, kind: MessageKind, body: str) -> None:
        self.recipient = recipient
        self.key = key
        self.kind = kind
        self.body = body
        self.message: NewMessage | None = None
        """The message as it was first given to the mailbox, and is given again."""
        self.accepted = False
        """Whether its client got 202 before the mailbox has answered."""
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


class Outbox:
    """Posts messages to other instances, in the order of their arrival.

    A message is accepted when it is committed. While the store is away, those for sessions that are resident here are
    accepted into memory, because clients do not repeat an answer that is refused.

    Args:
        instances: This instance, with its mailbox and its number.
        gate: Where requests wait for the store.
        log: Counts and logs what becomes of messages.
    """

    def __init__(
        self,
        instances: Instances,
        gate: Gate,
        log: SessionLog,
    ) -> None:
        self._mailbox = instances.mailbox
        self._question_ids = instances.question_ids
        self._instances = instances
        self._gate = gate
        self._log = log
        self._waiting: dict[Outgoing, None] = {}
        """Messages that the mailbox has not answered, in their order; without those that were refused, although one of
        these may be on its way."""
        self._accepted = 0
        """Number of those that are accepted."""
        self._accepted_bytes = 0
        self._accepted_of: dict[UUID, int] = {}
        """Bytes of those of each session."""
        # From the clock, so that a number that is drawn again later goes on above.
        self._sequence = time.time_ns() // 1000
        self._lock = anyio.Lock()
        self._pace = Pace(POST_INTERVAL)
        self._wake = anyio.Event()
        self._is_away = False
        self._is_closed = False
        self._failed: Outgoing | None = None
        """The first of the messages whose post has failed; it is tried alone."""
        self._failed_at = 0.0
        self._refusals = 0
        """See `REFUSALS`."""
        self._posted: dict[UUID, int] = {}
        """Bytes of each session's messages within this window."""
        self._window_ends = 0.0
        self._reported: set[int] = set()
        """Numbers of instances that are gone, of which the log says so."""
        self._of = {kind: telemetry.of(log.namespace, kind=kind.value) for kind in MessageKind}

    async def accept(self, outgoing: Outgoing, waits: RequestWait, *, resident: bool) -> None:
        """Post a message; return when it is accepted.

        Args:
            outgoing: The message.
            waits: The request that brings it.
            resident: Whether its session is resident here, so that nothing has to be asked of the store.

        Raises:
            SessionStoreError: It is not accepted.
        """
        if self._is_closed:
            raise ShuttingDown
        self._count(outgoing)
        self._waiting[outgoing] = None
        self._wake.set()
        if not self._is_away:
            await outgoing.over_or_waiting.wait()
        if not outgoing.is_over:
            try:
                if resident:
                    self._accept_unposted(outgoing)
                    return
                await self._gate.hold(waits, outgoing.wait)
            except BaseException:
                # At once, because in a long outage any number of them may be refused.
                self._waiting.pop(outgoing, None)
                raise
        if outgoing.failure is not None:
            raise outgoing.failure

    def post_soon(self, outgoing: Outgoing) -> None:
        """Post a message that no client waits for; it is dropped where the store is away."""
        if self._is_closed or self._is_away or len(self._waiting) >= MAX_ACCEPTED:
            self._log.dropped(outgoing.kind, STOPPED if self._is_closed else AWAY)
            return
        self._waiting[outgoing] = None
        self._wake.set()

    def _count(self, outgoing: Outgoing) -> None:
        """Count the messages of a session."""
        now = clock.now()
        if now >= self._window_ends:
            self._posted.clear()
            self._window_ends = now + WINDOW
        before = self._posted.get(outgoing.key, 0)
        if before and before + outgoing.weight > MAX_POSTED_BYTES:
            raise TooManyWait("the clients of the session post too much to other instances")
        self._posted[outgoing.key] = before + outgoing.weight

    def _accept_unposted(self, outgoing: Outgoing) -> None:
        if self._accepted >= MAX_ACCEPTED or self._accepted_bytes + outgoing.size > MAX_ACCEPTED_BYTES:
            raise TooManyWait("too many messages wait to be posted to other instances")
        before = self._accepted_of.get(outgoing.key, 0)
        if before and before + outgoing.weight > MAX_ACCEPTED_OF_SESSION:
            raise TooManyWait("too many messages of the session wait to be posted to other instances")
        self._accepted_of[outgoing.key] = before + outgoing.weight
        self._accepted += 1
        self._accepted_bytes += outgoing.size
        outgoing.accepted = True

    async def run(self) -> None:
        """Post what comes, until cancelled.

        Raises:
            SessionStoreError: The store is away.
        """
        while True:
            if not self._waiting:
                self._wake = anyio.Event()
                await self._wake.wait()
            await self._post_all()

    async def close(self) -> None:
        """Post what is accepted, and take no more; until cancelled where the store stays away."""
        self._is_closed = True
        is_logged = False
        while self._waiting:
            try:
                await self._post_all()
            except Exception as error:
                report_failure("outbox", error, namespace=self._log.namespace, log=not is_logged)
                is_logged = True
                await anyio.sleep(RETRY_INTERVAL)

    def abandon(self) -> None:
        """Count and log what was accepted and could not be posted."""
        lost = [outgoing for outgoing in self._waiting if outgoing.accepted]
        for outgoing in lost:
            self._log.dropped(outgoing.kind, STOPPED)
        if lost:
            logger.warning("%d messages of clients to other instances are lost, because the store is away", len(lost))

    async def _post_all(self) -> None:
        """Post what waits."""
        async with self._lock:
            at_once = POSTED_AT_ONCE
            while self._waiting:
                if not self._instances.can_send:
                    self._went_away()
                    raise StoreUnavailable("messages wait for the heartbeats of this instance and of the others")
                if len(self._waiting) < POSTED_AT_ONCE:
                    await self._pace.wait()
                if not (batch := self._batch(at_once)):
                    break
                try:
                    gone = await self._mailbox.post([message for _, message in batch])
                except Exception as error:
                    is_passing = isinstance(error, SessionStoreError) and not isinstance(error, InvalidValue)
                    if is_passing and not self._is_refused(batch):
                        self._went_away()
                        raise
                    if len(batch) > 1:
                        # One of them is not taken.
                        at_once = 1
                        continue
                    outgoing = batch[0][0]
                    report_failure("outbox", error, key=outgoing.key, namespace=self._log.namespace)
                    self._log.dropped(outgoing.kind, NOT_STORED)
                    self._over(outgoing, error)
                else:
                    for outgoing, message in batch:
                        if message.recipient is not None and message.recipient in gone:
                            self._log.dropped(outgoing.kind, GONE)
                            self._report_gone(message.recipient, outgoing.key)
                        else:
                            telemetry.sent_messages.add(1, self._of[outgoing.kind])
                        self._over(outgoing)
            self._is_away = False

    def _batch(self, at_once: int) -> list[tuple[Outgoing, NewMessage]]:
        """Return the next messages, all of one sender; they stay where they are until the mailbox has answered."""
        batch: list[tuple[Outgoing, NewMessage]] = []
        size = 0
        for outgoing in self._waiting:
            message = outgoing.message = outgoing.message or self._new(outgoing)
            size += outgoing.size
            if batch and (size > BYTES_AT_ONCE or message.sender != batch[0][1].sender):
                break
            batch.append((outgoing, message))
            if len(batch) == at_once or outgoing is self._failed:
                break
        return batch

    def _new(self, outgoing: Outgoing) -> NewMessage:
        self._sequence += 1
        return NewMessage(
            recipient=outgoing.recipient,
            sender=self._question_ids.number,
            sequence=self._sequence,
            key=outgoing.key,
            kind=outgoing.kind,
            body=outgoing.body,
        )

    def _over(self, outgoing: Outgoing, failure: Exception | None = None) -> None:
        if outgoing.accepted:
            self._accepted -= 1
            self._accepted_bytes -= outgoing.size
            self._accepted_of[outgoing.key] -= outgoing.weight
            if not self._accepted_of[outgoing.key]:
                del self._accepted_of[outgoing.key]
        outgoing.end(failure)
        self._waiting.pop(outgoing, None)

    def _is_refused(self, batch: list[tuple[Outgoing, NewMessage]]) -> bool:
        """Note that a post has failed; return whether it is for the sake of its only message, which is too large."""
        first = batch[0][0]
        if self._failed is not first:
            self._failed, self._refusals = first, 0
        elif first.size > LARGE and self._instances.beaten_at > self._failed_at:
            self._refusals += 1
        self._failed_at = clock.now()
        return self._refusals >= REFUSALS

    def _report_gone(self, number: int, key: UUID) -> None:
        """Log the first message for an instance that is gone. A client may make up any number."""
        if number in self._reported:
            return
        if len(self._reported) >= MAX_REPORTED:
            self._reported.clear()
        self._reported.add(number)
        self._log.gone(key, number)

    def _went_away(self) -> None:
        self._is_away = True
        for outgoing in self._waiting:
            outgoing.over_or_waiting.set()
