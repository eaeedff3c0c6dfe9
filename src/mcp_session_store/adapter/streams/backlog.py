"""Events that wait for a log that cannot be reached, within bounds: data alone, which `recorder` fills and stores."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from mcp_session_store.records import message_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from mcp_session_store.records import NewEvent

__all__ = ["Backlog", "SessionBacklog"]

MAX_EVENTS: Final = 1000
"""Number of events that wait for one session."""
MAX_BYTES: Final = 4 * 1024**2
"""Bytes of messages that wait for one session."""
MAX_BYTES_IN_ALL: Final = 64 * 1024**2
"""Bytes of messages that wait for all sessions together."""


@dataclass(slots=True)
class SessionBacklog:
    """Events of one session that wait, in their order."""

    events: deque[NewEvent] = field(default_factory=deque)
    uncertain: set[tuple[str, int]] = field(default_factory=set)
    """Places of the events that the log may hold already, because the outcome of an attempt is unknown."""
    bytes: int = 0

    def next(self, limit: int) -> list[NewEvent]:
        """Return the events to store next: some that the log cannot hold yet, or one that it may."""
        certain = takewhile(lambda event: place_of(event) not in self.uncertain, self.events)
        return list(islice(certain, limit)) or [self.events[0]]

    def is_uncertain(self, event: NewEvent) -> bool:
        """Return whether the log may hold an event already."""
        return place_of(event) in self.uncertain

    def mark(self, events: Iterable[NewEvent]) -> None:
        """Note that the log may hold these events from now on."""
        self.uncertain.update(map(place_of, events))

    def unmark(self, events: Iterable[NewEvent]) -> None:
        """Note that it is known what became of these events."""
        self.uncertain.difference_update(map(place_of, events))


class Backlog:
    """Events of all sessions that wait."""

    def __init__(self) -> None:
        self.sessions: Final[dict[UUID, SessionBacklog]] = {}
        """Sessions that have events waiting, or just being stored."""
        self._bytes = 0

    def has_room(self, key: UUID, event: NewEvent) -> bool:
        """Return whether an event can wait within all bounds."""
        size = message_bytes(event)
        if self._bytes + size > MAX_BYTES_IN_ALL:
            return False
        waiting = self.sessions.get(key)
        if waiting is None:
            return size <= MAX_BYTES
        return len(waiting.events) < MAX_EVENTS and waiting.bytes + size <= MAX_BYTES

    def add(self, key: UUID, event: NewEvent, *, uncertain: bool) -> None:
        """Have an event wait behind the others of its session, whether there is room or not.

        Args:
            key: Key of the session.
            event: Event to add.
            uncertain: Whether the log may hold it already.
        """
        waiting = self.sessions.setdefault(key, SessionBacklog())
        waiting.events.append(event)
        if uncertain:
            waiting.mark([event])
        self._account(waiting, message_bytes(event))

    def replace_first(self, waiting: SessionBacklog, event: NewEvent) -> None:
        """Have another event wait in place of the first one of a session."""
        self._account(waiting, message_bytes(event) - message_bytes(waiting.events[0]))
        waiting.events[0] = event

    def remove_first(self, waiting: SessionBacklog) -> None:
        """Remove the event of a session that has waited longest."""
        self._account(waiting, -message_bytes(waiting.events.popleft()))

    def _account(self, waiting: SessionBacklog, size: int) -> None:
        waiting.bytes += size
        self._bytes += size


def place_of(event: NewEvent) -> tuple[str, int]:
    """Return what identifies an event within its session."""
    return event.stream, event.position
