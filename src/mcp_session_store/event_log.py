"""The contract of an event log: the events of sessions' streams, and which instances are running."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Final
from uuid import UUID

import anyio

from mcp_session_store.retention import EventPolicy
from mcp_session_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import timedelta

    from mcp_session_store.records import EventPage, NewEvent
    from mcp_session_store.retention import EventSweepReport

__all__ = [
    "EVENT_PAGE",
    "EVENT_SWEEP_LIMIT",
    "NO_SESSION",
    "STANDALONE_STREAM",
    "EventLog",
]

STANDALONE_STREAM: Final = "*"
"""The stream of a session that belongs to no call: what a client gets by GET. All instances share it."""

NO_SESSION: Final = UUID(int=0)
"""The key of no session: an event of it is never stored, and trying to tells whether others would be."""

EVENT_PAGE: Final = 500
"""Events that are read at once, unless it is told otherwise."""

EVENT_SWEEP_LIMIT: Final = 5000
"""Events that one step of a sweep removes, more or less, unless it is told otherwise."""


class EventLog(Store):
    """Keeps the events of sessions' streams, so that a stream that broke can be resumed, on any instance.

    Each session has a log of its own. An event gets the next sequence of its session when it is stored, whichever
    stream it belongs to and whichever instance stores it, and who can read an event can read all before it that
    are still kept: no event appears later than one that follows it. A log is a part of its session: events of a
    session that is not live are not stored, and a session that ends loses its log in the same moment.

    It also knows which instances are running, so that a client learns whether the call that it waits for has died.

    The rules for all methods are those of `SessionStore`, but that repeating a call after a failure may do it twice,
    where it does not say otherwise: a log itself repeats nothing that may have taken effect. All methods with an
    argument that is a text, and `append` with the texts of its events, raise `InvalidValue` as described there; so
    does `append` for a `position` or `previous` above `MAX_POSITION`. One such event refuses its whole append, and no
    other call.

    Args:
        policy: How long events are kept, and how many; the default policy unless given.
    """

    def __init__(self, *, policy: EventPolicy | None = None) -> None:
        self._policy = EventPolicy() if policy is None else policy

    @property
    def policy(self) -> EventPolicy:
        """How long events are kept, and how many of a session."""
        return self._policy

    @abstractmethod
    async def append(self, key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        """Store events of one session, all or none, in this order; durable when this returns.

        Args:
            key: The session.
            events: At least one, each of which gets a sequence one above the one before.
            again: Whether a call before this one, with the same events, may have stored them: then they are not
                stored twice. Stream and position of the first tell.

        Returns:
            The sequence of the first, or `None` when the session is not live, and then nothing is stored.

        Raises:
            InvalidValue: One of them cannot be stored.
            EventTooLarge: They take more bytes than the policy allows the whole session.
        """

    @abstractmethod
    async def read(self, key: UUID, stream: str, *, after: int, limit: int = EVENT_PAGE) -> EventPage | None:
        """Some events of one stream, in their order.

        Args:
            key: The session: events of another are never among them.
            stream: One of its streams.
            after: The sequence of the last event that is known.
            limit: Events at most. There may be fewer where they are large.

        Returns:
            The page, or `None` where the session has no log.
        """

    @abstractmethod
    async def heads(self, keys: Collection[UUID]) -> dict[UUID, int]:
        """The sequence of the newest event of each session, without those that have no log."""

    async def follow(self, keys: Collection[UUID]) -> None:  # noqa: ARG002
        """Ask for hints about events of these sessions, for a minute or more."""
        return

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:  # noqa: ARG002
        """Pass on hints that events were stored in sessions that somebody follows, until cancelled.

        A hint may come late, twice, or never; `heads` tells the truth. A log that has no hints waits for
        ever, as this one does.

        Args:
            on_hint: Called with the keys of sessions, or with `None` for any.

        Raises:
            StoreUnavailable: Hints come no more; calling again is right.
        """
        await anyio.sleep_forever()

    @abstractmethod
    async def beat(self, instance: str) -> None:
        """Note that an instance is running. May be repeated.

        Args:
            instance: Its id, whose part after the last colon is unique.
        """

    @abstractmethod
    async def retire(self, instance: str) -> None:
        """Note that an instance has stopped. May be repeated."""

    @abstractmethod
    async def last_beats(self, names: Collection[str]) -> dict[str, timedelta]:
        """How long ago instances have last noted that they run, by the store's clock.

        Args:
            names: The parts after the last colon of their ids.

        Returns:
            By name. One that has stopped, or was never heard of, is not there.
        """

    @abstractmethod
    async def sweep(self, *, limit: int = EVENT_SWEEP_LIMIT) -> EventSweepReport:
        """Do one short step of what the policy wants removed: the caller goes on while there is `more`.

        Any number of instances may do so at once: none waits for another.

        Args:
            limit: Events that are removed, more or less.
        """
