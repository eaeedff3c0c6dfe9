"""Server processes, the load balancer and the raw client, together on the stock SDK."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import httpx2
import psutil
import pytest

from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from tests.support.servers import ServeFunction

SSE = "tests.support.apps:sse_app"
JSON = "tests.support.apps:json_app"


@pytest.mark.parametrize("app", [SSE, JSON])
@pytest.mark.anyio
async def test_the_raw_client_speaks_with_sse_and_json_servers(serve: ServeFunction, app: str) -> None:
    server = serve(app)
    async with RawClient(server.mcp_url) as client:
        opened = await client.handshake()
        assert opened.session_id == client.session_id
        assert opened.result["protocolVersion"] == "2025-11-25"
        assert (await client.call_tool("pid")).text == str(server.pid)
        async with client.get_stream() as stream:
            assert stream.status == 200
            assert (await client.get()).status == 409
        assert (await client.delete()).status == 200
        gone = await client.call_tool("pid")
        assert gone.status == 404
        assert gone.error["code"] == -32600


@pytest.mark.anyio
async def test_messages_that_precede_the_answer_are_seen_in_order(serve: ServeFunction) -> None:
    server = serve(SSE)
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        params = {"name": "count", "arguments": {"to": 3}, "_meta": {"progressToken": "p"}}
        answer = await client.request("tools/call", params)
        steps = [m["params"]["progress"] for m in answer.messages if m.get("method") == "notifications/progress"]
        assert steps == [0, 1, 2]
        assert answer.text == "3"


def test_a_killed_server_starts_again_on_its_port_as_another_process(serve: ServeFunction) -> None:
    server = serve(SSE)
    before = server.pid
    server.kill()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.url, trust_env=False)
    server.start()
    assert server.pid != before
    assert httpx2.get(server.url, trust_env=False).status_code == 404


def test_a_terminated_server_ends_in_an_orderly_way(serve: ServeFunction) -> None:
    server = serve(SSE)
    assert server.terminate() in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in server.log()


def test_nothing_is_left_of_a_killed_server_with_workers(serve: ServeFunction) -> None:
    server = serve(SSE, workers=2)
    pids = server.pids()
    assert len(pids) >= 3
    server.kill()
    left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert left == []


def test_a_server_that_does_not_start_shows_its_log(serve: ServeFunction) -> None:
    with pytest.raises(AssertionError, match="no_such_app"):
        serve("tests.support.apps:no_such_app")


@pytest.mark.anyio
async def test_the_load_balancer_sends_each_request_to_the_next_server(serve: ServeFunction) -> None:
    servers = [serve(SSE), serve(SSE)]
    clients = [RawClient(server.mcp_url) for server in servers]
    for client in clients:
        async with client:
            await client.handshake()
    async with RoundRobinProxy([server.port for server in servers]) as proxy:
        # On the stock SDK each session lives in one process only: a call on the wrong one would be a 404.
        for turn in range(6):
            async with RawClient(proxy.mcp_url, session_id=clients[turn % 2].session_id) as through:
                assert (await through.call_tool("pid")).text == str(servers[turn % 2].pid)
        assert proxy.served == [server.port for server in servers] * 3


@pytest.mark.anyio
async def test_the_load_balancer_forwards_a_stream_as_it_comes_and_closes_it_with_the_client(
    serve: ServeFunction,
) -> None:
    server = serve(SSE)
    async with RoundRobinProxy([server.port]) as proxy, RawClient(proxy.mcp_url) as client:
        await client.handshake()
        async with client.get_stream() as stream:
            # The head has come through while the body is open.
            assert stream.status == 200
            assert (await client.call_tool("pid")).text == str(server.pid)
        big = "x" * 300_000
        assert (await client.request("ping", {"_meta": {"big": big}})).result == {}
        assert (await client.delete()).status == 200


@pytest.mark.anyio
async def test_the_load_balancer_passes_over_a_server_that_is_down(serve: ServeFunction) -> None:
    servers = [serve(SSE), serve(SSE)]
    async with RoundRobinProxy([server.port for server in servers]) as proxy:
        servers[0].kill()
        async with RawClient(proxy.mcp_url) as client:
            await client.handshake()
            assert (await client.call_tool("pid")).text == str(servers[1].pid)
            servers[1].kill()
            assert (await client.call_tool("pid")).status == 502


@pytest.mark.anyio
async def test_the_environment_reaches_the_server_and_settings_of_the_shell_do_not(
    serve: ServeFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_SESSION_STORE_URL", "sqlite:///somebody-elses.db")
    server = serve(SSE, environment={"GIVEN": "yes"})
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        assert (await client.call_tool("environment", {"name": "GIVEN"})).text == "yes"
        assert (await client.call_tool("environment", {"name": "MCP_SESSION_STORE_URL"})).text == "not set"
    assert os.environ["MCP_SESSION_STORE_URL"]
