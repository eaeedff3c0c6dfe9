"""Cases of the suite for event logs: values that cannot be stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import InvalidValue
from mcp_session_store.records import MAX_POSITION
from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all
from mcp_session_store.testing.factories import new_event
from mcp_session_store.testing.refusals import UNSTORABLE_TEXTS, refused

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.store import SessionStore


class Values(LogSuite):
    """`InvalidValue`: which calls raise it, and that nothing of them is stored."""

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    @pytest.mark.parametrize("field", ["message", "stream"])
    @pytest.mark.parametrize("again", [False, True])
    async def test_an_event_with_a_text_that_cannot_be_stored_is_refused_with_its_append(
        self, store: SessionStore, log: EventLog, field: str, text: str, again: bool
    ) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        bad = new_event(1, **{field: text})
        for events in ([bad, new_event(2)], [new_event(2), bad], [bad]):
            await refused(log.append(key, events, again=again))
        assert await log.heads([key]) == {key: first}
        assert await log.append(key, [new_event(1)], again=again) == first + 1
        assert [event.position for event in await read_all(log, key)] == [0, 1]

    @pytest.mark.parametrize("field", ["position", "previous"])
    async def test_a_position_that_is_too_large_is_refused(
        self, store: SessionStore, log: EventLog, field: str
    ) -> None:
        key = await self._opened(store)
        await refused(log.append(key, [new_event(**{field: MAX_POSITION + 1})]))
        assert await log.heads([key]) == {}
        assert await log.append(key, [new_event(**{field: MAX_POSITION})]) is not None

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_appends_beside_one_that_cannot_be_stored_are_stored(self, make_log: MakeLog, text: str) -> None:
        store, log = make_log()
        keys = [await self._opened(store) for _ in range(5)]
        appends = [(key, new_event(position)) for position in range(4) for key in keys]
        appends[3] = keys[3], new_event(0, message=text)
        appends[12] = keys[2], new_event(2, stream=text)
        outcomes = await asyncio.gather(*(log.append(key, [event]) for key, event in appends), return_exceptions=True)
        assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, InvalidValue)] == [3, 12]
        for place, key in enumerate(keys):
            expected = {2: [0, 1, 3], 3: [1, 2, 3]}.get(place, [0, 1, 2, 3])
            assert sorted(event.position for event in await read_all(log, key)) == expected

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_a_stream_with_a_name_that_cannot_be_stored_is_not_read(
        self, store: SessionStore, log: EventLog, text: str
    ) -> None:
        key = await self._opened(store)
        await log.append(key, [new_event(0)])
        await refused(log.read(key, text, after=0))
        assert len(await read_all(log, key)) == 1
