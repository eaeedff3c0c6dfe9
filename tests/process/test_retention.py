"""Sessions live for as long as they are used, whatever happens to the processes; and no longer."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import sessions, until, whoami
from tests.support.http import RawClient, assert_not_handled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.deployment import Application
    from tests.support.records import Records

pytestmark = pytest.mark.anyio

PROMISED = 30.0
"""Seconds within which what one instance is told counts on another; it takes less than 0.2 s, but on a slow machine."""
IDLE = timedelta(seconds=5)
"""Idle time of sessions that expire within a test, and that a client on a busy machine still gets to use."""
IDLE_FOR_A_WHILE = {"MCP_SESSION_STORE_IDLE": f"{IDLE.seconds}s"}


async def test_an_idle_session_expires_and_one_with_an_open_stream_or_a_running_call_does_not(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url, "stateful", environment=IDLE_FOR_A_WHILE, sweep_interval=0.5, end_within=1.0)
    application.calls_gate.touch()
    async with (
        RawClient(server.mcp_url) as idle,
        RawClient(server.mcp_url) as listening,
        RawClient(server.mcp_url) as calling,
        anyio.create_task_group() as group,
    ):
        for client in (idle, listening, calling):
            await client.handshake()
        created = (await records.row(idle.session_id))["created_at"]

        async def call() -> None:
            assert (await calling.call_tool("wait")).status == 200

        group.start_soon(call)
        async with listening.get_stream() as stream:
            assert stream.status == 200

            async def swept() -> bool:
                return bool((await records.row(idle.session_id))["end_reason"] == "expired")

            await until(swept, "the idle session has ended")
            assert (await records.row(idle.session_id))["ended_at"] - created > IDLE
            assert (await idle.call_tool("whoami")).status == 404
            # Long after that time: both were in use all the while.
            await anyio.sleep(2)
            for client in (listening, calling):
                assert (await records.row(client.session_id))["ended_at"] is None
                assert (await whoami(client))["restores"] == 0
        application.calls_gate.unlink()


async def _first_reported(clients: Sequence[RawClient], records: Records) -> None:
    """Use all sessions, and wait until that is reported, which it is at once, whatever the interval."""
    for client in clients:
        await whoami(client)

    async def reported() -> bool:
        rows = [await records.row(client.session_id) for client in clients]
        return all(row["expires_at"] - row["last_seen_at"] > timedelta(minutes=30) for row in rows)

    await until(reported, "the first activity was reported at once")


async def test_a_kill_between_activity_and_its_report_loses_no_session(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(
        store_url, "stateful", environment={"MCP_SESSION_STORE_IDLE": "1h"}, activity_interval=900.0
    )
    async with sessions(server.mcp_url, 5) as clients:
        await _first_reported(clients, records)
        before = [await records.row(client.session_id) for client in clients]
        for client in clients:
            await whoami(client)
        assert [await records.row(client.session_id) for client in clients] == before
        await anyio.to_thread.run_sync(server.restart)
        for client in clients:
            assert (await whoami(client))["restores"] == 1


async def test_activity_is_reported_when_a_process_stops(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(
        store_url, "stateful", environment={"MCP_SESSION_STORE_IDLE": "1h"}, activity_interval=900.0
    )
    async with sessions(server.mcp_url, 5) as clients:
        await _first_reported(clients, records)
        before = [(await records.row(client.session_id))["last_seen_at"] for client in clients]
        await anyio.sleep(0.05)
        for client in clients:
            await whoami(client)
    await anyio.to_thread.run_sync(server.terminate)
    after = [(await records.row(client.session_id))["last_seen_at"] for client in clients]
    assert all(later > earlier for earlier, later in zip(before, after, strict=True))


@pytest.mark.timeout(400)
async def test_two_hundred_sessions_are_served_from_a_memory_for_ten(application: Application, store_url: str) -> None:
    server = application.serve(store_url, "mcpserver", max_sessions=10)
    async with sessions(server.mcp_url, 200) as clients:
        for batch in range(0, 200, 5):
            # Five at a time: with those that a restore replaces there is room for them all.
            async with anyio.create_task_group() as group:
                for client in clients[batch : batch + 5]:
                    group.start_soon(whoami, client)
        told = [await whoami(client) for client in clients]
        assert {one["restores"] for one in told} == {2}
        async with RawClient(f"{server.url}/bookkeeping") as look, look.stream("GET", accept="*/*") as stream:
            held = await stream.read()
        assert held.messages[0]["_server_instances"] == 10


async def test_a_full_memory_in_use_refuses_and_recovers(application: Application, store_url: str) -> None:
    server = application.serve(store_url, "stateful", max_sessions=2)
    async with sessions(server.mcp_url, 3) as (first, second, third):
        async with first.get_stream() as one, second.get_stream() as two:
            assert (one.status, two.status) == (200, 200)
            assert_not_handled(await third.call_tool("whoami"))

        async def served() -> bool:
            answer = await third.call_tool("whoami")
            return "result" in answer.messages[-1]

        # The server has yet to notice that the two streams are closed.
        await until(served, "there is room for the third session")
        assert (await whoami(third))["restores"] >= 1


async def test_many_instances_sweep_without_getting_into_each_others_way(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url, "stateful", workers=4, environment=IDLE_FOR_A_WHILE, sweep_interval=0.1)
    await until(lambda: server.log().count("Application startup complete") == 4, "all workers have started")
    async with sessions(server.mcp_url, 30) as clients:

        async def all_swept() -> bool:
            return [(await records.row(c.session_id))["end_reason"] for c in clients] == ["expired"] * 30

        await until(all_swept, "all sessions have expired and were swept")
        assert {(await client.call_tool("whoami")).status for client in clients} == {404}
    assert "failed" not in server.log()


async def test_what_a_client_set_for_its_session_is_set_again_after_a_kill(
    application: Application, store_url: str
) -> None:
    server = application.serve(store_url, "stateful")
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        for level in ("info", "error"):
            assert (await client.request("logging/setLevel", {"level": level})).result == {}
        for uri in ("note://a", "note://b", "note://c"):
            assert (await client.request("resources/subscribe", {"uri": uri})).result == {}
        assert (await client.request("resources/unsubscribe", {"uri": "note://b"})).result == {}
        assert (await client.request("resources/subscribe", {"uri": "note://a"})).result == {}
        await anyio.to_thread.run_sync(server.restart)
        assert (await whoami(client))["restores"] == 1
        assert application.noted(replayed=True) == [
            "initialize",
            "notifications/initialized",
            "level error",
            "subscribe note://c",
            "subscribe note://a",
        ]


async def test_what_one_instance_is_told_counts_in_the_copy_of_another_that_has_the_clients_stream(
    application: Application, store_url: str
) -> None:
    # Too long for a test to learn of a change by polling.
    first = application.serve(store_url, "stateful", end_within=600.0)
    second = application.serve(store_url, "stateful", end_within=600.0)
    async with RawClient(first.mcp_url) as here, RawClient(second.mcp_url) as there:
        await here.handshake()
        there.session_id = here.session_id
        async with there.get_stream() as stream:

            async def heard(what: list[str]) -> None:
                """Wait until the copy there says this, all of which the client hears."""

                async def is_said() -> bool:
                    said = json.loads((await there.call_tool("say")).text)
                    found = [(await stream.next())["params"] for _ in said]
                    assert [params.get("data") or params["uri"] for params in found] == said
                    return bool(said == what)

                await until(is_said, f"the copy says {what}", within=PROMISED)

            await heard(["info", "error"])
            assert (await here.request("logging/setLevel", {"level": "error"})).result == {}
            await heard(["error"])
            for uri in ("note://a", "note://b"):
                assert (await here.request("resources/subscribe", {"uri": uri})).result == {}
            assert (await here.request("resources/unsubscribe", {"uri": "note://a"})).result == {}
            await heard(["error", "note://b"])
        assert (await whoami(there))["restores"] == 1
        assert (await whoami(here))["restores"] == 0
