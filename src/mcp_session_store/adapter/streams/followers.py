"""Who waits for the events of which sessions: woken by what is stored here, and by what others store."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter.background import Wake
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.event_log import EventLog
    from mcp_session_store.records import NewEvent

__all__ = ["POLL_INTERVAL", "STANDALONE_INTERVAL", "Follower", "Following"]

POLL_INTERVAL: Final = 0.25
"""Seconds between two looks at whether other instances have stored anything, with one query for all who wait."""
STANDALONE_INTERVAL: Final = 2.0
"""Seconds between two such looks on behalf of standalone streams."""
KEYS_AT_ONCE: Final = 1000
"""Sessions that one query is for."""
GATHERING: Final = 0.005
"""Seconds in which hints gather before the log is asked."""
ASK_AGAIN: Final = 30.0
"""Seconds after which a log is asked again for hints; it gives them for longer."""
MAX_OFFERED: Final = 16
"""Messages that a client is given without an id before it has taken the first of them."""


class Follower:
    """One open response that follows a stream of a session."""

    def __init__(self, key: UUID, stream: str) -> None:
        self.key = key
        self.stream = stream
        self.head = 0
        """The newest event of the session that is known of."""
        self.closed = False
        """The response is to end."""
        self.answer: str | None = None
        """What the call is told then, as the message of a JSON-RPC error; `None`: nothing, the client comes back."""
        self.waiting = False
        """The client has got everything that is stored."""
        self.offered: deque[NewEvent] = deque()
        """Events that could not be stored, to be given to the client without an id."""
        self._wake = anyio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def moved(self, head: int) -> None:
        """An event was stored in the session."""
        if head > self.head:
            self.head = head
            self.wake()

    def offer(self, event: NewEvent) -> bool:
        """Give the client an event that cannot be stored, if it has all that is before it."""
        if self.closed or not self.waiting or len(self.offered) >= MAX_OFFERED:
            return False
        self.offered.append(event)
        self._wake.set()
        return True

    def close(self, answer: str | None = None) -> None:
        """Have the response end."""
        self.closed = True
        self.answer = answer
        self._wake.set()

    async def wait(self, seen: int, *, seconds: float, pause: bool = False) -> None:
        """Wait until there is more than was seen, or something else to do; no longer than this.

        Args:
            seen: Up to which sequence of the session the client has got what there is.
            seconds: How long.
            pause: Whether to wait although there is more.
        """
        if pause or (self.head <= seen and not self.closed and not self.offered):
            self.waiting = self.head <= seen
            with anyio.move_on_after(seconds):
                await self._wake.wait()
            self.waiting = False
        self._wake = anyio.Event()


class Following:
    """All followers of an instance.

    Those who wait for a call that runs elsewhere are few, and wait for every event. Standalone streams are many, nearly
    one for each session, and what is said on them elsewhere is seldom and can wait a little: they are looked at less
    often, and nobody is asked for hints about them. What is stored here wakes its followers at once.

    Args:
        log: What they follow.
        gone_after: How long after its last heartbeat another instance counts as gone.
    """

    def __init__(self, log: EventLog, *, gone_after: timedelta) -> None:
        self._log = log
        self._gone_after = gone_after
        self._followers: dict[UUID, dict[Follower, None]] = {}
        self._waiting: dict[str, dict[Follower, None]] = {}
        """Those who wait for calls that run elsewhere, by the name of the other instance."""
        self._gone: set[str] = set()
        self._asked_at = -math.inf
        self._watched_at = -math.inf
        self._standalone_at = -math.inf
        self._some_wait = anyio.Event()
        self.reliable_since = math.inf
        """Since when our own heartbeats have succeeded, by anyio's clock: before, others' may have failed too."""
        self.wake: Final = Wake(gathering=GATHERING)

    def add(self, follower: Follower, *, instance: str | None) -> None:
        """A response begins to follow.

        Args:
            follower: It.
            instance: The name of the other instance that runs the call; `None`: there is none.
        """
        self._followers.setdefault(follower.key, {})[follower] = None
        if instance is not None:
            self._waiting.setdefault(instance, {})[follower] = None
            self._asked_at = self._watched_at = -math.inf
            self._some_wait.set()
            self.wake.set()

    def remove(self, follower: Follower, *, instance: str | None) -> None:
        """It has ended."""
        of_session = self._followers[follower.key]
        del of_session[follower]
        if not of_session:
            del self._followers[follower.key]
        if instance is not None:
            waiting = self._waiting[instance]
            del waiting[follower]
            if not waiting:
                del self._waiting[instance]
                self._gone.discard(instance)

    def of(self, key: UUID, stream: str | None = None) -> list[Follower]:
        """Those who follow a session, or one stream of it, and are to go on."""
        followers = self._followers.get(key, ())
        return [f for f in followers if not f.closed and (stream is None or f.stream == stream)]

    def moved(self, key: UUID, stream: str, sequence: int) -> None:
        """An event was stored here, on a stream of a session."""
        for follower in self._followers.get(key, ()):
            if follower.stream == stream:
                follower.moved(sequence)

    def gone(self, instance: str) -> bool:
        """Whether another instance, for one of whose calls somebody waits, is known not to run any more."""
        return instance in self._gone

    async def poll(self) -> None:
        """Look once at what others have stored, and whether they run."""
        now = anyio.current_time()
        keys = {follower.key for waiting in self._waiting.values() for follower in waiting}
        if keys and now - self._asked_at > ASK_AGAIN:
            # Before the look: what comes after it is hinted at.
            await self._log.follow(keys)
            self._asked_at = now
        if now - self._standalone_at > STANDALONE_INTERVAL:
            keys.update(key for key in self._followers if self.of(key, STANDALONE_STREAM))
            self._standalone_at = now
        for some in _batched(keys, KEYS_AT_ONCE):
            for key, head in (await self._log.heads(some)).items():
                for follower in self._followers.get(key, ()):
                    follower.moved(head)
        if self._waiting and now - self._watched_at > self._gone_after.total_seconds() / 10:
            await self._watch()
            self._watched_at = now

    async def _watch(self) -> None:
        """Learn which of the instances that somebody waits for have stopped."""
        names = self._waiting.keys() - self._gone
        beats = await self._log.last_beats(names)
        # After an outage of the database nobody's heartbeat is young, and all run. Who stopped has none.
        certain = anyio.current_time() - self.reliable_since > self._gone_after.total_seconds()
        for name in names & self._waiting.keys():
            if name not in beats or (certain and beats[name] > self._gone_after):
                self._gone.add(name)
                for follower in self._waiting[name]:
                    follower.wake()

    async def listen(self) -> None:
        """Look as soon as the log hints at events, from when somebody first waits for a call that runs elsewhere."""
        await self._some_wait.wait()
        await self._log.listen(self._on_hint)

    def _on_hint(self, keys: Collection[UUID] | None) -> None:
        if keys is None or not self._followers.keys().isdisjoint(keys):
            self.wake.set()


def _batched(keys: Iterable[UUID], size: int) -> Iterator[list[UUID]]:
    """The keys, some at a time."""
    iterator = iter(keys)
    while some := list(islice(iterator, size)):
        yield some
