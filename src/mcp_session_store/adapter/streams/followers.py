"""Open responses that follow a stream, and how they learn of new events.

At once from this instance, by notification or polling from others.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import anyio

from mcp_session_store.adapter.background import Wake, report_failure
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from uuid import UUID

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.streams.event_ids import Cursor
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.records import NewEvent

__all__ = ["POLL_INTERVAL", "STANDALONE_INTERVAL", "Follower", "Followers"]

POLL_INTERVAL: Final = 0.25
"""Seconds between two polls for events that other instances have stored, with one query for all followers."""
STANDALONE_INTERVAL: Final = 2.0
"""Seconds between two polls on behalf of standalone streams, where instances give no hints of what they say there."""
HINTED_INTERVAL: Final = 60.0
"""Seconds between two such polls where they do. A hint is lost with the instance that is about to give it."""
REMEMBERED: Final = 60.0
"""Seconds for which is remembered how far a standalone stream got whose response has ended."""
KEYS_AT_ONCE: Final = 1000
"""Number of sessions that one query asks for."""
GATHERING: Final = 0.005
"""Seconds in which notifications gather before the log is asked."""
ASK_AGAIN: Final = 30.0
"""Seconds after which a log is asked again for notifications; it sends them for longer."""
MAX_UNSENT: Final = 16
"""Number of live messages without an id that wait for a client to take the first of them."""


class Follower:
    """Open response that follows one stream of a session.

    Args:
        key: Key of the session.
        stream: Name of the stream.
        cursor: Place of the last event that the client has; `None`: it is not known yet.
    """

    def __init__(self, key: UUID, stream: str, cursor: Cursor | None) -> None:
        self.key = key
        self.stream = stream
        self.sent = cursor
        """Place of the last event that was given to the connection; `None`: it is not known yet."""
        self.head = 0
        """Sequence of the newest event that is known of, of the session as polled or of the stream as stored here."""
        self.closed = False
        """Whether the response is to end."""
        self.answer: str | None = None
        """Message of the JSON-RPC error for the call when the response ends; `None` if the client comes back."""
        self.behind = False
        """Whether the log may have events that are not known of here."""
        self.succeeded = False
        """Whether a later response of this instance has the stream."""
        self.waiting = False
        """Whether the client has received everything that is stored."""
        self.in_hand: list[Any] = []
        """Events that were read and are being sent. They may have a megabyte, and the client may not take them."""
        self.unsent: deque[NewEvent] = deque()
        """Events that could not be stored, to be sent without an id."""
        self._wake = anyio.Event()

    def wake(self) -> None:
        """Have the response check whether there is something to do."""
        self._wake.set()

    def look(self) -> None:
        """Have the response read the log, because another instance may have stored something for it."""
        self.behind = True
        self.wake()

    def has_more(self, seen: int) -> bool:
        """Return whether there is, or may be, an event after those up to a sequence."""
        return self.head > seen or self.behind

    def advance(self, head: int) -> None:
        """Note that the log holds events up to this sequence."""
        if head > self.head:
            self.head = head
            self.wake()

    def deliver(self, event: NewEvent) -> bool:
        """Deliver an event that cannot be stored, unless its client lacks events before it; return whether it will.

        The client has it already where the log stored it without saying so, and it was read since.
        """
        if self.sent is not None and self.sent.position == event.position:
            return True
        if self.closed or not self.waiting or len(self.unsent) >= MAX_UNSENT:
            return False
        self.unsent.append(event)
        self._wake.set()
        return True

    def close(self, answer: str | None = None) -> None:
        """End the response.

        Args:
            answer: Message of the JSON-RPC error for the call; unless given, the client comes back.
        """
        self.closed = True
        self.answer = answer
        if answer is None:
            self.in_hand.clear()
        self._wake.set()

    async def wait(self, seen: int, *, seconds: float, pause: bool = False) -> None:
        """Wait until there is an event that was not seen, or something else to do.

        Args:
            seen: Sequence of the session up to which the client has received the stream.
            seconds: Seconds to wait at most.
            pause: Whether to wait although there is more to read.
        """
        if pause or not (self.has_more(seen) or self.closed or self.unsent):
            self.waiting = self.head <= seen
            with anyio.move_on_after(seconds):
                await self._wake.wait()
            self.waiting = False
        self._wake = anyio.Event()


class Followers:
    """All open responses of this instance that tail a stream.

    Those that tail a call of another instance are few, and follow every event. Standalone streams are many, nearly one
    for each session, and what other instances say on them is rare and can wait a little: they are polled less often,
    and without notifications. An event that is stored here wakes its followers at once.

    Args:
        log: Log that holds the streams.
        instances: Finds out which instances are dead.
    """

    def __init__(self, log: EventLog, instances: Instances) -> None:
        self._log = log
        self._instances = instances
        self._by_session: dict[UUID, dict[Follower, None]] = {}
        self._by_instance: dict[str, dict[Follower, None]] = {}
        """Followers of calls that run elsewhere, by the name of the other instance."""
        self._dead: set[str] = set()
        """Names of the instances in `_by_instance` that are dead."""
        self._asked_at = -math.inf
        """Time at which the log was last asked for notifications."""
        self._checked_at = -math.inf
        """Time at which the other instances were last checked."""
        self._standalone_at = -math.inf
        """Time of the last poll on behalf of standalone streams."""
        self._reliable_since = math.inf
        """Since when this instance's heartbeats had succeeded then."""
        self.standalone_interval = STANDALONE_INTERVAL
        """Seconds between two of these polls."""
        self._ended: dict[UUID, tuple[float, int]] = {}
        """When the responses of standalone streams ended, and up to which sequence they got, the earliest first."""
        self.wake: Final = Wake(gathering=GATHERING)

    def add(self, follower: Follower, *, instance: str | None) -> None:
        """Add a response.

        Args:
            follower: The response.
            instance: Name of the other instance that runs the call, or `None`.
        """
        of_session = self._by_session.setdefault(follower.key, {})
        for other in of_session:
            if other.stream == follower.stream:
                self._remember(other)
                other.succeeded = True
        of_session[follower] = None
        if instance is not None:
            self._by_instance.setdefault(instance, {})[follower] = None
            # At the next poll, which is near. With one at once, a client that comes back again and again would have
            # all responses polled for.
            self._asked_at = self._checked_at = -math.inf

    def remove(self, follower: Follower, *, instance: str | None) -> None:
        """Remove a response that has ended, with the arguments of `add`."""
        of_session = self._by_session[follower.key]
        del of_session[follower]
        if not of_session:
            del self._by_session[follower.key]
        self._remember(follower)
        if instance is not None:
            of_instance = self._by_instance[instance]
            del of_instance[follower]
            if not of_instance:
                del self._by_instance[instance]
                self._dead.discard(instance)

    def _remember(self, follower: Follower) -> None:
        """Remember how far a standalone stream got whose response ends, unless a later one has taken it over."""
        if follower.stream != STANDALONE_STREAM or follower.sent is None or follower.succeeded:
            return
        key, now = follower.key, anyio.current_time()
        self._ended.pop(key, None)
        self._ended[key] = (now, follower.sent.sequence)
        while (earliest := next(iter(self._ended))) and now - self._ended[earliest][0] > REMEMBERED:
            del self._ended[earliest]

    def forget(self, key: UUID) -> None:
        """Forget how far the standalone stream of a session got, because its log was lost or set back."""
        self._ended.pop(key, None)
        for follower in self._by_session.get(key, ()):
            if follower.stream == STANDALONE_STREAM:
                follower.succeeded = True

    def given(self, key: UUID) -> int | None:
        """Return the sequence up to which the events of a session's standalone stream were given to its connection.

        `None`: none were within the last minute, or none that have a sequence.
        """
        for follower in self._by_session.get(key, ()):
            if follower.stream == STANDALONE_STREAM and not follower.succeeded and follower.sent is not None:
                return follower.sent.sequence
        ended_at, sequence = self._ended.get(key, (-math.inf, 0))
        return sequence if anyio.current_time() - ended_at < REMEMBERED else None

    def look(self, key: UUID) -> None:
        """Have the response with the standalone stream of a session read the log."""
        for follower in self.of(key, STANDALONE_STREAM):
            follower.look()

    def of(self, key: UUID, stream: str | None = None) -> list[Follower]:
        """Return the responses of a session, or of one of its streams, that are not about to end."""
        followers = self._by_session.get(key, ())
        return [f for f in followers if not f.closed and (stream is None or f.stream == stream)]

    def close_but_calls_here(self) -> bool:
        """End all responses but those that follow a call of this instance; return whether there are any of these."""
        elsewhere = {follower for of_instance in self._by_instance.values() for follower in of_instance}
        calls_here = False
        for of_session in self._by_session.values():
            for follower in of_session:
                if follower.stream == STANDALONE_STREAM or follower in elsewhere:
                    follower.close()
                else:
                    calls_here = calls_here or not follower.closed
        return calls_here

    def advance(self, key: UUID, stream: str, sequence: int) -> None:
        """Wake the responses of a stream of which an event was stored here."""
        if self._by_session:
            for follower in self._by_session.get(key, ()):
                if follower.stream == stream:
                    follower.advance(sequence)

    def is_dead(self, instance: str) -> bool:
        """Return whether another instance, one of whose calls is followed here, is known to be dead."""
        return instance in self._dead

    async def poll(self) -> None:
        """Check once what other instances have stored, and whether they run."""
        now = anyio.current_time()
        keys = {follower.key for of_instance in self._by_instance.values() for follower in of_instance}
        if keys and now - self._asked_at > ASK_AGAIN:
            # Before the poll, so that events which come after it are notified of.
            try:
                await self._log.follow(keys)
            except Exception as error:
                # Polling is enough. A log that one of them has locked would keep all from it.
                report_failure("notifications", error, namespace=self._log.namespace)
            self._asked_at = now
        reliable_since = self._instances.reliable_since
        # After an outage, too, in which hints may have been lost.
        if now - self._standalone_at > self.standalone_interval or self._reliable_since != reliable_since < math.inf:
            keys.update(key for key in self._by_session if self.of(key, STANDALONE_STREAM))
            self._standalone_at, self._reliable_since = now, reliable_since
        for some in _batched(keys, KEYS_AT_ONCE):
            for key, head in (await self._log.heads(some)).items():
                for follower in self._by_session.get(key, ()):
                    follower.advance(head)
        if self._by_instance and now - self._checked_at > self._instances.check_interval:
            await self._check_instances()
            self._checked_at = now

    async def _check_instances(self) -> None:
        """Wake the followers of calls whose instance is dead."""
        for name in await self._instances.find_dead(self._by_instance.keys() - self._dead):
            # Its followers may have ended meanwhile.
            if (of_instance := self._by_instance.get(name)) is not None:
                self._dead.add(name)
                for follower in of_instance:
                    follower.wake()

    async def listen(self) -> None:
        """Poll as soon as the log notifies of events."""
        await self._log.listen(self._on_notification)

    def _on_notification(self, keys: Collection[UUID] | None) -> None:
        if keys is None or not self._by_session.keys().isdisjoint(keys):
            self.wake.set()


def _batched(keys: Iterable[UUID], size: int) -> Iterator[list[UUID]]:
    """Return the keys, some at a time."""
    iterator = iter(keys)
    while some := list(islice(iterator, size)):
        yield some
