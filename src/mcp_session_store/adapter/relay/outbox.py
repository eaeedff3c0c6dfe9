"""The outbox: messages of clients on their way to other instances, posted in their order."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Pace, report_failure
from mcp_session_store.adapter.relay.outgoing import Outgoing
from mcp_session_store.adapter.responses import ShuttingDown, TooManyWait
from mcp_session_store.adapter.session_log import GONE
from mcp_session_store.errors import InvalidValue, SessionStoreError, StoreUnavailable
from mcp_session_store.mailbox import HOLDER, MessageKind, NewMessage
from mcp_session_store.stream_mail import NewStreamMessage, StreamMessageKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias
    from uuid import UUID

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.outage import Gate, RequestWait
    from mcp_session_store.adapter.session_log import SessionLog

    _Given: TypeAlias = tuple[Outgoing, NewMessage | NewStreamMessage]
    """A message on its way, and the same as it is given to the mailbox."""

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
POSTED_AT_ONCE: Final = 250
"""Most messages that are posted in one call."""
POST_INTERVAL: Final = 0.012
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
TOO_MANY: Final = "too many waiting"
"""Reason to drop a message: too many wait, here or in the mailbox."""
LATE: Final = "not posted in time"
"""Reason to drop a message: it has waited for too long for the store."""
STOPPED: Final = "not posted"
"""Reason to drop a message: the instance stops, and the store is away."""


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
        self.on_unheard: Callable[[UUID], None] = lambda _: None
        """Called where what is said for the stream of a session was hinted at to no instance."""
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
        self._hinted: set[UUID] = set()
        """Sessions of which a hint waits that was not given to the mailbox yet."""
        kinds = (*MessageKind, *StreamMessageKind)
        self._of = {kind: telemetry.of(log.namespace, kind=kind.value) for kind in kinds}

    @property
    def is_away(self) -> bool:
        """Whether messages wait for the store."""
        return self._is_away

    def hint(self, key: UUID) -> None:
        """Post a hint to the instance that has the stream of a session, unless one waits already."""
        if key not in self._hinted and self.put(Outgoing(HOLDER, key, MessageKind.STREAM, "")):
            self._hinted.add(key)

    def put(self, outgoing: Outgoing) -> bool:
        """Post a message for which nothing waits, unless too many wait; return whether it is accepted."""
        try:
            if self._is_closed:
                raise ShuttingDown
            self._count(outgoing)
            self._accept_unposted(outgoing)
        except SessionStoreError:
            self._log.dropped(outgoing.kind, STOPPED if self._is_closed else TOO_MANY)
            return False
        self._waiting[outgoing] = None
        self._wake.set()
        return True

    def withdraw(self, outgoing: Outgoing) -> bool:
        """Take back a message, which is lost by that; return whether the mailbox was never given it."""
        if outgoing.message is not None or outgoing not in self._waiting:
            return False
        self._over(outgoing, is_lost=True)
        return True

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
                    lost = await self._give(batch)
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
                    self._over(outgoing, error, is_lost=True)
                else:
                    for outgoing, _ in batch:
                        if outgoing not in lost:
                            telemetry.sent_messages.add(1, self._of[outgoing.kind])
                        self._over(outgoing, is_lost=outgoing in lost)
            self._is_away = False

    async def _give(self, batch: list[_Given]) -> set[Outgoing]:
        """Give messages to the mailbox, all of one sort; return those that reach no instance."""
        if said := [message for _, message in batch if isinstance(message, NewStreamMessage)]:
            answer = await self._mailbox.say(said)
            for key in answer.unheard:
                self.on_unheard(key)
            lost = {outgoing for outgoing, message in batch if message.sequence in answer.dropped}
            for outgoing in lost:
                self._log.dropped(outgoing.kind, TOO_MANY)
            return lost
        gone = await self._mailbox.post([message for _, message in batch if isinstance(message, NewMessage)])
        lost = {outgoing for outgoing, _ in batch if outgoing.recipient is not None and outgoing.recipient in gone}
        for outgoing in lost:
            self._log.dropped(outgoing.kind, GONE)
            if outgoing.kind in (MessageKind.ANSWER, MessageKind.PROGRESS) and outgoing.recipient is not None:
                self._report_gone(outgoing.recipient, outgoing.key)
        return lost

    def _batch(self, at_once: int) -> list[_Given]:
        """Return the next messages, all of one sender; they stay where they are until the mailbox has answered."""
        batch: list[_Given] = []
        late = []
        size = 0
        for outgoing in self._waiting:
            if outgoing.is_late:
                late.append(outgoing)
                continue
            message = outgoing.message = outgoing.message or self._new(outgoing)
            size += outgoing.size
            if batch and (
                size > BYTES_AT_ONCE
                or message.sender != batch[0][1].sender
                or isinstance(message, NewStreamMessage) != isinstance(batch[0][1], NewStreamMessage)
            ):
                break
            batch.append((outgoing, message))
            if len(batch) == at_once or outgoing is self._failed:
                break
        for outgoing in late:
            self._log.dropped(outgoing.kind, LATE)
            self._over(outgoing, is_lost=True)
        return batch

    def _new(self, outgoing: Outgoing) -> NewMessage | NewStreamMessage:
        self._sequence += 1
        if outgoing.kind is MessageKind.STREAM:
            self._hinted.discard(outgoing.key)
        return outgoing.made(self._question_ids.number, self._sequence)

    def _over(self, outgoing: Outgoing, failure: Exception | None = None, *, is_lost: bool = False) -> None:
        if outgoing.accepted:
            self._accepted -= 1
            self._accepted_bytes -= outgoing.size
            self._accepted_of[outgoing.key] -= outgoing.weight
            if not self._accepted_of[outgoing.key]:
                del self._accepted_of[outgoing.key]
        outgoing.end(failure)
        self._waiting.pop(outgoing, None)
        if outgoing.on_over is not None:
            outgoing.on_over(not is_lost)

    def _is_refused(self, batch: list[_Given]) -> bool:
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
