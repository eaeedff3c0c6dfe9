"""Cases of the suite for event logs: sweeps of old events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.retention import EventPolicy
from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all, read_page, sweep_events
from mcp_session_store.testing.factories import new_event

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class Sweeping(LogSuite):
    """Sweeps of old events."""

    async def test_a_sweep_removes_events_that_are_too_old_and_nothing_else(
        self, store: SessionStore, log: EventLog
    ) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        for key in keys[:2]:
            await log.append(key, [new_event(number) for number in range(5)])
            await self.age_events(log, key)
        for key in keys[1:]:
            await log.append(key, [new_event(number) for number in range(5, 8)])
        last = await log.heads(keys)
        assert await sweep_events(log) == 10
        assert await sweep_events(log) == 0
        assert await log.heads(keys) == last
        page = await read_page(log, keys[0])
        assert (page.events, page.first, page.last) == ([], page.last + 1, last[keys[0]])
        for key in keys[1:]:
            page = await read_page(log, key)
            assert [event.position for event in page.events] == [5, 6, 7]
            assert page.first == page.events[0].sequence

    async def test_a_log_that_was_swept_goes_on_where_it_was(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0), new_event(1)])
        assert first is not None
        await self.age_events(log, key)
        assert await sweep_events(log) == 2
        assert await log.append(key, [new_event(2)]) == first + 2
        page = await read_page(log, key)
        assert [event.position for event in page.events] == [2]
        assert (page.first, page.last) == (first + 2, first + 2)
        # The new event grows old in turn.
        assert await sweep_events(log) == 0
        await self.age_events(log, key)
        assert await sweep_events(log) == 1

    async def test_what_is_kept_as_long_as_its_session_is_not_swept(self, make_log: MakeLog) -> None:
        store, log = make_log(policy=EventPolicy(max_age=None))
        key = await self._opened(store)
        await log.append(key, [new_event(0)])
        await self.age_events(log, key)
        assert await sweep_events(log) == 0
        assert len(await read_all(log, key)) == 1

    async def test_a_sweep_goes_on_step_by_step(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(4)]
        for number, key in enumerate(keys):
            await log.append(key, [new_event(position) for position in range(5 * number + 2)])
            await self.age_events(log, key)
            await log.append(key, [new_event(100)])
        report = await log.sweep(limit=8)
        assert 0 < report.removed <= 16
        assert report.more
        assert report.removed + await sweep_events(log, limit=8) == 38
        for key in keys:
            assert [event.position for event in await read_all(log, key)] == [100]

    async def test_several_who_sweep_at_once_remove_each_event_once(self, make_log: MakeLog) -> None:
        made = [make_log() for _ in range(3)]
        keys = [await self._opened(made[0][0]) for _ in range(12)]
        for key in keys:
            await made[0][1].append(key, [new_event(number) for number in range(15)])
            await self.age_events(made[0][1], key)
        removed = 0
        for _ in range(200):
            reports = await asyncio.gather(*(log.sweep(limit=20) for _, log in made))
            removed += sum(report.removed for report in reports)
            if not any(report.removed or report.more for report in reports):
                break
        assert removed == 180
