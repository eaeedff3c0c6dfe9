"""Cases of the suite for event logs: limits on the number and size of a session's events."""

from __future__ import annotations

import random

import pytest

from mcp_session_store.errors import EventTooLarge
from mcp_session_store.records import EventKind, message_bytes
from mcp_session_store.retention import EventPolicy
from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all, read_page, sized, stored_as
from mcp_session_store.testing.factories import new_event


class Limits(LogSuite):
    """Limits on the number and size of a session's events."""

    async def test_a_log_keeps_its_newest_events(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_events_per_session=20))
        key, other = await self._opened(store), await self._opened(store)
        await log.append(other, [new_event(0)])
        start = await log.append(key, [new_event(0)])
        assert start is not None
        for number in range(1, 70):
            first = await log.append(key, [new_event(number, stream=f"instance.{number % 2}")])
            assert first == start + number
            page = await read_page(log, key)
            assert page.last == first
            # All events in the range are there, at most as many as the policy keeps, and not many fewer.
            assert 18 <= page.last - page.first + 1 <= 20 or number < 20
            kept = [*await read_all(log, key, "instance.0"), *await read_all(log, key, "instance.1")]
            assert sorted(event.sequence for event in kept) == list(range(page.first, page.last + 1))
        assert len(await read_all(log, other)) == 1

    async def test_an_append_of_more_than_a_log_keeps_leaves_its_last_ones(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_events_per_session=10))
        key = await self._opened(store)
        await log.append(key, [new_event(number) for number in range(10)])
        await log.append(key, [new_event(number) for number in range(10, 60)])
        events = await read_all(log, key)
        assert 9 <= len(events) <= 10
        assert [event.position for event in events] == list(range(60 - len(events), 60))

    async def test_a_log_keeps_no_more_bytes_than_it_may(self, make_log: MakeLog) -> None:
        limit = 2000
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=limit))
        key = await self._opened(store)
        sizes = random.Random(4)  # noqa: S311
        positions = iter(range(1000))
        for _ in range(60):
            events = [sized(sizes.choice([20, 100, 600, 990]), next(positions)) for _ in range(sizes.choice([1, 2]))]
            first = await log.append(key, events)
            assert first is not None
            kept = await read_all(log, key)
            assert [event.sequence for event in kept] == list(range(kept[0].sequence, first + len(events)))
            assert kept[-1] == stored_as(events[-1], first + len(events) - 1)
            assert sum(map(message_bytes, kept)) <= limit

    async def test_bytes_are_counted_and_not_characters(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        for number in range(3):
            assert await log.append(key, [new_event(number, message="é" * 200)]) is not None
        assert [event.position for event in await read_all(log, key)] == [1, 2]
        with pytest.raises(EventTooLarge):
            await log.append(key, [new_event(3, message="é" * 513)])

    async def test_events_without_a_message_take_no_bytes(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        await log.append(key, [sized(1024, 0)])
        await log.append(key, [new_event(number, kind=EventKind.PRIMING, message=None) for number in range(1, 9)])
        assert len(await read_all(log, key)) == 9

    async def test_an_event_as_large_as_all_of_a_log_is_kept_alone(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        await log.append(key, [sized(500, number) for number in range(2)])
        await log.append(key, [sized(1024, 2)])
        assert [event.position for event in await read_all(log, key)] == [2]
        await log.append(key, [sized(10, 3)])
        assert [event.position for event in await read_all(log, key)] == [3]

    async def test_events_that_are_larger_than_all_of_a_log_are_not_stored(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_bytes_per_session=1024))
        key = await self._opened(store)
        first = await log.append(key, [sized(500, 0)])
        assert first is not None
        for events in ([sized(1025, 1)], [sized(600, 1), sized(600, 2)]):
            with pytest.raises(EventTooLarge):
                await log.append(key, events)
        assert await log.append(key, [sized(500, 1)]) == first + 1
        assert [event.position for event in await read_all(log, key)] == [0, 1]
