"""Storing the events of an instance, and what becomes of them while that fails: they never hold up a session."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

import anyio
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, RequestId

from mcp_session_store.adapter import telemetry
from mcp_session_store.adapter.background import Wake, report_failure
from mcp_session_store.errors import SchemaError, StoreUnavailable
from mcp_session_store.records import EventKind, instance_name, message_bytes
from mcp_session_store.store import STANDALONE_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from mcp_session_store.adapter.following import Following
    from mcp_session_store.records import NewEvent
    from mcp_session_store.store import EventLog

__all__ = ["RECOVERY_INTERVAL", "CallStream", "EventRecorder", "Outcome", "Recorded", "error_message", "sweep_events"]

logger = logging.getLogger(__name__)

MAX_KEPT_EVENTS: Final = 1000
MAX_KEPT_BYTES: Final = 4 * 1024**2
"""What is kept of a session while its events cannot be stored, until they can."""
MAX_KEPT_IN_ALL: Final = 64 * 1024**2
"""Bytes that are kept of all sessions together."""


RECOVERY_INTERVAL: Final = 5.0
"""Seconds after which storing is tried again, at the latest."""


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


@dataclass(slots=True, eq=False)
class CallStream:
    """The stream of one call that runs in this instance."""

    name: str
    request_id: RequestId
    resumable: bool
    """Whether its client comes back for what it misses."""
    identified: bool = False
    """Whether its client may have been given an id to come back with."""
    answer: NewEvent | None = None
    """Its last event, once there is one; until it is known to be stored it may be, or not."""
    position: int = 0
    """Of the next event."""
    previous: int = -1
    """Of the last one that a reader must have seen."""


@dataclass(slots=True)
class _Kept:
    events: deque[NewEvent] = field(default_factory=deque)
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
        self._failures = 0
        self._try_at = 0.0
        """When the next event may try whether storing works again, by anyio's clock."""
        self._kept: dict[UUID, _Kept] = {}
        self._kept_in_all = 0
        self._streams = 0

    @property
    def down(self) -> bool:
        """Whether an event that nobody needs is not to be tried now, because storing does not work."""
        return self._down and (bool(self._kept) or not self._noted or anyio.current_time() < self._try_at)

    def begin(self, request_id: RequestId, *, resumable: bool) -> CallStream:
        """The stream of a call that begins, under a name that no other has, on any instance."""
        self._streams += 1
        stream = CallStream(f"{self.name}.{self._streams:x}", request_id, resumable)
        self.unfinished[stream.name] = stream
        return stream

    async def record(self, key: UUID, event: NewEvent, *, give: Callable[[], bool], again: bool = False) -> Recorded:
        """Store an event, if that can be done at once. Raises nothing.

        Args:
            key: Its session.
            event: It.
            give: Called when it cannot be stored: whether a client gets it as it is.
            again: Whether it may have been stored before.
        """
        recorded = await self._record(key, event, give, again)
        telemetry.events.add(1, {"outcome": recorded.outcome.value})
        if _ends_call(event) and recorded.outcome is not Outcome.KEPT:
            self.unfinished.pop(event.stream, None)
        return recorded

    async def _record(self, key: UUID, event: NewEvent, give: Callable[[], bool], again: bool) -> Recorded:
        if key not in self._kept and self._may_try():
            try:
                sequence = await self._append(key, event, again=again)
            except (StoreUnavailable, SchemaError) as error:
                self._went_down(error)
            except Exception as error:
                # It is this event that is not taken.
                report_failure("events", error)
                given = give()
                if not _ends_call(event):
                    return Recorded(Outcome.LIVE if given else Outcome.LOST)
                return await self._store_instead(key, event, error)
            else:
                if sequence is None:
                    return Recorded(Outcome.LOST)  # with its session
                return Recorded(Outcome.STORED, sequence)
        given = give()
        # Who comes back for an answer has not got it.
        if given and not _ends_call(event):
            return Recorded(Outcome.LIVE)
        return Recorded(self._keep(key, event))

    def _may_try(self) -> bool:
        if not self._down:
            return True
        # What is kept is tried in the background; where nothing is, one event tries now and then.
        if self.down:
            return False
        self._try_at = anyio.current_time() + RECOVERY_INTERVAL
        return True

    async def _append(self, key: UUID, event: NewEvent, *, again: bool) -> int | None:
        trying = self._down
        sequence = await self.log.append(key, [event], again=again)
        if trying:
            self._came_up()
        if sequence is not None:
            self.following.moved(key, event.stream, sequence)
        return sequence

    async def _store_instead(self, key: UUID, event: NewEvent, error: Exception) -> Recorded:
        """Store an error in place of an answer that is not taken, so that nobody waits for it."""
        instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
        try:
            await self._append(key, instead, again=False)
        except (StoreUnavailable, SchemaError) as failure:
            self._went_down(failure)
            return Recorded(self._keep(key, instead))
        except Exception as failure:
            report_failure("events", failure)
        return Recorded(Outcome.LOST)

    def _instead_of(self, event: NewEvent, reason: str) -> NewEvent:
        """What a client gets that comes back for an answer which cannot be had any more."""
        stream = self.unfinished.get(event.stream)
        request_id = None if stream is None else stream.request_id
        text = error_message(request_id, f"The answer to the call could not be kept: {reason}", reason="lost")
        return replace(event, kind=EventKind.ERROR, message=text)

    def _keep(self, key: UUID, event: NewEvent) -> Outcome:
        if event.kind is EventKind.PRIMING:
            return Outcome.LOST  # nobody got its id
        kept = self._kept.setdefault(key, _Kept())
        size = message_bytes(event)
        full = (
            len(kept.events) >= MAX_KEPT_EVENTS
            or kept.size + size > MAX_KEPT_BYTES
            or self._kept_in_all + size > MAX_KEPT_IN_ALL
        )
        if full:
            if not _ends_call(event):
                return Outcome.LOST
            # Small, and no more of them than there are calls.
            event = self._instead_of(event, "too much was waiting to be stored")
            size = message_bytes(event)
        kept.events.append(event)
        self._weigh(kept, size)
        self.wake.set()
        return Outcome.KEPT

    def _went_down(self, error: Exception) -> None:
        self._down = True
        self._failures += 1
        self._try_at = anyio.current_time() + min(0.25 * 2 ** min(self._failures, 10), RECOVERY_INTERVAL)
        if not self._told:
            self._told = True
            logger.warning("events cannot be stored for now, and go out without ids: %s", error)
        self.wake.set()

    def _came_up(self) -> None:
        self._down = False
        self._failures = 0
        if self._told:
            self._told = False
            logger.info("events can be stored again; %d sessions have some that were kept", len(self._kept))

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

    async def recover(self) -> None:
        """Store what is kept.

        Raises:
            SessionStoreError: It does not work yet.
        """
        if not self._noted:
            await self.beat()
        async with anyio.create_task_group() as tasks:
            for key in list(self._kept):
                tasks.start_soon(self._store_kept, key)
        if self._down and self._kept:
            raise StoreUnavailable("events cannot be stored yet")

    async def _store_kept(self, key: UUID) -> None:
        """Store what is kept of a session, in its order; whatever comes meanwhile waits behind it."""
        kept = self._kept[key]
        while kept.events:
            event = kept.events[0]
            sequence: int | None = None
            try:
                # A try before may have stored it, and its answer was lost.
                sequence = await self._append(key, event, again=True)
            except (StoreUnavailable, SchemaError) as error:
                self._went_down(error)
                return
            except Exception as error:
                report_failure("events", error)
                if _ends_call(event) and event.kind is not EventKind.ERROR:
                    instead = self._instead_of(event, f"it is not taken by the log ({type(error).__name__})")
                    self._replace_first(kept, instead)
                    continue
            kept.events.popleft()
            self._weigh(kept, -message_bytes(event))
            telemetry.events.add(1, {"outcome": (Outcome.LOST if sequence is None else Outcome.STORED).value})
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
            if self._kept:
                await self.recover()
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


def error_message(request_id: RequestId | None, message: str, *, code: int = INTERNAL_ERROR, reason: str) -> str:
    """A JSON-RPC error that ends a call, as JSON text.

    Args:
        request_id: The call's.
        message: For people.
        code: For programs.
        reason: For programs that know this package: in the error's data.
    """
    error = ErrorData(code=code, message=message, data={"reason": reason})
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=error).model_dump_json(by_alias=True, exclude_unset=True)


def _ends_call(event: NewEvent) -> bool:
    return event.kind.final and event.stream != STANDALONE_STREAM
