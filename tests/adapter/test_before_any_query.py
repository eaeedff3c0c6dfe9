"""What costs no query: requests that are refused before, those of resident sessions, and those without sessions."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from mcp import Client as OfficialClient
from mcp.client.streamable_http import streamable_http_client
from mcp.server.transport_security import TransportSecuritySettings

from tests.support.asgi import PATIENCE, until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


@pytest.mark.parametrize(
    "session_id",
    ["", " ", "a b", "\t", "é", "a\x7f", "a" * 129, "a" * 100_000, "\x00", "%s" % ("a" * 20 + "\n")],
    ids=["empty", "blank", "with a blank", "tab", "not ASCII", "DEL", "too long", "far too long", "NUL", "line feed"],
)
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_malformed_id_is_unknown_without_a_query(store: FaultyStore, method: str, session_id: str) -> None:
    async with instance(store) as one:
        store.calls.clear()
        answer = await one.client(session_id).open(method, PING if method == "POST" else None).answer()
        assert answer.status == 404
        assert store.calls == []
        wellformed = await one.client("0" * 32).open(method, PING if method == "POST" else None).answer()
        assert wellformed.body == answer.body


async def test_an_id_of_128_characters_is_looked_up(store: FaultyStore) -> None:
    async with instance(store) as one:
        store.calls.clear()
        assert (await one.client("~" * 128).ping()).status == 404
        assert store.calls == ["load"]


@pytest.mark.parametrize("method", ["PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "get"])
@pytest.mark.parametrize("which", ["resident", "evicted", "unknown"])
async def test_another_method_is_refused_without_a_query(store: FaultyStore, which: str, method: str) -> None:
    async with instance(store) as one:
        session_id = await one.client().begin()
        if which == "evicted":
            await one.terminate(session_id)
            await until(lambda: one.residents == 0)
        await until(lambda: "touch" in store.calls)
        store.calls.clear()
        client = one.client("0" * 32 if which == "unknown" else session_id)
        answer = await client.open(method).answer()
        assert answer.status == 405
        assert {name.strip() for name in answer.headers["allow"].split(",")} == {"GET", "POST", "DELETE"}
        assert store.calls == []


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": None}, {"origin": "http://evil.example"}], ids=str
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_the_host_check_holds_before_a_restore_and_before_a_delete(
    store: FaultyStore, resident: bool, headers: dict[str, str | None], method: str
) -> None:
    guard = TransportSecuritySettings(allowed_hosts=["127.0.0.1:*"], allowed_origins=["http://127.0.0.1:*"])
    async with instance(store, transport_security=guard) as one:
        session_id = await one.client().begin()
        await until(lambda: "touch" in store.calls)
        if not resident:
            await one.terminate(session_id)
            await until(lambda: one.residents == 0)
        store.calls.clear()
        client = one.client(session_id)
        answer = await client.open(method, PING if method == "POST" else None, **headers).answer()
        assert answer.status in (403, 421)
        assert store.calls == []
        assert (await client.ping()).status == 200


async def test_a_body_of_another_type_is_refused_before_a_restore(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store) as one:
        store.calls.clear()
        assert (await one.client(session_id).post(b"x", content_type="text/plain")).status == 400
        assert store.calls == []


async def test_a_body_that_is_too_large_is_refused_before_a_restore(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, max_request_body_size=100) as one:
        store.calls.clear()
        assert (await one.client(session_id).post(b" " * 101)).status == 413
        assert store.calls == []
        assert one.residents == 0


# Resident sessions


@pytest.mark.parametrize("restored", [True, False], ids=["restored", "opened here"])
@pytest.mark.parametrize("fault", ["hangs", "is down", "has a bug"])
async def test_a_resident_session_is_served_without_the_store(
    store: FaultyStore, json_response: bool, fault: str, restored: bool
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, json_response=json_response) as one:
        client = one.client(session_id if restored else None)
        if restored:
            await client.ping()
        else:
            await client.initialize()
        store.calls.clear()
        if fault == "hangs":
            held = [store.hold(name) for name in ("load", "touch", "claim", "create", "end", "replace_initialize")]
        elif fault == "is down":
            store.down()
        else:
            store.broken()
        with anyio.fail_after(PATIENCE):
            assert (await client.notify("notifications/initialized")).status == 202
            assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
            stream = await client.get_stream()
            assert stream.status == 200
            stream.disconnect()
            await stream.end()
            assert (await client.call("client")).status == 200
        assert set(store.calls) <= {"touch"}
        if fault == "hangs":
            for each in held:
                each.release()
        store.up()


async def test_a_store_that_hangs_for_one_session_holds_up_no_other(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store) as one:
        resident = one.client()
        await resident.handshake()
        load = store.hold("load")
        waiting = one.client(session_id).open_request("ping")
        await load.wait_entered()
        assert (await resident.ping()).status == 200
        assert (await one.client().initialize()).status == 200
        load.release()
        assert (await waiting.answer()).status == 200


# The modern era


async def test_a_modern_request_costs_no_query(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response) as one:
        store.calls.clear()
        store.broken()
        meta = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "modern", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params: dict[str, Any] = {"name": "add", "arguments": {"a": 1, "b": 2}, "_meta": meta}
        client = one.client(headers={"mcp-protocol-version": "2026-07-28"})
        answer = await client.request("tools/call", params, mcp_method="tools/call", mcp_name="add")
        assert answer.text == "3"
        assert answer.session_id is None
        assert store.calls == []
        assert one.residents == 0


@asynccontextmanager
async def official_client(one: Instance, mode: str) -> AsyncIterator[OfficialClient]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=one.app), base_url="http://127.0.0.1:8000")
    async with (
        http,
        OfficialClient(streamable_http_client("http://127.0.0.1:8000/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


async def test_the_official_client_in_its_modern_mode_costs_no_query(store: FaultyStore) -> None:
    async with instance(store, Notes(), json_response=True) as one:
        store.calls.clear()
        store.broken()
        async with official_client(one, "2026-07-28") as client:
            result = await client.call_tool("add", {"a": 1, "b": 2})
            assert result.content[0].text == "3"  # type: ignore[union-attr]
        assert store.calls == []
        assert one.residents == 0


def test_the_raw_handshake_of_these_tests_is_of_the_handshake_era() -> None:
    assert INITIALIZE_PARAMS["protocolVersion"] < "2026-07-28"
