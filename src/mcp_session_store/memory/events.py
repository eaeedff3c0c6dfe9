"""Event log in memory, the reference of its contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from mcp_session_store.errors import EventTooLarge, InvalidValue
from mcp_session_store.event_log import EVENT_PAGE, EVENT_SWEEP_LIMIT, STANDALONE_STREAM, STANDALONE_WAIT, EventLog
from mcp_session_store.memory.data import Data, Log, OnHint
from mcp_session_store.memory.sessions import MemorySessionStore
from mcp_session_store.records import (
    MAX_POSITION,
    EventPage,
    StoredEvent,
    check_texts,
    checked_size,
    message_bytes,
)
from mcp_session_store.retention import EventPolicy, EventSweepReport
from mcp_session_store.settings import checked_type
from mcp_session_store.store import check_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.records import NewEvent
    from mcp_session_store.store import SessionStore

__all__ = ["MemoryEventLog"]


class MemoryEventLog(EventLog):
    """Event log of the sessions of a `MemorySessionStore`, in a dictionary.

    Args:
        store: Store of the sessions.
        policy: See `EventLog`.
    """

    def __init__(self, store: MemorySessionStore, *, policy: EventPolicy | None = None) -> None:
        checked_type("store", store, MemorySessionStore, "a MemorySessionStore")
        super().__init__(policy=policy)
        self._store = store
        self._data = store.data

    @property
    def namespace(self) -> str:
        return self._store.namespace

    def is_of(self, store: SessionStore) -> bool:
        return store is self._store

    @property
    def data(self) -> Data:
        """Events of all logs that share them, and their sessions."""
        return self._data

    def _log(self, key: UUID) -> Log | None:
        return self._data.log(key, namespace=self.namespace)

    async def append(self, key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        check_keys(key)
        if max(max(event.position, event.previous) for event in events) > MAX_POSITION:
            raise InvalidValue(f"position is above {MAX_POSITION}, and cannot be stored")
        if sum(map(checked_size, events)) > self.policy.max_bytes_per_session:
            raise EventTooLarge(
                f"events are larger than the policy's max_bytes_per_session of {self.policy.max_bytes_per_session}"
            )
        if self._data.live(key, namespace=self.namespace) is None:
            return None
        log = self._data.logs.setdefault(key, Log())
        if again:
            for stream, stored, _ in log.events:
                if (stream, stored.position) == (events[0].stream, events[0].position):
                    return stored.sequence
        first, now = log.last + 1, self._data.now()
        for sequence, event in enumerate(events, first):
            stored = StoredEvent(
                sequence=sequence,
                position=event.position,
                previous=event.previous,
                kind=event.kind,
                message=event.message,
            )
            log.events.append((event.stream, stored, now))
        log.last += len(events)
        self._make_room(log)
        for on_hint in list(self._data.log_listeners):
            on_hint([key])
        return first

    def _make_room(self, log: Log) -> None:
        policy = self.policy
        sizes = [message_bytes(event) for _, event, _ in log.events]
        if len(sizes) > policy.max_events_per_session or sum(sizes) > policy.max_bytes_per_session:
            while len(sizes) > 0.9 * policy.max_events_per_session or sum(sizes) > 0.9 * policy.max_bytes_per_session:
                if len(sizes) == 1:
                    break
                del log.events[0], sizes[0]

    async def read(self, key: UUID, stream: str, *, after: int, limit: int = EVENT_PAGE) -> EventPage | None:
        check_keys(key)
        check_texts(stream=stream)
        if (log := self._log(key)) is None:
            return None
        events = [event for name, event, _ in log.events if name == stream and event.sequence > after]
        return EventPage(events=events[:limit], more=len(events) > limit, first=log.first, last=log.last)

    async def heads(self, keys: Collection[UUID]) -> dict[UUID, int]:
        check_keys(*keys)
        return {key: log.last for key in keys if (log := self._log(key)) is not None}

    async def standalone_places(self, keys: Collection[UUID]) -> dict[UUID, int]:
        check_keys(*keys)
        since = self._data.now() - STANDALONE_WAIT
        return {
            key: next(
                (
                    event.sequence - 1
                    for stream, event, stored_at in log.events
                    if stored_at > since and stream == STANDALONE_STREAM and event.message is not None
                ),
                log.last,
            )
            for key in keys
            if (log := self._log(key)) is not None
        }

    async def listen(self, on_hint: OnHint) -> None:
        self._data.log_listeners.append(on_hint)
        try:
            await anyio.sleep_forever()
        finally:
            self._data.log_listeners.remove(on_hint)

    async def sweep(self, *, limit: int = EVENT_SWEEP_LIMIT) -> EventSweepReport:
        if self.policy.max_age is None:
            return EventSweepReport()
        too_old, removed = self._data.now() - self.policy.max_age, 0
        for key in list(self._data.logs):
            log = self._log(key)
            while log is not None and log.events and log.events[0][2] <= too_old:
                if removed == limit:
                    return EventSweepReport(removed=removed, more=True)
                del log.events[0]
                removed += 1
        return EventSweepReport(removed=removed)
