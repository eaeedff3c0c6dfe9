"""Cases of the suite for event logs: cancelled calls, and opening and closing a log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all
from mcp_session_store.testing.factories import new_event

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class Calls(LogSuite):
    """Cancelled calls, and opening and closing a log."""

    async def test_an_append_that_is_cancelled_disturbs_no_other(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        tasks = [asyncio.ensure_future(log.append(key, [new_event(number)])) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        by_sequence = {event.sequence: event.position for event in await read_all(log, key)}
        for number, outcome in enumerate(outcomes):
            if not isinstance(outcome, BaseException):
                assert outcome is not None
                assert by_sequence[outcome] == number
            else:
                assert number % 3 == 0

    async def test_a_log_may_be_opened_and_closed_more_than_once(self, make_log: MakeLog) -> None:
        _, log = make_log()
        await log.open()
        await log.open()
        await log.aclose()
        await log.aclose()
