"""Storing the events of an instance, and what becomes of them while that fails: they never hold up a session."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from mcp_session_store.adapter import telemetry
from mcp_session_store.adapter.background import Wake, report_failure, run_every
from mcp_session_store.adapter.streams.calls import CallStream, call_error
from mcp_session_store.errors import SchemaError, StoreUnavailable
from mcp_session_store.event_log import NO_SESSION, STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent, instance_name, message_bytes

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_types import RequestId

    from mcp_session_store.adapter.streams.followers import Following
    from mcp_session_store.event_log import EventLog

__all__ = ["EventRecorder", "Outcome", "Recorded", "sweep_events"]

logger = logging.getLogger(__name__)

Give: TypeAlias = Callable[[bool], bool]
"""Gives a client an event that is not stored, and tells whether it could; told whether those who follow may have it."""

MAX_KEPT_EVENTS: Final = 1000
MAX_KEPT_BYTES: Final = 4 * 1024**2
"""What is kept of a session while its events cannot be stored, until they can."""
MAX_KEPT_IN_ALL: Final = 64 * 1024**2
"""Bytes that are kept of all sessions together."""
STORED_AT_ONCE: Final = 100
"""Events of a session that are stored together when that can be done again."""
RECOVERY_INTERVAL: Final = 5.0
"""Seconds after which storing is tried again, at the latest."""
ROUNDS: Final = 4
"""How often within the time for which events are kept it is looked which calls say nothing."""
REFRESHED_AT_ONCE: Final = 100
"""Calls for which an event is stored at the same time, because they say nothing."""
LAST_EVENTS: Final = 4.0
"""Seconds for storing what is left when an instance stops; some more are for saying that it has."""


class Outcome(Enum):
    """What became of an event."""

    STORED = "stored"
    LIVE = "live"
    """It could not be stored, and went to a client that is connected."""
    KEPT = "kept"
    """It could not be stored yet, and will be."""
    LOST = "lost"
    """It could not be stored, and will not be."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of an event, and its sequence if it is stored."""

    outcome: Outcome
    sequence: int = 0


@dataclass(slots=True)
class _Kept:
    events: deque[NewEvent] = field(default_factory=deque)
    tried: set[tuple[str, int]] = field(default_factory=set)
    """Those that may be stored already, by stream and position."""
    size: int = 0


