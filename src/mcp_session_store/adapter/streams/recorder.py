"""Store the events of an instance, and keep a backlog while that fails: events never hold up a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Wake, report_failure, run_again, run_every
from mcp_session_store.adapter.instances import MAX_PAUSE
from mcp_session_store.adapter.session_log import SessionLog
from mcp_session_store.adapter.streams.backlog import STORED_AT_ONCE, Backlog, ends_call
from mcp_session_store.adapter.streams.calls import CallStream, call_error
from mcp_session_store.adapter.streams.circuit import Circuit
from mcp_session_store.adapter.streams.followers import POLL_INTERVAL
from mcp_session_store.adapter.streams.turns import Turns
from mcp_session_store.errors import (
    SchemaError,
    SessionStoreError,
    StoreBusy,
    StoreClosed,
    StoreMisconfigured,
    StoreUnavailable,
)
from mcp_session_store.event_log import LARGE_APPEND, NO_SESSION, STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent, message_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable
    from uuid import UUID

    from mcp_types import RequestId

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.readiness import Readiness
    from mcp_session_store.adapter.streams.backlog import Followed
    from mcp_session_store.adapter.streams.followers import Followers
    from mcp_session_store.event_log import EventLog

__all__ = ["EventRecorder", "Outcome", "Recorded"]

Deliver: TypeAlias = Callable[[bool], bool]
"""Delivers an event that is not stored to a client, and returns whether it could. Its argument allows followers of the
log, which must not get an event before those of the backlog."""

RECOVERY_INTERVAL: Final = 5.0
"""Seconds after which storing is tried again, at the latest."""
ROUNDS: Final = 4
"""Number of searches for idle calls within `EventRecorder.silence`."""
MAX_SILENCE: Final = 3600.0
"""Most seconds without an event of a call that runs, however long events are kept."""
REFRESHED_AT_ONCE: Final = 100
"""Number of idle calls for which an event is stored at the same time."""
LARGE_AT_ONCE: Final = 2
"""Number of large messages that are on their way to the log; the next one is ready when the log has stored one."""
LAST_EVENTS: Final = 4.0
"""Seconds to store the backlog when an instance stops; some more are for storing that it has."""


_DOWN: Final = (StoreUnavailable, StoreMisconfigured, StoreBusy, StoreClosed, SchemaError)
"""Errors of a log that can store no event now, whichever event it is."""


class EventsNotStored(SessionStoreError):
    """Events cannot be stored yet."""


class Outcome(StrEnum):
    """What became of an event. The values are attributes of a published metric."""

    STORED = "stored"
    LIVE = "live"
    """It could not be stored, and went to a client that is connected."""
    BACKLOG = "kept"
    """It could not be stored yet, and will be."""
    LOST = "lost"
    """It could not be stored, and will not be."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Outcome of an event, and its sequence if it is stored."""

    outcome: Outcome
    sequence: int = 0


