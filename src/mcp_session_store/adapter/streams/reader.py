"""Read a stream from the log for as long as it lasts: what was stored before, and what any instance stores next."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import anyio

from mcp_session_store.adapter import responses
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.streams.followers import Follower
from mcp_session_store.records import EventPage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from mcp_session_store.adapter.streams.event_ids import Cursor
    from mcp_session_store.adapter.streams.recorder import EventRecorder

__all__ = ["NOTHING_YET", "Begun", "Ended", "Event", "Gap", "Item", "Lost", "StreamReader"]

logger = logging.getLogger(__name__)

LOOK_AGAIN: Final = 1.0
"""Seconds after which a reader that has read everything checks whether its call still runs in this instance."""
STAY: Final = 60.0
"""Seconds that any other reader waits to be woken: by an event, by the loss of an instance, by its end."""
RETRY: Final = 1.0
"""Seconds after which the log is read again when it could not be read."""


NOTHING_YET: Final = EventPage(events=[], more=False, first=1, last=0)
"""Page of a session in which no event was stored yet, so that it has no log."""


class Event(NamedTuple):
    """Message of the stream."""

    message: str
    cursor: Cursor | None
    """Place of the event; `None` for one that could not be stored, and so has no id."""
    final: bool
    """Whether it answers the call."""


@dataclass(frozen=True, slots=True)
class Begun:
    """Beginning of a stream: the place is known after which its events follow."""


@dataclass(frozen=True, slots=True)
class Gap:
    """End of a call some of whose events are not kept any more, though its client has not seen them."""


@dataclass(frozen=True, slots=True)
class Lost:
    """End of a call that will not be answered, because it does not run any more."""


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a call whose session has ended."""

    answer: str
    """Message of the JSON-RPC error for the call."""


Item: TypeAlias = list[Event] | Begun | Gap | Lost | Ended
"""Events that are there at the same time, or the end of the call."""


