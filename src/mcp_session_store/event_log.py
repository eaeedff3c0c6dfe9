"""The contract of an event log: the events of sessions' streams."""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID

import anyio

from mcp_session_store.retention import EventPolicy
from mcp_session_store.settings import checked_type
from mcp_session_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from mcp_session_store.records import EventPage, NewEvent
    from mcp_session_store.retention import EventSweepReport
    from mcp_session_store.store import SessionStore

__all__ = [
    "EVENT_PAGE",
    "EVENT_SWEEP_LIMIT",
    "LARGE_APPEND",
    "LEAST_EVENT_SWEEP",
    "NO_SESSION",
    "STANDALONE_STREAM",
    "STANDALONE_WAIT",
    "EventLog",
]

STANDALONE_STREAM: Final = "*"
"""Name of a session's stream that belongs to no call, and that a client opens by GET. All instances share it."""

STANDALONE_WAIT: Final = timedelta(seconds=30)
"""Time for which a message on the standalone stream waits for a client that opens the stream anew."""

NO_SESSION: Final = UUID(int=0)
"""Key that no session has. Its events are never stored, so that an append of one shows whether others would be."""

EVENT_PAGE: Final = 500
"""Most events of a page, unless `limit` is given."""

LARGE_APPEND: Final = 256 * 1024
"""Bytes of messages of an `append` above which it may take its time: a log lets no smaller one wait for it long."""

EVENT_SWEEP_LIMIT: Final = 5000
"""Number of events that one step of a sweep removes, more or less, unless `limit` is given."""

LEAST_EVENT_SWEEP: Final = 50
"""Smallest limit of a step that is worth its price: it removes about as many events of one log."""


class EventLog(Store):
    """Store of the events of sessions' streams, so that a broken stream can be resumed on any instance.

    Each session has a log of its own. An event gets the next sequence of its session when it is stored, whichever
    stream it belongs to and whichever instance stores it. A reader that can read an event can read all before it that
    are still kept: no event appears later than one that follows it. A log is a part of its session: events of a
    session that is not live are not stored, and a session that ends loses its log in the same moment.

    The rules for all methods are those of `SessionStore`, with two differences:

    * Failure: a call that is repeated after a failure may take effect twice, unless its method says otherwise. A log
      itself repeats nothing that may have taken effect.
    * Values: every method with a text as an argument raises `InvalidValue` for one that cannot be stored, and
      `append` for the texts of its events and for a `position` or `previous` above `MAX_POSITION`. One such event
      refuses its whole append, and no other call.

    Args:
        policy: Age, number and size of the events that are kept; the default policy unless given.
    """

    def __init__(self, *, policy: EventPolicy | None = None) -> None:
        if policy is not None:
            checked_type("policy", policy, EventPolicy, "an EventPolicy")
        self._policy = EventPolicy() if policy is None else policy

    @property
    def policy(self) -> EventPolicy:
        """Age, number and size of the events that are kept."""
        return self._policy

    @abstractmethod
    async def append(self, key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        """Store events of one session, all or none, in this order, durably before this returns.

        Args:
            key: Key of the session.
            events: Events to store, at least one. Each gets a sequence one above that of the event before.
            again: Whether an earlier call with the same events may have stored them. Then they are not
                stored twice; they are recognized by the stream and position of the first.

        Returns:
            The sequence of the first event, or `None` when the session is not live; then nothing is stored.

        Raises:
            EventTooLarge: The events take more bytes than the policy allows the whole session.
            InvalidValue: An event cannot be stored.
        """

    @abstractmethod
    async def read(self, key: UUID, stream: str, *, after: int, limit: int = EVENT_PAGE) -> EventPage | None:
        """Return a page of events of one stream, in their order.

        Args:
            key: Key of the session. Events of other sessions are never returned.
            stream: Name of the stream.
            after: Sequence of the last event that the caller knows.
            limit: Most events of the page. It may have fewer because they are large.

        Returns:
            The page, or `None` when the session has no log: nothing was ever stored of it, or it has ended.

        Raises:
            InvalidValue: No stream can have this name.
        """

    def is_of(self, store: SessionStore) -> bool:  # noqa: ARG002 - for overrides
        """Return whether the records that a store loads say the newest event of this log, as `heads` does.

        So a restore needs no other query before the first call of its session.
        """
        return False

    @abstractmethod
    async def heads(self, keys: Collection[UUID]) -> dict[UUID, int]:
        """Return the sequence of the newest event by session, without sessions that have no log."""

    @abstractmethod
    async def standalone_places(self, keys: Collection[UUID]) -> dict[UUID, int]:
        """Return by session the sequence after which a client is served that opens the standalone stream anew.

        That is the sequence just before the first message on the stream that was stored within `STANDALONE_WAIT`, or
        that of the session's newest event where there is none. Sessions that have no log are left out.
        """

    async def follow(self, keys: Collection[UUID]) -> None:  # noqa: ARG002
        """Ask for hints of new events of these sessions, for a minute or more."""
        return

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:  # noqa: ARG002
        """Pass on hints that events were stored in sessions that any instance follows, until cancelled.

        Hints may be late, duplicated or lost; `heads` is authoritative. A log without hints waits for ever, as this
        method does.

        Args:
            on_hint: Called with the keys of sessions, or with `None` when any may have new events.

        Raises:
            StoreUnavailable: No more hints will come from this call; it should be repeated.
        """
        await anyio.sleep_forever()

    @abstractmethod
    async def sweep(self, *, limit: int = EVENT_SWEEP_LIMIT) -> EventSweepReport:
        """Remove some of the events that are older than the policy keeps. The caller repeats it while there is `more`.

        Any number of instances may sweep at once: none waits for another.

        Args:
            limit: Number of events to remove, more or less.
        """