class EventRecorder:
    """Stores events, and a bounded backlog of those that could not be stored as soon as they can.

    After the first failure no event waits for the log any more, until a background task has stored one.

    Args:
        log: Log that stores the events.
        followers: Open responses, which are woken by what is stored.
        instances: This instance, whose heartbeats come before its events.
        session_log: Log of what becomes of sessions; one of its own unless given.
    """

    def __init__(
        self, log: EventLog, followers: Followers, instances: Instances, session_log: SessionLog | None = None
    ) -> None:
        self.log = log
        self.followers = followers
        self.instances = instances
        self.session_log: Final = SessionLog(log.namespace) if session_log is None else session_log
        """Log of what becomes of sessions."""
        self._of_all: Final = telemetry.of(log.namespace)
        self._of: Final = {outcome: telemetry.of(log.namespace, outcome=outcome.value) for outcome in Outcome}
        self.turns: Final = Turns()
        """Turns of the sessions at reading the log."""
        self.on_said: Callable[[UUID], None] = lambda _: None
        """Called with each session that has a new message on its standalone stream, which no response here has."""
        self.unfinished: dict[str, CallStream] = {}
        """Calls of this instance whose last event is not stored yet, by the names of their streams."""
        self.large_turns: Final = anyio.Semaphore(LARGE_AT_ONCE)
        """Turns of large messages to be stored, those of all sessions in the order of their arrival."""
        self.wake: Final = Wake(gathering=0)
        """Starts an attempt to store the backlog."""
        self._circuit = Circuit()
        self._backlog = Backlog(self._too_much, self._dropped)
        # Before, others would consider this instance dead, and its calls lost.
        instances.on_announced = lambda: self._circuit.close(self._backlog)
        self._streams = 0
        """Number of streams begun."""
        max_age = log.policy.max_age
        self.silence: Final = MAX_SILENCE if max_age is None else min(max_age.total_seconds(), MAX_SILENCE)
        """Seconds within which the log gets an event of each call that runs and whose client can come back."""

    @property
    def down(self) -> bool:
        """Whether events cannot be stored for now."""
        return self._circuit.is_open

    def begin(self, key: UUID, request_id: RequestId, *, resumable: bool, owner: Hashable = None) -> CallStream:
        """Return the stream of a new call of a session, under a name that is unique among all instances."""
        self._streams += 1
        stream = CallStream(key, f"{self.instances.name}.{self._streams:x}", request_id, resumable, owner)
        self.unfinished[stream.name] = stream
        return stream

    async def newest(self, key: UUID) -> int | None:
        """Return the sequence of a session's newest event; `None` if the log does not say. Raises nothing."""
        try:
            return (await self.log.heads((key,))).get(key, 0)
        except _DOWN as error:
            # Storing is not tried as well, because the call that asks has waited long enough.
            self._went_down(error)
        except Exception as error:
            report_failure("events", error, key=key, namespace=self.log.namespace)
        return None

    async def record(
        self, key: UUID, event: NewEvent, *, deliver: Deliver, owner: Hashable = None, again: bool = False
    ) -> Recorded:
        """Store an event, if that can be done at once. Raises nothing.

        Args:
            key: Key of the event's session.
            event: Event to store.
            deliver: Called when the event cannot be stored.
            owner: Principal of the session.
            again: Whether it may have been stored before.
        """
        stream = self.unfinished.get(event.stream)
        if stream is None:
            recorded = await self._record(key, event, deliver, owner, again)
        else:
            stream.under_way += 1
            try:
                recorded = await self._record(key, event, deliver, owner, again)
            finally:
                stream.under_way -= 1
            if recorded.outcome is Outcome.STORED:
                stream.idle = False
        telemetry.events.add(1, self._of[recorded.outcome])
        if ends_call(event) and recorded.outcome is not Outcome.BACKLOG:
            self.unfinished.pop(event.stream, None)
        return recorded

    async def record_again(self, stream: CallStream) -> None:
        """Store the answer of a call, unless it is stored already."""
        answer = stream.answer
        if answer is not None and not self._backlog.holds(stream.key, answer):
            await self.record(stream.key, answer, deliver=lambda _: False, owner=stream.owner, again=True)

    async def _record(self, key: UUID, event: NewEvent, deliver: Deliver, owner: Hashable, again: bool) -> Recorded:
        attempted = False
        waiting = self._backlog.sessions
        # Not looked for in an empty backlog, as it nearly always is, because UUIDs of Python are slow to hash.
        if not (self._circuit.is_open or (waiting and key in waiting)):
            try:
                sequence = await self._append(key, event, again=again)
            except _DOWN as error:
                self._failed(error, event)
                if not self._circuit.is_open:
                    report_failure("events", error, key=key, namespace=self.log.namespace)
                attempted = True
            except Exception as error:
                # The log refuses this event.
                report_failure("events", error, key=key, namespace=self.log.namespace)
                delivered = deliver(key not in self._backlog.sessions)
                if not ends_call(event):
                    return Recorded(Outcome.LIVE if delivered else Outcome.LOST)
                return await self._store_instead(key, event, error, owner)
            else:
                if sequence is None:
                    return Recorded(Outcome.LOST)  # with its session
                return Recorded(Outcome.STORED, sequence)
        # Followers of the log get the backlog first.
        delivered = deliver(key not in self._backlog.sessions)
        # A client that comes back for an answer has not received it. Without an id it cannot come back.
        stream = self.unfinished.get(event.stream)
        if (delivered and not ends_call(event)) or (stream is not None and not stream.identified):
            return Recorded(Outcome.LIVE if delivered else Outcome.LOST)
        return Recorded(self._add_to_backlog(key, event, owner, uncertain=attempted or again))

    async def _append(self, key: UUID, *events: NewEvent, again: bool) -> int | None:
        """Store events and wake their followers; return the sequence of the first."""
        began = clock.now()
        sequence = await self.log.append(key, events, again=again)
        telemetry.appended.record(clock.now() - began, self._of_all)
        if sequence is not None:
            said = False
            for place, event in enumerate(events):
                self.followers.advance(key, event.stream, sequence + place)
                said = said or (event.stream == STANDALONE_STREAM and event.message is not None)
            if said and not self.followers.of(key, STANDALONE_STREAM):
                self.on_said(key)
        return sequence

    async def _store_instead(self, key: UUID, event: NewEvent, error: Exception, owner: Hashable) -> Recorded:
        """Store an error in place of an answer that the log refuses, so that its client does not wait for ever."""
        instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
        try:
            await self._append(key, instead, again=False)
        except _DOWN as failure:
            self._went_down(failure)
            return Recorded(self._add_to_backlog(key, instead, owner, uncertain=True))
        except Exception as failure:
            report_failure("events", failure, key=key, namespace=self.log.namespace)
        return Recorded(Outcome.LOST)

    def _instead_of(self, event: NewEvent, reason: str) -> NewEvent:
        """Return the error for a client that comes back for an answer which cannot be had any more."""
        stream = self.unfinished.get(event.stream)
        request_id = None if stream is None else stream.request_id
        text = call_error(request_id, f"The answer to the call could not be kept: {reason}", reason="lost")
        # A client that missed earlier events gets this error all the same.
        instead = replace(event, previous=-1, kind=EventKind.ERROR, message=text)
        if stream is not None:
            stream.answer = instead  # so that the answer itself takes no more memory
        return instead

    def _too_much(self, event: NewEvent) -> NewEvent:
        return self._instead_of(event, "too much was waiting to be stored")

    def _dropped(self, number: int, followed: Followed) -> None:
        """Note that events of the backlog are lost, so that later events of their calls follow the ones before them."""
        telemetry.events.add(number, self._of[Outcome.LOST])
        for (name, position), previous in followed.items():
            stream = self.unfinished.get(name)
            if stream is not None and stream.previous == position:
                stream.previous = previous

    def _add_to_backlog(self, key: UUID, event: NewEvent, owner: Hashable, *, uncertain: bool) -> Outcome:
        if event.kind is EventKind.PRIMING:
            return Outcome.LOST  # its id was not sent
        if not self._backlog.add(key, event, owner=owner, uncertain=uncertain):
            if not ends_call(event):
                return Outcome.LOST
            # The error is small, and there are no more of them than calls.
            self._backlog.put(key, self._too_much(event), owner=owner, uncertain=uncertain)
        self.wake.set()
        return Outcome.BACKLOG

    def _failed(self, error: Exception, *events: NewEvent) -> None:
        """Note that events could not be stored now, which says nothing about other events where these are large."""
        if isinstance(error, SchemaError) or sum(map(message_bytes, events)) <= LARGE_APPEND:
            self._went_down(error)
        else:
            self._circuit.in_doubt = True
            self.wake.set()

    def _went_down(self, error: Exception) -> None:
        self._circuit.open(error)
        self.wake.set()

    async def run(self, readiness: Readiness) -> None:
        """Run the background tasks, until cancelled.

        Args:
            readiness: Readiness of this instance.
        """
        every = partial(run_every, readiness=readiness)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(every, "events", RECOVERY_INTERVAL, self.recover, wake=self.wake))
            tasks.start_soon(every, "silent calls", self.silence / ROUNDS, self.refresh_idle_calls)
            followers = self.followers
            tasks.start_soon(partial(every, "streams", POLL_INTERVAL, followers.poll, wake=followers.wake))
            hints = partial(run_again, "event hints", followers.listen, max_backoff=MAX_PAUSE, readiness=readiness)
            tasks.start_soon(hints)

    async def refresh_idle_calls(self) -> None:
        """Store an event without a message of each call that has stored nothing for a while.

        When all events of which a client has an id are too old to be kept, this event shows other instances that
        the client missed nothing, and that the call runs.
        """
        if self._circuit.is_open:
            return
        idle_calls: list[CallStream] = []
        for stream in self.unfinished.values():
            if stream.identified and stream.answer is None:
                if stream.idle:
                    idle_calls.append(stream)
                stream.idle = True
        while idle_calls:
            some, idle_calls = idle_calls[:REFRESHED_AT_ONCE], idle_calls[REFRESHED_AT_ONCE:]
            async with anyio.create_task_group() as tasks:
                for stream in some:
                    # An event on its way that is stored after this one would be taken for one that was seen before.
                    if stream.answer is None and not stream.under_way:
                        event = stream.next_event(EventKind.PRIMING, None)
                        tasks.start_soon(partial(self.record, stream.key, event, deliver=lambda _: False))

    async def recover(self) -> None:
        """Find out whether events can be stored again, and store the backlog.

        Raises:
            SessionStoreError: They cannot be stored yet.
        """
        if not self.instances.announced.is_set():
            await self.instances.beat()
        if self._circuit.is_open or self._circuit.in_doubt:
            # An event of a session that does not exist takes the way of any other, and is not stored. A heartbeat
            # would not do, because it has a table of its own.
            probe = NewEvent(stream="", position=0, kind=EventKind.PRIMING, message=None)
            try:
                await self.log.append(NO_SESSION, [probe])
            except Exception as error:
                if not self._circuit.is_open:
                    self._circuit.open(error)
                raise
            self._circuit.close(self._backlog)
        async with anyio.create_task_group() as tasks:
            for key in list(self._backlog.sessions):
                tasks.start_soon(self._store_backlog, key)
        if self._circuit.is_open or self._circuit.in_doubt:
            raise EventsNotStored("events cannot be stored yet")

    async def _store_backlog(self, key: UUID) -> None:
        """Store the backlog of a session, in its order; events that come meanwhile join it at the end."""
        waiting = self._backlog.sessions[key]
        at_once = STORED_AT_ONCE
        while waiting.events:
            # Each of those that may be stored already by itself.
            events = waiting.next(at_once)
            uncertain = waiting.is_uncertain(events[0])
            # Before the attempt, because one that is cancelled does not learn its outcome.
            waiting.mark(events)
            waiting.being_stored = len(events)
            sequence: int | None = None
            try:
                sequence = await self._append(key, *events, again=uncertain)
            except _DOWN as error:
                self._failed(error, *events)
                return
            except Exception as error:
                if len(events) > 1:
                    # The log refuses one of them.
                    waiting.unmark(events)
                    at_once = 1
                    continue
                report_failure("events", error, key=key, namespace=self.log.namespace)
                event = events[0]
                if ends_call(event) and event.kind is not EventKind.ERROR:
                    instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
                    self._backlog.replace_first(waiting, instead)
                    continue
            finally:
                waiting.being_stored = 0
            outcome = Outcome.LOST if sequence is None else Outcome.STORED
            waiting.unmark(events)
            for event in events:
                self._backlog.remove_first(waiting)
                telemetry.events.add(1, self._of[outcome])
                if ends_call(event):
                    self.unfinished.pop(event.stream, None)
        self._backlog.remove(key)

    async def retire(self) -> None:
        """Store the backlog, if that can be done, before this instance stores that it has stopped. Raises nothing."""
        try:
            # Tasks that were storing an answer are cancelled by now. Without an answer, other instances find out from
            # the retirement that the call is lost.
            if self._backlog.sessions or any(stream.answer for stream in self.unfinished.values()):
                with anyio.move_on_after(LAST_EVENTS):
                    await self.recover()
                    async with anyio.create_task_group() as tasks:
                        for stream in list(self.unfinished.values()):
                            tasks.start_soon(self.record_again, stream)
        except Exception as error:
            report_failure("events", error, namespace=self.log.namespace)