class EventRecorder:
    """Stores events, and keeps a bounded number of those that cannot be stored until they can.

    After the first failure nothing is tried for the sake of an event any more: a background task tries, and until it
    succeeds an event costs no time.

    Args:
        log: Where events are stored.
        following: Told of what is stored.
        instance: The id of this instance.
    """

    def __init__(self, log: EventLog, following: Following, *, instance: str) -> None:
        self.log = log
        self.following = following
        self.instance = instance
        self.name = instance_name(instance)
        self.unfinished: dict[str, CallStream] = {}
        """The calls of this instance whose last event is not stored yet, by the names of their streams."""
        self.wake: Final = Wake(gathering=0)
        """To be set when storing is to be tried."""
        # Until this instance has noted that it runs: who waits for a call of it must not take it for gone.
        self._noted = False
        self._down = True
        self._told = False
        self._kept: dict[UUID, _Kept] = {}
        self._kept_in_all = 0
        self._streams = 0

    @property
    def down(self) -> bool:
        """Whether events cannot be stored for now."""
        return self._down

    def begin(self, key: UUID, request_id: RequestId, *, resumable: bool) -> CallStream:
        """The stream of a call of a session that begins, under a name that no other has, on any instance."""
        self._streams += 1
        stream = CallStream(key, f"{self.name}.{self._streams:x}", request_id, resumable)
        self.unfinished[stream.name] = stream
        return stream

    async def record(self, key: UUID, event: NewEvent, *, give: Give, again: bool = False) -> Recorded:
        """Store an event, if that can be done at once. Raises nothing.

        Args:
            key: Its session.
            event: It.
            give: Called when it cannot be stored: whether a client gets it as it is.
            again: Whether it may have been stored before.
        """
        stream = self.unfinished.get(event.stream)
        if stream is None:
            recorded = await self._record(key, event, give, again)
        else:
            stream.under_way += 1
            try:
                recorded = await self._record(key, event, give, again)
            finally:
                stream.under_way -= 1
            if recorded.outcome is Outcome.STORED:
                stream.quiet = False
        telemetry.events.add(1, {"outcome": recorded.outcome.value})
        if _ends_call(event) and recorded.outcome is not Outcome.KEPT:
            self.unfinished.pop(event.stream, None)
        return recorded

    async def record_again(self, stream: CallStream) -> None:
        """Store the answer of a call, if it is not stored already."""
        if stream.answer is not None:
            await self.record(stream.key, stream.answer, give=lambda _: False, again=True)

    async def _record(self, key: UUID, event: NewEvent, give: Give, again: bool) -> Recorded:
        tried = False
        if key not in self._kept and not self._down:
            try:
                sequence = await self._append(key, event, again=again)
            except (StoreUnavailable, SchemaError) as error:
                self._went_down(error)
                tried = True
            except Exception as error:
                # It is this event that is not taken.
                report_failure("events", error)
                given = give(key not in self._kept)
                if not _ends_call(event):
                    return Recorded(Outcome.LIVE if given else Outcome.LOST)
                return await self._store_instead(key, event, error)
            else:
                if sequence is None:
                    return Recorded(Outcome.LOST)  # with its session
                return Recorded(Outcome.STORED, sequence)
        # Who follows the log gets what is kept first.
        given = give(key not in self._kept)
        # Who comes back for an answer has not got it.
        if given and not _ends_call(event):
            return Recorded(Outcome.LIVE)
        return Recorded(self._keep(key, event, tried=tried or again))

    async def _append(self, key: UUID, *events: NewEvent, again: bool) -> int | None:
        """Store events, and have their followers know; the sequence of the first."""
        sequence = await self.log.append(key, events, again=again)
        if sequence is not None:
            for place, event in enumerate(events):
                self.following.moved(key, event.stream, sequence + place)
        return sequence

    async def _store_instead(self, key: UUID, event: NewEvent, error: Exception) -> Recorded:
        """Store an error in place of an answer that is not taken, so that nobody waits for it."""
        instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
        try:
            await self._append(key, instead, again=False)
        except (StoreUnavailable, SchemaError) as failure:
            self._went_down(failure)
            return Recorded(self._keep(key, instead, tried=True))
        except Exception as failure:
            report_failure("events", failure)
        return Recorded(Outcome.LOST)

    def _instead_of(self, event: NewEvent, reason: str) -> NewEvent:
        """What a client gets that comes back for an answer which cannot be had any more."""
        stream = self.unfinished.get(event.stream)
        request_id = None if stream is None else stream.request_id
        text = call_error(request_id, f"The answer to the call could not be kept: {reason}", reason="lost")
        # Whoever missed others before it is told this all the same.
        return replace(event, previous=-1, kind=EventKind.ERROR, message=text)

    def _keep(self, key: UUID, event: NewEvent, *, tried: bool) -> Outcome:
        if event.kind is EventKind.PRIMING:
            return Outcome.LOST  # nobody got its id
        kept = self._kept.get(key, _Kept())
        full = (
            len(kept.events) >= MAX_KEPT_EVENTS
            or kept.size + message_bytes(event) > MAX_KEPT_BYTES
            or self._kept_in_all + message_bytes(event) > MAX_KEPT_IN_ALL
        )
        if full:
            if not _ends_call(event):
                return Outcome.LOST
            # Small, and no more of them than there are calls.
            event = self._instead_of(event, "too much was waiting to be stored")
        self._kept[key] = kept
        kept.events.append(event)
        if tried:
            kept.tried.add(_place(event))
        self._weigh(kept, message_bytes(event))
        self.wake.set()
        return Outcome.KEPT

    def _went_down(self, error: Exception) -> None:
        self._down = True
        if not self._told:
            self._told = True
            logger.warning("events cannot be stored for now, and go out without ids: %s", error)
        self.wake.set()

    def _came_up(self) -> None:
        self._down = False
        if self._told:
            self._told = False
            logger.info("events can be stored again; %d sessions have some that were kept", len(self._kept))

    async def run(self, *, beat_interval: float) -> None:
        """Do what is to be done beside the requests, until cancelled.

        Args:
            beat_interval: Seconds between two notes that this instance runs.
        """
        max_age = self.log.policy.max_age
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_every, "heartbeat", beat_interval, self.beat)
            tasks.start_soon(partial(run_every, "events", RECOVERY_INTERVAL, self.recover, wake=self.wake))
            if max_age is not None:
                tasks.start_soon(run_every, "silent calls", max_age.total_seconds() / ROUNDS, self.refresh)

    async def beat(self) -> None:
        """Note that this instance runs.

        Raises:
            SessionStoreError: It cannot be done now.
        """
        try:
            await self.log.beat(self.instance)
        except BaseException:
            self.following.reliable_since = math.inf
            raise
        self.following.reliable_since = min(self.following.reliable_since, anyio.current_time())
        if not self._noted:
            self._noted = True
            self._came_up()

    async def refresh(self) -> None:
        """Store an event without a message of each call that has said nothing for a while.

        When all that its client has an id of is too old to be kept, it tells other instances that nothing was missed.
        """
        if self._down:
            return
        silent: list[CallStream] = []
        for stream in self.unfinished.values():
            if stream.identified and stream.answer is None:
                if stream.quiet:
                    silent.append(stream)
                stream.quiet = True
        while silent:
            some, silent = silent[:REFRESHED_AT_ONCE], silent[REFRESHED_AT_ONCE:]
            async with anyio.create_task_group() as tasks:
                for stream in some:
                    # One that is on its way, and comes after ours, would be taken for one that was seen before.
                    if stream.answer is None and not stream.under_way:
                        event = stream.next_event(EventKind.PRIMING, None)
                        tasks.start_soon(partial(self.record, stream.key, event, give=lambda _: False))

    async def recover(self) -> None:
        """Find out whether events can be stored again, and store what is kept.

        Raises:
            SessionStoreError: They cannot yet.
        """
        if not self._noted:
            await self.beat()
        if self._down:
            # As an event of a session that there is not: all is done as for any other, and nothing stored. A heartbeat
            # would not tell, it has a table of its own.
            await self.log.append(NO_SESSION, [NewEvent(stream="", position=0, kind=EventKind.PRIMING, message=None)])
            self._came_up()
        async with anyio.create_task_group() as tasks:
            for key in list(self._kept):
                tasks.start_soon(self._store_kept, key)
        if self._down:
            raise StoreUnavailable("events cannot be stored yet")

    async def _store_kept(self, key: UUID) -> None:
        """Store what is kept of a session, in its order; whatever comes meanwhile waits behind it."""
        kept = self._kept[key]
        at_once = STORED_AT_ONCE
        while kept.events:
            # What was tried may be stored already, and its answer was lost: each of these by itself.
            certain = takewhile(lambda event: _place(event) not in kept.tried, kept.events)
            events = list(islice(certain, at_once)) or [kept.events[0]]
            places = [_place(event) for event in events]
            doubtful = places[0] in kept.tried
            # Before it is: who cancels it does not learn whether it was.
            kept.tried.update(places)
            sequence: int | None = None
            try:
                sequence = await self._append(key, *events, again=doubtful)
            except (StoreUnavailable, SchemaError) as error:
                self._went_down(error)
                return
            except Exception as error:
                if len(events) > 1:
                    # One of them is not taken.
                    kept.tried.difference_update(places)
                    at_once = 1
                    continue
                report_failure("events", error)
                event = events[0]
                if _ends_call(event) and event.kind is not EventKind.ERROR:
                    instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
                    self._replace_first(kept, instead)
                    continue
            outcome = Outcome.LOST if sequence is None else Outcome.STORED
            kept.tried.difference_update(places)
            for event in events:
                kept.events.popleft()
                self._weigh(kept, -message_bytes(event))
                telemetry.events.add(1, {"outcome": outcome.value})
                if _ends_call(event):
                    self.unfinished.pop(event.stream, None)
        del self._kept[key]

    def _replace_first(self, kept: _Kept, event: NewEvent) -> None:
        self._weigh(kept, message_bytes(event) - message_bytes(kept.events[0]))
        kept.events[0] = event

    def _weigh(self, kept: _Kept, size: int) -> None:
        kept.size += size
        self._kept_in_all += size

    async def retire(self) -> None:
        """Store what is kept, if that can be done, and note that this instance has stopped with all its calls."""
        try:
            # Whoever was storing an answer was cancelled. Who waits for others learns that nobody runs them any more.
            if self._kept or any(stream.answer for stream in self.unfinished.values()):
                with anyio.move_on_after(LAST_EVENTS):
                    await self.recover()
                    async with anyio.create_task_group() as tasks:
                        for stream in list(self.unfinished.values()):
                            tasks.start_soon(self.record_again, stream)
        except Exception as error:
            report_failure("events", error)
        try:
            await self.log.retire(self.instance)
        except Exception as error:
            report_failure("events", error)


async def sweep_events(log: EventLog) -> None:
    """Remove what the log's policy wants removed, step by step."""
    while True:
        began = anyio.current_time()
        report = await log.sweep()
        if report.removed:
            telemetry.removed_events.add(report.removed)
        if not report.more:
            return
        # Half of the time is for the requests.
        await anyio.sleep(anyio.current_time() - began)


def _place(event: NewEvent) -> tuple[str, int]:
    return event.stream, event.position


def _ends_call(event: NewEvent) -> bool:
    return event.kind.final and event.stream != STANDALONE_STREAM
