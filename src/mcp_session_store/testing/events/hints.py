"""Cases of the suite for event logs: heads of logs, and hints of new events."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING

from mcp_session_store.testing.events.suite import LogSuite
from mcp_session_store.testing.factories import new_event

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class HeadsAndHints(LogSuite):
    """Heads of logs, and hints of new events."""

    async def test_heads_tell_of_all_that_have_a_log(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        assert await log.heads([]) == {}
        last = {}
        for number, key in enumerate(keys[:2], 1):
            first = await log.append(key, [new_event(position) for position in range(number)])
            assert first is not None
            last[key] = first + number - 1
        assert await log.heads([*keys, uuid.uuid4()]) == last
        assert await log.heads(set(keys)) == last

    async def test_to_follow_changes_nothing(self, store: SessionStore, log: EventLog) -> None:
        key, without = await self._opened(store), await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        for _ in range(2):
            await log.follow([key, without, uuid.uuid4()])
        await log.follow([])
        assert await log.append(key, [new_event(1)]) == first + 1
        assert await log.heads([key, without]) == {key: first + 1}

    async def test_who_waits_for_hints_may_be_cancelled(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        for number in range(3):
            listening = asyncio.ensure_future(log.listen(lambda _: None))
            await asyncio.sleep(0.01)
            assert not listening.done()
            await log.follow([key])
            assert await log.append(key, [new_event(number)]) is not None
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            assert listening.cancelled()
