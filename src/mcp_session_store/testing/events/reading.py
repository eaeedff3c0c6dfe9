"""Cases of the suite for event logs: reading streams page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mcp_session_store.event_log import STANDALONE_STREAM
from mcp_session_store.records import EventKind, message_bytes
from mcp_session_store.testing.events.suite import (
    LogSuite,
    MakeLog,
    read_all,
    read_page,
    sized,
    stored_as,
    sweep_events,
)
from mcp_session_store.testing.factories import new_event

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class Reading(LogSuite):
    """Reading streams page by page."""

    async def test_a_session_without_events_has_no_log(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        assert await log.read(key, "instance.1", after=0) is None
        assert await log.heads([key]) == {}

    async def test_a_record_says_the_newest_event_of_the_log_that_is_of_its_store(self, make_log: MakeLog) -> None:
        (store, log), (another, _) = make_log(), make_log()
        if not log.is_of(store):
            pytest.skip("its records do not say the newest event")
        assert not log.is_of(another)
        keys = [await self._opened(store) for _ in range(3)]
        for number, key in enumerate(keys):
            for position in range(number):
                await log.append(key, [new_event(position)])
        assert [getattr(await store.find(key), "newest_event", None) for key in keys] == [0, 1, 2]
        assert await log.heads(keys) == {keys[1]: 1, keys[2]: 2}

    async def test_a_stream_without_events_tells_how_far_the_log_goes(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(1)])
        assert first is not None
        page = await read_page(log, key, "another")
        assert (page.events, page.more, page.first, page.last) == ([], False, first, first + 1)

    async def test_what_is_known_is_not_read_again(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(0, stream="instance.2"), new_event(1)])
        assert first is not None
        for after, expected in ((first - 1, [0, 1]), (first, [1]), (first + 1, [1]), (first + 2, []), (2**62, [])):
            page = await read_page(log, key, after=after)
            assert [event.position for event in page.events] == expected
            assert (page.more, page.first, page.last) == (False, first, first + 2)

    async def test_a_client_that_opens_the_standalone_stream_is_served_what_was_said_recently(
        self, make_log: MakeLog
    ) -> None:
        (store, log), (_, foreign) = make_log(), make_log("another")
        keys = [await self._opened(store) for _ in range(5)]
        without, old, silent, recent, trimmed = keys
        said = new_event(0, stream=STANDALONE_STREAM)
        priming = new_event(1, stream=STANDALONE_STREAM, kind=EventKind.PRIMING, message=None)
        for key in (trimmed, old):
            await log.append(key, [new_event(0), said])
            await self.age_events(log, key)
            if key is trimmed:
                await sweep_events(log)
        await log.append(silent, [new_event(0), priming, new_event(1)])
        await log.append(recent, [said])
        last = await log.append(old, [new_event(1), priming, said, new_event(2), said])
        assert last is not None
        heads = await log.heads(keys)
        assert await log.standalone_places([]) == {}
        assert await log.standalone_places(keys) == {
            old: last + 1,
            silent: heads[silent],
            recent: heads[recent] - 1,
            trimmed: heads[trimmed],
        }
        assert await log.standalone_places([without]) == {}
        assert await foreign.standalone_places(keys) == {}

    async def test_a_stream_is_read_page_by_page(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        events = [new_event(number, stream=f"instance.{number % 2}") for number in range(30)]
        first = await log.append(key, events)
        assert first is not None
        assert await read_all(log, key, "instance.1", limit=4) == [
            stored_as(event, first + number) for number, event in enumerate(events) if number % 2
        ]
        page = await read_page(log, key, "instance.1", limit=14)
        assert (len(page.events), page.more) == (14, True)
        page = await read_page(log, key, "instance.1", limit=15)
        assert (len(page.events), page.more) == (15, False)

    async def test_large_events_are_read_page_by_page_whatever_the_limit(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        sizes = [2_000_000, 10, 10, 900_000, 900_000, 900_000, 10, 2_000_000, 10]
        for number, size in enumerate(sizes):
            await log.append(key, [sized(size, number)])
        assert [message_bytes(event) for event in await read_all(log, key)] == sizes

    async def test_events_that_are_stored_while_others_are_read_come_with_the_next_page(
        self, make_log: MakeLog
    ) -> None:
        (store, here), (_, there) = make_log(), make_log()
        key = await self._opened(store)
        await there.append(key, [new_event(0)])
        after, seen = 0, []
        for number in range(1, 6):
            page = await read_page(here, key, after=after)
            seen += [event.position for event in page.events]
            after = page.last
            await there.append(key, [new_event(number), new_event(number, stream="instance.2")])
        assert seen == list(range(5))
