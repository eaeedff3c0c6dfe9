"""Values that belong to no session: what py-key-value asks of every store, and what this package adds."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from click.testing import CliRunner
from key_value.aio.errors import InvalidTTLError, SerializationError, ValueTooLargeError
from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.stores.memory import MemoryStore
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper

from mcp_session_store.cli import main
from mcp_session_store.errors import ConfigurationError, KeyValueFull, StoreClosed
from mcp_session_store.sql import SqlKeyValue, SqlSessionStore
from tests.support.databases import execute, migrated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

VALUES: list[dict[str, Any]] = [
    {},
    {"text": "NUL \0, lone \ud800, Ø and 🎈", "": None},
    {"numbers": [0, -1, 2**70, 1.5e300], "nested": {"list": [{}, [], [None, True, "x"]]}},
    {"large": "x" * 200_000},
]


@pytest.fixture
async def values(anyio_backend: str, migrated_url: str) -> AsyncIterator[SqlKeyValue]:
    async with SqlKeyValue(migrated_url, namespace=uuid4().hex) as store:
        yield store


async def test_it_is_a_store_of_py_key_value(values: SqlKeyValue) -> None:
    assert isinstance(values, AsyncKeyValue)
    wrapped = PrefixKeysWrapper(values, prefix="a")
    await wrapped.put("key", {"x": 1})
    assert await wrapped.get("key") == {"x": 1}


@pytest.mark.parametrize("kind", ["ours", "theirs"])
async def test_values_are_stored_replaced_and_removed(values: SqlKeyValue, kind: str) -> None:
    """Their own store in memory passes as well, so that the promises are theirs."""
    store: AsyncKeyValue = values if kind == "ours" else MemoryStore()
    assert await store.get("key", collection="c") is None
    assert await store.ttl("key", collection="c") == (None, None)
    assert await store.delete("key", collection="c") is False
    for value in VALUES:
        await store.put("key", value, collection="c")
        assert await store.get("key", collection="c") == value
    await store.put("key", {"in": "the default"})
    assert await store.get("key", collection="c") == VALUES[-1]
    assert await store.get("key") == {"in": "the default"}
    assert await store.get("key", collection="default_collection") == {"in": "the default"}
    assert await store.delete("key", collection="c") is True
    assert await store.get("key", collection="c") is None
    assert await store.delete("key", collection="c") is False
    await store.put_many(["a", "b"], ({"n": 1}, {"n": 2}), collection="c" * 1000)
    await store.put("b" * 5000, {"n": 3}, collection="c" * 1000)
    keys = ["b", "none", "a", "b" * 5000, "a"]
    assert await store.get_many(keys, collection="c" * 1000) == [{"n": 2}, None, {"n": 1}, {"n": 3}, {"n": 1}]
    assert await store.ttl_many(["a", "none"], collection="c" * 1000) == [({"n": 1}, None), (None, None)]
    assert await store.delete_many(["a", "none", "b"], collection="c" * 1000) == 2
    assert await store.delete_many([], collection="c" * 1000) == 0
    with pytest.raises(ValueError, match=r"different number|2 keys and 1 values"):
        await store.put_many(["a", "b"], [{"n": 1}])
    for bad in ({"x": object()}, {"x": datetime.now(UTC)}, {"x": {1, 2}}, {"x": b"bytes"}):
        with pytest.raises(SerializationError):
            await store.put("bad", bad)
    for ttl in (0, -1, True):
        with pytest.raises(InvalidTTLError):
            await store.put("bad", {}, ttl=ttl)
    assert await store.get("bad") is None
    await store.put("key", {"n": 1}, ttl=100)
    found, left = await store.ttl("key")
    assert found == {"n": 1}
    assert left is not None
    assert 90 < left <= 100
    await store.put("key", {"n": 2})
    assert await store.ttl("key") == ({"n": 2}, None)
    await store.put("key", {"n": 3}, ttl=0.2)
    await asyncio.sleep(0.5)
    assert await store.ttl("key") == (None, None)


async def test_many_at_once(values: SqlKeyValue) -> None:
    async def work(name: str) -> None:
        for number in range(5):
            await values.put(f"{name}-{number}", {"n": number})
            assert await values.get(f"{name}-{number}") == {"n": number}
            await values.put("common", {"n": name})
            assert await values.delete(f"{name}-{number}")
            assert await values.get(f"{name}-{number}") is None

    await asyncio.gather(*(work(str(number)) for number in range(10)))
    assert (await values.get("common") or {}).keys() == {"n"}


async def test_values_are_kept_apart_by_namespace_and_found_by_others(migrated_url: str) -> None:
    namespace = uuid4().hex
    async with (
        SqlSessionStore(migrated_url, namespace=namespace) as sessions,
        SqlKeyValue(sessions) as one,
        SqlKeyValue(migrated_url, namespace=namespace) as other,
        SqlKeyValue(migrated_url, namespace=namespace + "x") as foreign,
    ):
        await one.put("key", {"n": 1}, collection="a/b")
        assert await other.get("key", collection="a/b") == {"n": 1}
        assert await other.get("b/key", collection="a") is None
        assert await foreign.get("key", collection="a/b") is None
        assert await foreign.delete("key", collection="a/b") is False
        assert await other.delete("key", collection="a/b") is True


async def test_no_key_is_stored(values: SqlKeyValue, migrated_url: str) -> None:
    await values.put("the-key-of-a-client", {"n": 1}, collection="c\0")
    rows = await execute(migrated_url, "SELECT * FROM mcp_session_value")
    assert rows
    assert "the-key-of-a-client" not in str(rows)


async def test_expired_values_are_swept_with_the_sessions(database_url: str) -> None:
    await migrated(database_url)
    async with SqlSessionStore(database_url) as sessions, SqlKeyValue(sessions) as values:
        for number in range(5):
            await values.put(f"short {number}", {}, ttl=0.1)
        await values.put("long", {}, ttl=3600)
        await values.put("for ever", {})
        async with SqlKeyValue(database_url, namespace="other") as foreign:
            await foreign.put("short", {}, ttl=0.1)
        await asyncio.sleep(0.3)
        assert await values.delete("short 0") is False
        first = await sessions.sweep(limit=3)
        assert (first.values, first.more) == (3, True)
        assert (await sessions.sweep(limit=3)).values == 1
        await values.put("short", {}, ttl=0.1)
        await asyncio.sleep(0.3)
        await values.cull()
        assert len(await execute(database_url, "SELECT * FROM mcp_session_value")) == 3


def test_the_command_sweeps_values(migrated_url: str) -> None:
    async def put(namespace: str) -> None:
        async with SqlKeyValue(migrated_url, namespace=namespace) as values:
            await values.put_many(["a", "b", "c"], [{}, {}, {}], ttl=0.1)
            await values.put("d", {}, ttl=60)
            await asyncio.sleep(0.3)

    namespace = uuid4().hex
    asyncio.run(put(namespace))
    result = CliRunner().invoke(main, ["sweep", "--url", migrated_url, "--namespace", namespace])
    assert "3 expired values were removed" in result.output


async def test_the_bytes_of_a_value_and_of_all_are_limited(migrated_url: str) -> None:
    async with SqlKeyValue(migrated_url, namespace=uuid4().hex, max_value_bytes=500, max_total_bytes=2000) as values:
        with pytest.raises(ValueTooLargeError):
            await values.put("key", {"x": "x" * 500})
        for number in range(4):
            await values.put(f"key {number}", {"x": "x" * 490})
        with pytest.raises(KeyValueFull, match="max_total_bytes"):
            await values.put("one more", {"x": "x" * 100})
        # A login that is renewed takes no more room than before.
        await values.put("key 1", {"y": "y" * 490}, ttl=60)
        assert await values.get("key 1") == {"y": "y" * 490}
        await values.delete("key 0")
        await asyncio.sleep(1.1)
        await values.put("one more", {"x": "x" * 100})


@pytest.mark.parametrize("argument", ["max_value_bytes", "max_total_bytes", "default_collection"])
def test_arguments_that_cannot_work(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=argument):
        SqlKeyValue("sqlite:///x.db", **{argument: 0})  # type: ignore[arg-type]


async def test_a_closed_store_refuses(migrated_url: str) -> None:
    values = SqlKeyValue(migrated_url)
    await values.get("key")
    await values.aclose()
    with pytest.raises(StoreClosed):
        await values.get("key")
    await values.open()
    assert await values.get("key") is None
    await values.aclose()
