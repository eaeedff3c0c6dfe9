"""Cases of the suite for stores of state: values as they are stored, read and removed."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.errors import ConfigurationError, InvalidValue
from mcp_session_store.records import EndReason
from mcp_session_store.state_store import MAX_NAME_BYTES, MAX_VERSION, StoredState
from mcp_session_store.testing.factories import new_state
from mcp_session_store.testing.state.suite import MakeState, StateSuite, texts

if TYPE_CHECKING:
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore


class Values(StateSuite):
    """Values as they are stored, read and removed."""

    async def test_a_session_begins_without_state(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        assert await state.get(key) == {}
        assert await state.get(key, ["a"]) == {}

    async def test_a_value_is_read_as_it_was_put_on_any_instance(self, make_state: MakeState) -> None:
        (store, here), (_, there) = make_state(), make_state()
        key = await self._opened(store)
        new = new_state("name", '{"a": [1, 2]}')
        assert await here.put(key, new) == 0
        assert await there.get(key, ["name"]) == {"name": StoredState('{"a": [1, 2]}', new.version)}

    async def test_values_come_back_to_the_letter(self, store: SessionStore, state: StateStore) -> None:
        values = {
            "escaped NUL": json.dumps({"name": "\0"}),
            "escaped surrogate": json.dumps({"name": "\ud800"}),
            "not ASCII": json.dumps({"名前": "🦀 é"}, ensure_ascii=False),
            "as written": '{"b": 1,  "a": 2, "a": 3, "n": 1.0e2, "x": [null, "\'\\"$1?:a%s"]}',
            "60 KB": json.dumps("x" * 60_000),
            "null": "null",
        }
        plain, watched = await self._opened(store), await self._opened(store)
        for name, text in values.items():
            await self._put(state, plain, name, text)
            await self._put(state, watched, name, text, watched=True)
        assert await texts(state, plain) == values
        record = await store.load(watched)
        assert record is not None
        assert record.watched == values

    async def test_names_are_compared_to_the_letter(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        names = ["", "a", "A", "a ", "é 🦀", "a'b\"c:d%s$1?\\", "x" * MAX_NAME_BYTES]
        for name in names:
            await self._put(state, key, name, json.dumps(name))
        assert await texts(state, key) == {name: json.dumps(name) for name in names}
        while names:
            assert set(await state.get(key, names) or ()) == set(names)
            assert await state.delete(key, names.pop()) is not None
            assert set(await state.get(key) or ()) == set(names)

    async def test_a_value_takes_the_place_of_the_one_before(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        await self._put(state, key, "a", "1")
        version = await self._put(state, key, "a", "2")
        assert await state.get(key) == {"a": StoredState("2", version)}

    async def test_get_returns_the_names_that_are_asked_for(self, store: SessionStore, state: StateStore) -> None:
        key, other = await self._opened(store), await self._opened(store)
        for name in ("a", "b", "c"):
            await self._put(state, key, name)
        await self._put(state, other, "d")
        assert set(await state.get(key, ["a", "c", "d", "e"]) or ()) == {"a", "c"}
        assert await state.get(key, []) == {}
        assert set(await state.get(key) or ()) == {"a", "b", "c"}
        assert set(await state.get(other) or ()) == {"d"}

    async def test_a_removed_value_is_gone_and_no_other(self, store: SessionStore, state: StateStore) -> None:
        key, other = await self._opened(store), await self._opened(store)
        for session in (key, other):
            for name in ("a", "b"):
                await self._put(state, session, name)
        for _ in range(2):
            assert await state.delete(key, "a") == 0
        assert set(await state.get(key) or ()) == {"b"}
        assert set(await state.get(other) or ()) == {"a", "b"}

    async def test_calls_of_many_sessions_at_once_do_not_mix(self, store: SessionStore, state: StateStore) -> None:
        keys = [await self._opened(store) for _ in range(5)]

        async def use(number: int) -> None:
            key, name = keys[number % 5], str(number)
            await self._put(state, key, name, json.dumps(number))
            assert (await state.get(key, [name]) or {})[name].value == json.dumps(number)
            if number % 3 == 0:
                await state.delete(key, name)

        await asyncio.gather(*map(use, range(60)))
        for place, key in enumerate(keys):
            assert await texts(state, key) == {str(n): json.dumps(n) for n in range(60) if n % 5 == place and n % 3}

    async def test_a_session_that_is_not_live_has_no_state_and_takes_none(
        self, store: SessionStore, state: StateStore
    ) -> None:
        unknown, ended, expired = uuid.uuid4(), await self._opened(store), await self._opened(store)
        for key in (ended, expired):
            await self._put(state, key, "a")
        await store.end(ended, reason=EndReason.CLIENT)
        await self.expire(store, expired)
        for key in (unknown, ended, expired):
            assert await state.get(key) is None
            assert await state.get(key, ["a"]) is None
            assert await state.get(key, []) is None
            assert await state.put(key, new_state("a")) is None
            assert await state.put(key, new_state("a"), expected=5) is None
            assert await state.delete(key, "a") is None

    async def test_a_value_that_cannot_be_stored_is_refused_alone(self, store: SessionStore, state: StateStore) -> None:
        key = await self._opened(store)
        names = ["a\0", "\ud800", "é" * (MAX_NAME_BYTES // 2 + 1)]
        wrong: list[dict[str, Any]] = [
            *({"name": name} for name in names),
            *({"value": value} for value in ("\0", '"\ud800"')),
            *({"version": version} for version in (0, MAX_VERSION + 1)),
            *({"ttl": ttl} for ttl in (0.0, -1.0, float("nan"), 1e12)),
        ]
        good = new_state("good")
        outcomes = await asyncio.gather(
            *(state.put(key, new_state(**changes)) for changes in wrong), state.put(key, good), return_exceptions=True
        )
        assert outcomes.pop() == 0
        assert [type(outcome) for outcome in outcomes] == [InvalidValue] * len(wrong)
        assert await texts(state, key) == {"good": "1"}
        for name in names:
            with pytest.raises(InvalidValue):
                await state.get(key, [name])
            with pytest.raises(InvalidValue):
                await state.delete(key, name)

    async def test_a_key_that_is_none_is_refused(self, state: StateStore) -> None:
        wrong: Any = "session-id"
        for call in (state.get(wrong), state.put(wrong, new_state("a")), state.delete(wrong, "a")):
            with pytest.raises(ConfigurationError, match="UUID"):
                await call

    async def test_a_store_may_be_opened_and_closed_more_than_once(self, make_state: MakeState) -> None:
        _, state = make_state()
        await state.open()
        await state.open()
        await state.aclose()
        await state.aclose()
