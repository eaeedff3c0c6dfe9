"""Cases of the suite for event logs: events of sessions that end or expire."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all
from mcp_session_store.testing.factories import new_event
from mcp_session_store.testing.sessions.suite import SHORT, sweep_sessions

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class SessionEnds(LogSuite):
    """Events of sessions that end or expire."""

    async def test_events_of_a_session_that_is_not_live_are_not_stored(
        self, store: SessionStore, log: EventLog
    ) -> None:
        ended, expired = await self._opened(store), await self._opened(store)
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        await self._assert_gone(log, ended, expired, uuid.uuid4())

    async def test_of_a_session_with_events_that_has_expired_no_more_are_stored(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key, live = await self._opened(store), await self._opened(store)
        for session in (key, live):
            await log.append(session, [new_event(0)])
        before = await log.heads([key])
        await self.expire(store, key)
        firsts = await asyncio.gather(*(log.append(session, [new_event(1)]) for session in (key, live)))
        assert [first is None for first in firsts] == [True, False]
        assert await log.heads([key]) == before

    async def test_a_session_that_is_extended_after_its_expiry_goes_on_with_its_log(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        await self.expire(store, key)
        assert (await store.touch([Activity(key=key, first_age=60.0, last_age=0.0)])).not_live == set()
        assert await log.append(key, [new_event(1)]) == first + 1
        assert [event.position for event in await read_all(log, key)] == [0, 1]

    @pytest.mark.parametrize("reason", EndReason)
    async def test_a_session_that_ends_loses_its_log(
        self, store: SessionStore, log: EventLog, reason: EndReason
    ) -> None:
        ended, other, without = [await self._opened(store) for _ in range(3)]
        for key in (ended, other):
            await log.append(key, [new_event(number) for number in range(20)])
        for key in (ended, without):
            assert await store.end(key, reason=reason)
        await self._assert_gone(log, ended, without)
        assert len(await read_all(log, other)) == 20

    async def test_a_session_that_a_sweep_ends_loses_its_log(self, store: SessionStore, log: EventLog) -> None:
        expired, live = await self._opened(store), await self._opened(store)
        for key in (expired, live):
            await log.append(key, [new_event(0)])
        await self.expire(store, expired)
        store.retention = SHORT
        assert (await sweep_sessions(store)).expired == 1
        await self._assert_gone(log, expired)
        assert len(await read_all(log, live)) == 1

    async def test_a_session_that_ends_for_the_limit_loses_its_log(self, make_log: MakeLog) -> None:
        store, log = make_log()
        store.retention = RetentionPolicy(per_principal=1)
        first = await self._opened(store)
        await log.append(first, [new_event(0)])
        second = await self._opened(store)
        await self._assert_gone(log, first)
        assert await log.append(second, [new_event(0)]) is not None
