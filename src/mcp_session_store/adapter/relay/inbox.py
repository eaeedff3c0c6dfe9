"""The inbox: messages of other instances, read from the mailbox in the background."""

from __future__ import annotations

import math
import random
from heapq import merge
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Wake
from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.mailbox import MessageKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.mailbox import Message, MessagePage

__all__ = ["Inbox"]

BUSY_INTERVAL: Final = 0.15
"""Seconds between two reads where no hints of new messages arrive, while something may wait for one here."""
IDLE_INTERVAL: Final = 15.0
"""Seconds between two reads otherwise. By default heartbeats, each of which reads first, come more often. So an idle
process sends about one statement a second in all."""
READ_INTERVAL: Final = 0.015
"""Seconds between the beginnings of two reads at hints, in which messages gather; a lone one is read at once."""
ASKED_FOR: Final = 300.0
"""Seconds for which a question that is asked outside of calls and streams may wait for its answer."""
BEFORE_BEAT: Final = 5.0
"""Seconds after which a heartbeat waits no longer for the end of what is read before it, which may never come."""
GATHERED: Final = 4 * 1024**2
"""Bytes of bodies that are read before they are handed out, so that all that was posted by then is in order."""
RECENT_SENDERS: Final = 64
"""Number of senders whose messages a read names as read before, those heard of last. Each costs SQLite a statement."""
KNOWN_SENDERS: Final = 100_000
"""Number of senders for which the highest sequence that was read is remembered."""


class Inbox:
    """Reads what is for this instance, and hands it out in order.

    Args:
        instances: This instance, with its mailbox and its number.
        registry: Registry of the sessions in memory.
        deliver: Takes each message.
    """

    def __init__(
        self,
        instances: Instances,
        registry: Registry,
        deliver: Callable[[Message], None],
    ) -> None:
        self._mailbox = instances.mailbox
        self._instances = instances
        self._registry = registry
        self._deliver = deliver
        self._lock = anyio.Lock()
        self._read_up_to: dict[int, int] = {}
        """Highest sequence that was read of each sender, in the order in which they were last heard of.

        Memory and reader die together.
        """
        self._recent: dict[int, int] = {}
        """Those of them that the next read names to the mailbox, which removes and leaves out what is up to them."""
        self.failing = False
        """Whether the mailbox did not answer the last read."""
        self._asked_at = -math.inf
        self._read_at = -math.inf
        """Moment of `clock` at which all was read last."""
        self.wake: Final = Wake(gathering=0, interval=READ_INTERVAL)
        """Has the mailbox read at once."""

    def asked(self) -> None:
        """Note that a copy here asks its client, so that the answer is soon looked for."""
        self._asked_at = clock.now()
        if not self._mailbox.hears:
            self.wake.set()

    async def run(self) -> None:
        """Read, until cancelled.

        Raises:
            SessionStoreError: The mailbox did not answer.
        """
        while True:
            await self.read()
            jitter = random.uniform(0.7, 1.0)  # noqa: S311
            # From the last read on, which may be that of a heartbeat.
            while (pause := self._read_at + self._interval * jitter - clock.now()) > 0:
                # Nothing wakes this when a call begins that another instance may be told to cancel.
                if await self.wake.wait(pause if self._mailbox.hears else min(pause, BUSY_INTERVAL)):
                    break

    @property
    def _interval(self) -> float:
        if self._mailbox.hears:
            return IDLE_INTERVAL
        waits = self._registry.busy or clock.now() < self._asked_at + ASKED_FOR
        return BUSY_INTERVAL if waits else IDLE_INTERVAL

    async def read_before_beat(self) -> None:
        """Read what waits before this instance says that it runs, because messages much older than that are removed.

        Raises:
            StoreUnavailable: The store is away. After any other failure, which the background task reports, the
                heartbeat goes on: without it the calls that run here would be taken for lost.
        """
        try:
            await self.read(within=BEFORE_BEAT)
        except StoreUnavailable:
            raise
        except Exception:
            self.wake.set()

    async def read(self, *, within: float = math.inf) -> None:
        """Read all that has been posted to this instance, and hand it out.

        Args:
            within: Seconds after which the rest is left to another call.

        Raises:
            SessionStoreError: The mailbox did not answer.
        """
        until, more = clock.now() + within, True
        while more and clock.now() < until:
            # Not for all of it, because those that post without an end must not keep other calls waiting.
            async with self._lock:
                # Not before one is entered, because another instance may have the number.
                number = self._instances.entered
                more = number is not None and await self._read_some(number)
        if not more:
            self._read_at = clock.now()

    async def _read_some(self, number: int) -> bool:
        """Read some pages, and hand out what is in them; return whether there may be more."""
        arrived: dict[int, list[tuple[float, Message]]] = {}
        size, more = 0, True
        try:
            while more and size < GATHERED:
                try:
                    page = await self._mailbox.receive(number, delivered=self._recent)
                except BaseException:
                    self.failing = True
                    raise
                self.failing = False
                more = page.more
                size += self._take(page, arrived)
        finally:
            # What was read is removed by the next read. Messages of different senders go by their times, progress
            # first, because a client may post progress to one instance and the answer after it to another.
            for _, message in merge(*arrived.values(), key=_order):
                self._deliver(message)
        return more

    def _take(self, page: MessagePage, arrived: dict[int, list[tuple[float, Message]]]) -> int:
        """Take the messages of a page that were not read before, by their senders; return the bytes of their bodies."""
        now, size = clock.now(), 0
        for message in page.messages:
            sender = message.sender
            up_to = self._read_up_to.pop(sender, -1)
            if message.sequence > up_to:
                posted_at = now - message.age.total_seconds()
                of_sender = arrived.setdefault(sender, [])
                # The clock of the store may be put back, the order of one sender stays.
                of_sender.append((max(posted_at, of_sender[-1][0]) if of_sender else posted_at, message))
                size += len(message.body)
                up_to = message.sequence
            self._read_up_to[sender] = up_to
            self._recent.pop(sender, None)
            self._recent[sender] = up_to
        _forget(self._read_up_to, KNOWN_SENDERS)
        _forget(self._recent, RECENT_SENDERS)
        return size


def _order(item: tuple[float, Message]) -> tuple[float, bool]:
    posted_at, message = item
    return posted_at, message.kind is not MessageKind.PROGRESS


def _forget(senders: dict[int, int], most: int) -> None:
    while len(senders) > most:
        del senders[next(iter(senders))]
