"""Fixtures, methods to override and steps that all parts of the suite for event logs use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

from mcp_session_store.records import EventPage, NewEvent, StoredEvent
from mcp_session_store.retention import EventPolicy, EventSweepReport
from mcp_session_store.store import DEFAULT_NAMESPACE, SessionStore
from mcp_session_store.testing.factories import new_event, new_session

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.event_log import EventLog


class MakeLog(Protocol):
    """Function that makes a log, and the store of its sessions, for a namespace.

    All logs and stores that one function makes share their data.
    """

    def __call__(
        self, namespace: str = DEFAULT_NAMESPACE, *, policy: EventPolicy | None = None
    ) -> tuple[SessionStore, EventLog]: ...


def stored_as(event: NewEvent, sequence: int) -> StoredEvent:
    return StoredEvent(
        sequence=sequence, position=event.position, previous=event.previous, kind=event.kind, message=event.message
    )


async def read_page(
    log: EventLog, key: UUID, stream: str = "instance.1", *, after: int = 0, limit: int = 100
) -> EventPage:
    page = await log.read(key, stream, after=after, limit=limit)
    assert page is not None
    assert len(page.events) <= limit
    return page


async def read_all(log: EventLog, key: UUID, stream: str = "instance.1", *, limit: int = 100) -> list[StoredEvent]:
    """Return all events of a stream, read page by page."""
    events: list[StoredEvent] = []
    after, more = 0, True
    while more:
        page = await read_page(log, key, stream, after=after, limit=limit)
        assert page.events or not page.more
        events += page.events
        after, more = (page.events[-1].sequence, page.more) if page.events else (page.last, False)
    return events


async def sweep_events(log: EventLog, *, limit: int = 500) -> int:
    """Sweep until there is no more to do, and return the number of events that were removed."""
    report = EventSweepReport(more=True)
    for _ in range(200):
        if not report.more:
            return report.removed
        report += await log.sweep(limit=limit)
    raise AssertionError("a sweep has no end")


def sized(size: int, position: int, **changes: Any) -> NewEvent:
    """Return an event with a message of so many bytes."""
    return new_event(position, message='"' + "x" * (size - 2) + '"', **changes)


@pytest.mark.anyio
class LogSuite:
    """The log under test, and the store of its sessions."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Name of the event loop. Override it for a log that needs another than asyncio."""
        return "asyncio"

    @pytest.fixture
    def make_log(self) -> MakeLog:
        """Function that makes logs over data of this test's own. It may be an async fixture that cleans up."""
        raise NotImplementedError("override the fixture make_log")

    @pytest.fixture
    def made(self, make_log: MakeLog) -> tuple[SessionStore, EventLog]:
        return make_log()

    @pytest.fixture
    def store(self, made: tuple[SessionStore, EventLog]) -> SessionStore:
        return made[0]

    @pytest.fixture
    def log(self, made: tuple[SessionStore, EventLog]) -> EventLog:
        return made[1]

    async def expire(self, store: SessionStore, key: UUID) -> None:
        """Set the expiry of a session of the store to one second ago."""
        raise NotImplementedError("override the method expire")

    async def age_events(self, log: EventLog, key: UUID) -> None:
        """Set the times of all present events of a session to two days ago."""
        raise NotImplementedError("override the method age_events")

    async def _opened(self, store: SessionStore, **changes: Any) -> UUID:
        return (await store.create(new_session(**changes))).key

    async def _assert_gone(self, log: EventLog, *keys: UUID) -> None:
        for key in keys:
            assert await log.read(key, "instance.1", after=0) is None
            assert await log.append(key, [new_event(99)]) is None
        assert await log.heads(keys) == {}
