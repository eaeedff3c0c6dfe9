"""Events that wait for a log that cannot be reached, within bounds: data alone, which `recorder` fills and stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
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
Followed: TypeAlias = Mapping[tuple[str, int], int]
"""Positions that later events of streams have as their `previous`, by the places of those that are lost."""

STORED_AT_ONCE: Final = 100
"""Number of events of one session that are stored together."""


@dataclass(slots=True)
class SessionBacklog:
    """Events of one session that wait, in their order."""

    owner: Hashable
    """Principal of the session; all sessions without one have `None`."""
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
            victim: SessionBacklog | None
            # First, so that others do not make room in vain.
            if waiting is not None and (over := waiting.excess(size)) > 0:
                victim = waiting
            elif (over := self._bytes + size - MAX_BYTES_IN_ALL) > 0:
                victim = self._victim(key, owner, size)
            else:
                break
            if victim is None or (victim is waiting and not is_answer):
                return False
            followed = self._drop(victim, over)
            if victim is waiting:
                # An answer goes before what is no answer in its own session, and before nothing else.
                if followed is None:
                    return False
                event = _following(event, followed)
            elif followed is None and not (is_answer and self._shorten(victim)):
                return False
        self.put(key, event, owner=owner, uncertain=uncertain)
        return True

    def _victim(self, key: UUID, owner: Hashable, size: int) -> SessionBacklog | None:
        """Return the session that has to make room for an event of this size; `None`: its own, which has nothing."""
        held: dict[Hashable, int] = {owner: 0}
        for waiting in self.sessions.values():
            held[waiting.owner] = held.get(waiting.owner, 0) + waiting.bytes
        share = MAX_BYTES_IN_ALL // len(held)
        if held[owner] + size <= share:
            # Then another principal holds more than its share.
            owner = max(held, key=lambda other: held[other])
            return max(self._of(owner), key=lambda waiting: waiting.bytes)
        own = self.sessions.get(key)
        sessions = self._of(owner)
        share //= len(sessions) + (own is None)
        if (0 if own is None else own.bytes) + size <= share:
            return max(sessions, key=lambda waiting: waiting.bytes)
        return own

    def _of(self, owner: Hashable) -> list[SessionBacklog]:
        return [waiting for waiting in self.sessions.values() if waiting.owner == owner]

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

    def _shorten(self, waiting: SessionBacklog) -> bool:
        """Have a small error wait in place of the latest answer of a session; return whether there was one."""
        for index in range(len(waiting.events) - 1, waiting.being_stored - 1, -1):
            event = waiting.events[index]
            if ends_call(event):
                instead = self._instead_of(event)
                if message_bytes(instead) < message_bytes(event):
                    self._account(waiting, message_bytes(instead) - message_bytes(event))
                    waiting.events[index] = instead
                    return True
        return False

    def put(self, key: UUID, event: NewEvent, *, owner: Hashable, uncertain: bool) -> None:
        """Have an event wait as `add` does, whether there is room or not."""
        if (waiting := self.sessions.get(key)) is None:
            waiting = self.sessions[key] = SessionBacklog(owner)
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

    def _account(self, waiting: SessionBacklog, size: int) -> None:
        waiting.bytes += size
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
