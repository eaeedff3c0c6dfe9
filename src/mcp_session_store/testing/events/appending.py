"""Cases of the suite for event logs: storing events: order, concurrency and repeated appends."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.event_log import STANDALONE_STREAM, EventLog
from mcp_session_store.records import EventKind, StoredEvent
from mcp_session_store.testing.events.suite import LogSuite, MakeLog, read_all, read_page, stored_as
from mcp_session_store.testing.factories import new_event

if TYPE_CHECKING:
    from mcp_session_store.store import SessionStore


class Appending(LogSuite):
    """Storing events: order, concurrency and repeated appends."""

    async def test_an_event_is_read_as_it_was_stored(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        event = new_event(7, previous=3)
        first = await log.append(key, [event])
        assert first is not None
        assert first > 0
        page = await read_page(log, key)
        assert page.events == [stored_as(event, first)]
        assert (page.more, page.first, page.last) == (False, first, first)

    @pytest.mark.parametrize("kind", EventKind)
    async def test_events_of_every_kind_are_kept(self, store: SessionStore, log: EventLog, kind: EventKind) -> None:
        key = await self._opened(store)
        event = new_event(kind=kind, message=None if kind is EventKind.PRIMING else "{}")
        first = await log.append(key, [event])
        assert first is not None
        assert await read_all(log, key) == [stored_as(event, first)]

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(json.dumps({"name": "\0"}), id="escaped NUL"),
            pytest.param(json.dumps({"name": "\ud800"}), id="escaped surrogate"),
            pytest.param(json.dumps({"name": "名前 🦀 é"}, ensure_ascii=False), id="not ASCII"),
            pytest.param('{"b": 1,  "a": 2, "a": 3, "n": 1.0e2, "x": [null, "\'\\"$1?:a%s"]}', id="as written"),
            pytest.param(json.dumps({"name": "x" * 3_000_000}), id="3 MB"),
            pytest.param("", id="nothing"),
        ],
    )
    async def test_messages_come_back_to_the_letter(self, store: SessionStore, log: EventLog, text: str) -> None:
        key = await self._opened(store)
        await log.append(key, [new_event(message=text)])
        assert [event.message for event in await read_all(log, key)] == [text]

    async def test_an_event_gets_the_next_sequence_of_its_session_whatever_its_stream(
        self, store: SessionStore, log: EventLog
    ) -> None:
        key = await self._opened(store)
        first = await log.append(key, [new_event(0)])
        assert first is not None
        assert await log.append(key, [new_event(0, stream="instance.2"), new_event(1)]) == first + 1
        assert await log.append(key, [new_event(0, stream=STANDALONE_STREAM)]) == first + 3
        assert await log.append(key, [new_event(2)]) == first + 4
        streams = {
            "instance.1": [(first, 0), (first + 2, 1), (first + 4, 2)],
            "instance.2": [(first + 1, 0)],
            STANDALONE_STREAM: [(first + 3, 0)],
        }
        for stream, expected in streams.items():
            page = await read_page(log, key, stream)
            assert [(event.sequence, event.position) for event in page.events] == expected
            assert (page.more, page.first, page.last) == (False, first, first + 4)

    async def test_positions_are_as_large_as_they_may_be(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        large = new_event(2**62, stream="名前 🦀 \\ ' %s " + "x" * 500, previous=2**62 - 1)
        first = await log.append(key, [large])
        assert first is not None
        assert await read_all(log, key, large.stream) == [stored_as(large, first)]

    async def test_events_of_several_sessions_do_not_mix(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(3)]
        for turn in range(4):
            for number, key in enumerate(keys):
                await log.append(key, [new_event(turn, message=f'"{number} {turn}"')])
        for number, key in enumerate(keys):
            events = await read_all(log, key)
            assert [event.message for event in events] == [f'"{number} {turn}"' for turn in range(4)]
            assert [event.sequence for event in events] == list(range(events[0].sequence, events[0].sequence + 4))

    async def test_of_appends_at_once_each_keeps_its_events_together(self, make_log: MakeLog) -> None:
        made = [make_log() for _ in range(2)]
        key = await self._opened(made[0][0])
        appends = [
            [new_event(10 * number + part, stream=f"instance.{part % 2}") for part in range(number % 4 + 1)]
            for number in range(40)
        ]
        firsts = await asyncio.gather(
            *(made[number % 2][1].append(key, events) for number, events in enumerate(appends))
        )
        expected: dict[str, list[StoredEvent]] = {"instance.0": [], "instance.1": []}
        for first, events in zip(firsts, appends, strict=True):
            assert first is not None
            for offset, event in enumerate(events):
                expected[event.stream].append(stored_as(event, first + offset))
        for stream, stored in expected.items():
            assert await read_all(made[0][1], key, stream) == sorted(stored, key=lambda event: event.sequence)
        total = sum(map(len, appends))
        last = (await made[0][1].heads([key]))[key]
        taken = sorted(event.sequence for stored in expected.values() for event in stored)
        assert taken == list(range(last - total + 1, last + 1))

    async def test_appends_to_many_sessions_at_once_are_stored_in_each(
        self, store: SessionStore, log: EventLog
    ) -> None:
        keys = list(await asyncio.gather(*(self._opened(store) for _ in range(60))))
        unknown = [uuid.uuid4() for _ in range(10)]
        turns = [(key, turn) for turn in range(5) for key in [*keys, *unknown]]
        firsts = await asyncio.gather(*(log.append(key, [new_event(turn)]) for key, turn in turns))
        assert [first is None for first in firsts] == [key in unknown for key, _ in turns]
        for key in keys:
            events = await read_all(log, key)
            assert sorted(event.position for event in events) == list(range(5))
        assert (await log.heads([*keys, *unknown])).keys() == set(keys)

    async def test_what_was_stored_before_is_not_stored_again(self, store: SessionStore, log: EventLog) -> None:
        key = await self._opened(store)
        events = [new_event(0), new_event(0, stream="instance.2"), new_event(1)]
        first = await log.append(key, events)
        assert first is not None
        for _ in range(2):
            assert await log.append(key, events, again=True) == first
        assert await log.append(key, [new_event(1)], again=True) == first + 2
        assert await log.heads([key]) == {key: first + 2}

    async def test_what_was_not_stored_before_is_stored(self, store: SessionStore, log: EventLog) -> None:
        key, other = await self._opened(store), await self._opened(store)
        await log.append(other, [new_event(0)])
        first = await log.append(key, [new_event(0)], again=True)
        assert first is not None
        assert await log.append(key, [new_event(0, stream="instance.2")], again=True) == first + 1
        assert await log.append(key, [new_event(1)], again=True) == first + 2
        assert await log.append(uuid.uuid4(), [new_event(0)], again=True) is None

    async def test_some_are_stored_and_others_were_before(self, store: SessionStore, log: EventLog) -> None:
        keys = [await self._opened(store) for _ in range(2)]
        before = {(key, number): await log.append(key, [new_event(number)]) for key in keys for number in (0, 1)}
        calls = [(key, number) for number in range(4) for key in keys]
        firsts = await asyncio.gather(
            *(log.append(key, [new_event(number)], again=number < 3) for key, number in calls)
        )
        sequences = dict(zip(calls, firsts, strict=True))
        assert {call: sequences[call] for call in before} == before
        for key in keys:
            events = await read_all(log, key)
            assert sorted(event.position for event in events) == [0, 1, 2, 3]
            assert {event.position: event.sequence for event in events} == {n: sequences[key, n] for n in range(4)}
