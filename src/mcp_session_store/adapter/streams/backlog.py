"""Events that wait for a log that cannot be reached, within bounds: data alone, which `recorder` fills and stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Final, TypeAlias

from mcp_session_store.event_log import LARGE_APPEND, STANDALONE_STREAM
from mcp_session_store.records import EventKind, message_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from uuid import UUID

    from mcp_session_store.records import NewEvent

__all__ = ["STORED_AT_ONCE", "Backlog", "Followed", "SessionBacklog", "can_do_without", "ends_call"]

MAX_EVENTS: Final = 1000
"""Number of events that wait for one session."""
MAX_BYTES: Final = 4 * 1024**2
"""Bytes of messages that wait for one session."""
MAX_BYTES_IN_ALL: Final = 64 * 1024**2
"""Bytes of messages that wait for all sessions together."""
SMALL_ANSWER: Final = 280
"""Bytes of an answer that frees nothing, because the error that would wait in its place may be as large."""
Followed: TypeAlias = Mapping[tuple[str, int], int]
"""Positions that later events of streams have as their `previous`, by the places of those that are lost."""

STORED_AT_ONCE: Final = 100
"""Number of events of one session that are stored together."""


@dataclass(slots=True)
class SessionBacklog:
    """Events of one session that wait, in their order."""

    owned: Owned
    """What waits for the principal of the session; all sessions without one have it in common."""
    events: deque[NewEvent] = field(default_factory=deque)
    uncertain: set[tuple[str, int]] = field(default_factory=set)
    """Places of the events that the log may hold already, because the outcome of an attempt is unknown."""
    being_stored: int = 0
    """Number of the first events, with which an attempt is under way."""
    bytes: int = 0

    def next(self, limit: int) -> list[NewEvent]:
        """Return the events to store next: some that the log cannot hold yet, or one that it may.

        They are no large append, unless the first of them is one alone.
        """
        events: list[NewEvent] = []
        size = 0
        for event in islice(self.events, limit):
            size += message_bytes(event)
            if place_of(event) in self.uncertain or size > LARGE_APPEND:
                break
            events.append(event)
        return events or [self.events[0]]

    def excess(self, size: int) -> int:
        """Return by how much the bounds of a session would be exceeded with an event of this size more."""
        return max(self.bytes + size - MAX_BYTES, len(self.events) + 1 - MAX_EVENTS)

    def is_uncertain(self, event: NewEvent) -> bool:
        """Return whether the log may hold an event already."""
        return place_of(event) in self.uncertain

    def mark(self, events: Iterable[NewEvent]) -> None:
        """Note that the log may hold these events from now on."""
        self.uncertain.update(map(place_of, events))

    def unmark(self, events: Iterable[NewEvent]) -> None:
        """Note that it is known what became of these events."""
        self.uncertain.difference_update(map(place_of, events))


@dataclass(slots=True)
class Owned:
    """Sessions of one principal that have events waiting."""

    sessions: dict[UUID, SessionBacklog] = field(default_factory=dict)
    bytes: int = 0


class Backlog:
    """Events of all sessions that wait.

    When all that may wait does, each principal has an equal share, and each session of a principal an equal part of
    that. An event for which its share has room takes the place of what the principal with the most holds, or the
    session with the most of its own principal: first of events that are no answers, the latest first, then of answers.

    Args:
        instead_of: Returns the small error that waits in place of an answer that has to go.
        on_dropped: Called when events that are no answers have gone, with their number, and with what later events
            follow in place of those that a call can do without.
    """

    def __init__(
        self,
        instead_of: Callable[[NewEvent], NewEvent],
        on_dropped: Callable[[int, Followed], None],
    ) -> None:
        self.sessions: Final[dict[UUID, SessionBacklog]] = {}
        """Sessions that have events waiting, or just being stored."""
        self._instead_of = instead_of
        self._on_dropped = on_dropped
        self._owners: dict[Hashable, Owned] = {}
        """What waits by principal, because there may be many sessions."""
        self._bytes = 0

    def add(self, key: UUID, event: NewEvent, *, owner: Hashable, uncertain: bool) -> bool:
        """Have an event wait behind the others of its session, if there is room or others have to make it.

        Args:
            key: Key of the session.
            event: Event to add.
            owner: Principal of the session.
            uncertain: Whether the log may hold it already.

        Returns:
            Whether it waits.
        """
        size, is_answer = message_bytes(event), ends_call(event)
        if size > MAX_BYTES:
            return False
        waiting = self.sessions.get(key)
        while True:
            # First, so that others do not make room in vain.
            if waiting is None or (over := waiting.excess(size)) <= 0:
                if (over := self._bytes + size - MAX_BYTES_IN_ALL) <= 0:
                    break
                if (others := self._others(waiting, owner, size)) is not None:
                    if not self._make_room(*others, over, answers=is_answer):
                        return False
                    continue
            # An answer goes before what is no answer in its own session, and before nothing else.
            followed = self._drop(waiting, over) if waiting is not None and is_answer else None
            if followed is None:
                return False
            event = _following(event, followed)
        self.put(key, event, owner=owner, uncertain=uncertain)
        return True

    def _others(self, waiting: SessionBacklog | None, owner: Hashable, size: int) -> tuple[Owned, int, int] | None:
        """Return the principal that has to make room for an event of this size.

        Returns:
            The principal, and the bytes that it and each of its sessions keep at least; `None` where the event's own
            session is beyond its share.
        """
        owned = self._owners.get(owner) or Owned()
        share = MAX_BYTES_IN_ALL // (len(self._owners) + (not owned.sessions))
        if owned.bytes + size <= share:
            # Then another principal holds more than its share.
            return max(self._owners.values(), key=attrgetter("bytes")), share, 0
        share //= len(owned.sessions) + (waiting is None)
        return (owned, 0, share) if (0 if waiting is None else waiting.bytes) + size <= share else None

    def _make_room(self, owned: Owned, kept: int, kept_of_each: int, size: int, *, answers: bool) -> bool:
        """Free so many bytes of a principal's, or some, of the session with the most first; return whether it did."""
        before = owned.bytes
        least = max(before - size, kept)
        for waiting in sorted(owned.sessions.values(), key=attrgetter("bytes"), reverse=True):
            over = owned.bytes - least
            if over <= 0 or waiting.bytes <= kept_of_each:
                break
            if self._drop(waiting, over) is None and not (answers and self._shorten(waiting, over)):
                break  # rather than search all in vain
        return owned.bytes < before

    def _drop(self, waiting: SessionBacklog, size: int) -> Followed | None:
        """Drop events of a session that are no answers, the latest first, to free so many bytes, but one at least.

        Returns:
            What later events follow in place of those that a call can do without; `None` if there was none to drop.
        """
        dropped: set[tuple[str, int]] = set()
        for event in islice(reversed(waiting.events), len(waiting.events) - waiting.being_stored):
            if not ends_call(event):
                dropped.add(place_of(event))
                size -= message_bytes(event)
                if size <= 0:
                    break
        if not dropped:
            return None
        followed: dict[tuple[str, int], int] = {}
        for _ in range(len(waiting.events)):
            event = _following(waiting.events.popleft(), followed)
            if place_of(event) not in dropped:
                waiting.events.append(event)
                continue
            self._account(waiting, -message_bytes(event))
            if can_do_without(event):
                followed[place_of(event)] = event.previous
        waiting.uncertain -= dropped
        self._on_dropped(len(dropped), followed)
        return followed

    def _shorten(self, waiting: SessionBacklog, size: int) -> bool:
        """Have small errors wait in place of answers of a session, the latest first, to free so many bytes.

        Returns:
            Whether there was such an answer.
        """
        before = waiting.bytes
        for index in range(len(waiting.events) - 1, waiting.being_stored - 1, -1):
            event = waiting.events[index]
            # Passed over without a look at the error, because there may be very many answers.
            if ends_call(event) and message_bytes(event) > SMALL_ANSWER:
                instead = self._instead_of(event)
                self._account(waiting, message_bytes(instead) - message_bytes(event))
                waiting.events[index] = instead
                if before - waiting.bytes >= size:
                    break
        return waiting.bytes < before

    def put(self, key: UUID, event: NewEvent, *, owner: Hashable, uncertain: bool) -> None:
        """Have an event wait as `add` does, whether there is room or not."""
        if (waiting := self.sessions.get(key)) is None:
            owned = self._owners.setdefault(owner, Owned())
            waiting = self.sessions[key] = owned.sessions[key] = SessionBacklog(owned)
        waiting.events.append(event)
        if uncertain:
            waiting.mark([event])
        self._account(waiting, message_bytes(event))

    def holds(self, key: UUID, event: NewEvent) -> bool:
        """Return whether an event waits, or another in its place."""
        waiting = self.sessions.get(key)
        return waiting is not None and any(place_of(other) == place_of(event) for other in waiting.events)

    def replace_first(self, waiting: SessionBacklog, event: NewEvent) -> None:
        """Have another event wait in place of the first one of a session."""
        self._account(waiting, message_bytes(event) - message_bytes(waiting.events[0]))
        waiting.events[0] = event

    def remove_first(self, waiting: SessionBacklog) -> None:
        """Remove the event of a session that has waited longest."""
        self._account(waiting, -message_bytes(waiting.events.popleft()))

    def remove(self, key: UUID) -> None:
        """Remove a session of which nothing waits any more."""
        owned = self.sessions.pop(key).owned
        del owned.sessions[key]
        if not owned.sessions:
            self._owners = {owner: other for owner, other in self._owners.items() if other is not owned}

    def _account(self, waiting: SessionBacklog, size: int) -> None:
        waiting.bytes += size
        waiting.owned.bytes += size
        self._bytes += size


def place_of(event: NewEvent) -> tuple[str, int]:
    """Return what identifies an event within its session."""
    return event.stream, event.position


def ends_call(event: NewEvent) -> bool:
    """Return whether an event is the answer of a call, or the error in place of it."""
    return event.kind.final and event.stream != STANDALONE_STREAM


def can_do_without(event: NewEvent) -> bool:
    """Return whether a call goes on without an event, so that its client need not learn that it is lost."""
    return event.kind is EventKind.NOTIFICATION


def _following(event: NewEvent, followed: Followed) -> NewEvent:
    """Return an event that does not follow one that is lost."""
    previous = followed.get((event.stream, event.previous))
    return event if previous is None else replace(event, previous=previous)