class StreamReader:
    """Reader of one stream, for one response.

    Args:
        key: Key of the session.
        recorder: Recorder of this instance, with the log and the followers of its streams.
        cursor: Place of the last event that the client has; a place on the standalone stream where `find` says it.
        page: Events that follow, if they are read already.
        turn: Returns a context in which it is the session's turn to read the log.
        is_active: Whether the session's copy is still in memory.
        find: Returns the place from which a stream begins that is opened anew, or `None` if it is not known yet. Unless
            another response has the stream until then: it goes on after what that one has sent.
    """

    def __init__(
        self,
        key: UUID,
        recorder: EventRecorder,
        cursor: Cursor,
        page: EventPage | None,
        *,
        turn: Callable[[], AbstractAsyncContextManager[None]],
        is_active: Callable[[], bool],
        find: Callable[[], Awaitable[Cursor | None]] | None = None,
    ) -> None:
        self._key = key
        self._recorder = recorder
        self._turn = turn
        self._is_active = is_active
        self._page = page
        self._find = find
        self._follower = Follower(key, cursor.stream, cursor if find is None else None)
        self._runs_here = cursor.instance == recorder.instances.name
        self._seen = cursor.sequence
        """Sequence of the session up to which there is nothing more for this stream."""
        self._heard_at = anyio.current_time()
        """When the log last had an event of the stream that was not known."""
        self._misses = False
        """Whether events of the call are not kept any more that its client has not seen."""
        self.cursor = cursor
        """Place of the last event that was read."""

    @contextmanager
    def tailing(self) -> Iterator[None]:
        """Follow the stream within this context, in place of all other responses; `cursor` says after which event."""
        followers = self._recorder.followers
        elsewhere = None if self.cursor.standalone or self._runs_here else self.cursor.instance
        # MCP 2025-11-25, basic/transports, multiple connections: no message goes to two. The latest has them.
        for other in followers.of(self._key, self.cursor.stream):
            if self._find is not None:
                if other.sent is not None:
                    self._begin_at(other.sent)
                self._follower.unsent, other.unsent = other.unsent, self._follower.unsent
            other.close()
        followers.add(self._follower, instance=elsewhere)
        try:
            yield
        finally:
            followers.remove(self._follower, instance=elsewhere)

    def _begin_at(self, cursor: Cursor) -> None:
        self._find = None
        self.cursor = self._follower.sent = cursor
        self._seen = cursor.sequence

    def sends(self, event: Event) -> None:
        """Note that an event, with all before it, is given to the connection now."""
        if event.cursor is not None:
            self._follower.sent = event.cursor

    async def items(self) -> AsyncIterator[Item]:
        """Return what the client gets, in its order, within `tailing`.

        A list of events becomes empty when its client has come back for the stream, and gets the rest from there.
        After the call's answer, `Gap`, `Lost` or `Ended` there is nothing more; nor when the client is to come back.
        """
        follower, is_call = self._follower, not self.cursor.standalone
        while self._find is not None and not follower.closed:
            await self._look_for_place(self._find)
            while follower.unsent:
                yield [self._next_unsent()]
        if not follower.closed:
            yield Begun()
        page, self._page = self._page, None
        # Events that were stored before `tailing` have woken no follower; and a call that has ended may have stored its
        # answer.
        latest = was_over = False
        while not follower.closed:
            more = False
            if page is not None:
                self._look_for_gap(page)
                follower.in_hand, more, last = self._events_of(page), page.more, page.last
                # Only the list holds the events, so that they are let go when a later response has them.
                page = None
                if follower.in_hand:
                    yield follower.in_hand
                    follower.in_hand = []
                if follower.closed and follower.answer is None:
                    return
                if self._misses:
                    yield Gap()
                    return
                if self.cursor.final:
                    return
                if not more:
                    self._seen = max(self._seen, last)
                    # A call that was only silent may have been heard of just now.
                    if was_over and self._is_over():
                        yield Lost()
                        return
            is_over = self._is_over()
            if latest and not is_over and not more and not follower.has_more(self._seen):
                stay = min(STAY, self._recorder.silence)
                await follower.wait(self._seen, seconds=LOOK_AGAIN if self._runs_here else stay)
                # Delivered while the client had all that was stored, and so before whatever has been stored since.
                while follower.unsent:
                    event = self._next_unsent()
                    yield [event]
                    if event.final:
                        return
                continue
            page = await self._read()
            latest = page is not None
            was_over = is_over and page is not None
        if follower.answer is not None and is_call:
            yield Ended(follower.answer)

    async def _look_for_place(self, find: Callable[[], Awaitable[Cursor | None]]) -> None:
        """Find out where a stream begins that is opened anew; if that cannot be known yet, wait a little."""
        try:
            cursor = await find()
        except Exception as error:
            report_failure("streams", error, key=self._key, namespace=self._recorder.log.namespace)
            cursor = None
        if cursor is not None:
            self._begin_at(cursor)
        else:
            await self._follower.wait(self._seen, seconds=RETRY, pause=True)

    def _next_unsent(self) -> Event:
        unsent = self._follower.unsent.popleft()
        return Event(unsent.message or "", None, unsent.kind.final and not self.cursor.standalone)

    def _events_of(self, page: EventPage) -> list[Event]:
        """Return the events of a page that the client lacks, until one that follows others it will not get."""
        is_call = not self.cursor.standalone
        events = []
        if page.events:
            self._heard_at = anyio.current_time()
        for event in page.events:
            self._seen = event.sequence
            if is_call:
                if event.position <= self.cursor.position:
                    continue  # repeated
                if event.previous > self.cursor.position:
                    self._misses = True
                    break
            final = is_call and event.kind.final
            self.cursor = self.cursor.at(sequence=event.sequence, position=event.position, final=final)
            if event.message is not None:
                events.append(Event(event.message, self.cursor, final))
            if final:
                break
        return events

    def _look_for_gap(self, page: EventPage) -> None:
        """Find out whether events that the client has not seen may have been removed before those of a page."""
        if page.first <= self._seen + 1:
            return
        if self.cursor.standalone:
            logger.info(
                "a client of session %s missed events of its standalone stream that are not kept any more", self._key
            )
        elif not page.events:
            # Events would say themselves what they follow.
            running = self._recorder.unfinished.get(self.cursor.stream)
            self._misses = running is None or running.previous > self.cursor.position

    def _is_over(self) -> bool:
        """Return whether the call, which is not answered yet, will not be."""
        if self.cursor.standalone:
            return False
        if self._runs_here:
            return self.cursor.stream not in self._recorder.unfinished
        # A call that runs is heard of: the end of this one could not be stored, or it never began. In an outage of the
        # database none is.
        since = max(self._heard_at, self._recorder.instances.reliable_since)
        is_silent = anyio.current_time() - since > self._recorder.silence
        return is_silent or self._recorder.followers.is_dead(self.cursor.instance)

    async def _read(self) -> EventPage | None:
        """Return the next page; `None` if it cannot be read now, or if the stream has ended with its session."""
        head, self._follower.behind = self._follower.head, False
        try:
            async with self._turn():
                if self._follower.closed:
                    return None  # while it waited, by a later response
                page = await self._recorder.log.read(self._key, self.cursor.stream, after=self._seen)
        except Exception as error:
            report_failure("streams", error, key=self._key, namespace=self._recorder.log.namespace)
            # The client keeps its connection, and gets the rest when it can be read.
            await self._follower.wait(self._seen, seconds=RETRY, pause=True)
            return None
        if page is None:
            if self._follower.closed:
                return None  # meanwhile, by the copy when it learned that the session has ended, or by a later response
            if self._seen > 0:
                # The log has gone with its session, and the copy here is about to learn of it.
                self._follower.close(responses.SESSION_ENDED)
                return None
            if not self._is_active():
                self._follower.close()
                return None
            # The copy closes this when it learns that the session has ended.
            page = NOTHING_YET
        if self._follower.head == head:
            # Lower than what was known where the log was set back, as after a restored backup, or went with its
            # session: or this would read it again and again, until the log is as far as it was.
            self._follower.head = page.last
        return page
