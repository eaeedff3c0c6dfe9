"""SIGTERM while calls run and streams are open: calls get their answers, streams end, and the log has no error."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.support.clients import until
from tests.support.http import RawClient
from tests.support.servers import ForkedServerProcess

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.support.deployment import Application
    from tests.support.http import Answer, Stream
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

NOT_IN_LOG = ("Traceback", "ERROR", "without completing response", "Cancel ")


class Answers:
    """Answers to requests that are sent side by side, by the names that a test gives them."""

    def __init__(self) -> None:
        self.by_name: dict[str, Answer] = {}
        self.begun: set[str] = set()
        """Names of the answers that have begun."""

    async def get(self, name: str, request: Callable[[], Awaitable[Answer]]) -> None:
        self.by_name[name] = await request()

    async def read(self, name: str, request: Callable[[], AbstractAsyncContextManager[Stream]]) -> None:
        """Read a stream to its end, which is one by HTTP, and not a cut connection."""
        async with request() as stream:
            assert stream.status == 200
            self.begun.add(name)
            self.by_name[name] = await stream.read()

    async def begin(self, *names: str) -> None:
        """Wait until these streams are open."""
        await until(lambda: self.begun.issuperset(names), f"{', '.join(names)} begin")


async def stopped(server: ServerProcess) -> int:
    return await anyio.to_thread.run_sync(server.wait)


@pytest.mark.parametrize("events", [False, True])
async def test_under_uvicorn_calls_end_before_the_server_and_streams_at_once(
    application: Application, sqlite_url: str, events: bool
) -> None:
    options = ["--timeout-graceful-shutdown", "60"]
    server = application.serve(sqlite_url, "mcpserver_both", options=options, events=events)
    for call in ("sse", "json", "left"):
        application.hold(call)
    answers = Answers()
    async with (
        RawClient(f"{server.url}/sse/mcp") as sse,
        RawClient(f"{server.url}/json/mcp") as plain,
        anyio.create_task_group() as requests,
    ):
        for client, call in ((sse, "sse"), (plain, "json")):
            await client.handshake()
            requests.start_soon(answers.get, call, partial(client.request, "tools/call", _talk(call)))
            requests.start_soon(answers.read, f"GET {call}", client.get_stream)
        await until(lambda: application.runs("sse") == application.runs("json") == 1, "the calls run")
        if events:
            # A client that has lost its connection and come back.
            async with sse.stream("POST", sse.message("tools/call", _talk("left"))) as stream:
                event_id = (await stream.next_event()).id
            assert event_id is not None
            requests.start_soon(answers.read, "left", partial(sse.get_stream, last_event_id=event_id))
        await answers.begin("GET sse", "GET json", *(["left"] if events else []))
        os.kill(server.pid, signal.SIGTERM)
        # Streams end while the calls still run.
        await until(lambda: {"GET sse", "GET json"} <= answers.by_name.keys(), "streams end")
        assert not answers.by_name.keys() & {"sse", "json", "left"}
        for call in ("sse", "json", "left"):
            application.release(call)
        assert await stopped(server) in (0, -signal.SIGTERM)
    for call in ("sse", "json", "left") if events else ("sse", "json"):
        assert answers.by_name[call].text == str(server.pid)
    assert [text for text in NOT_IN_LOG if text in server.log()] == []


async def test_calls_that_take_longer_than_the_server_waits_are_answered_as_lost(
    application: Application, sqlite_url: str
) -> None:
    options = ["--timeout-graceful-shutdown", "3"]
    server = application.serve(sqlite_url, "mcpserver_both", options=options, events=True)
    answers = Answers()
    async with (
        RawClient(f"{server.url}/sse/mcp") as sse,
        RawClient(f"{server.url}/json/mcp") as plain,
        anyio.create_task_group() as requests,
    ):
        for client, call in ((sse, "sse"), (plain, "json")):
            application.hold(call)
            await client.handshake()
            requests.start_soon(answers.get, call, partial(client.request, "tools/call", _talk(call)))
        await until(lambda: application.runs("sse") == application.runs("json") == 1, "the calls run")
        os.kill(server.pid, signal.SIGTERM)
        assert await stopped(server) in (0, -signal.SIGTERM)
    for call in ("sse", "json"):
        assert answers.by_name[call].error["data"] == {"reason": "lost"}
    assert "are lost" in server.log()
    assert [text for text in NOT_IN_LOG if text in server.log()] == []


async def test_run_durable_waits_for_calls_as_long_as_it_is_told(tmp_path: Path, sqlite_url: str) -> None:
    server = ForkedServerProcess(
        ["tests.support.durable_program", "{port}"],
        log=tmp_path / "log",
        environment={"MCP_SESSION_STORE_URL": sqlite_url},
    )
    answers = Answers()
    with server:
        async with RawClient(server.mcp_url) as client, anyio.create_task_group() as requests:
            await client.handshake()
            requests.start_soon(answers.read, "short", partial(sleep, client, 2))
            requests.start_soon(answers.read, "long", partial(sleep, client, 60))
            requests.start_soon(answers.read, "GET", client.get_stream)
            await answers.begin("short", "long", "GET")
            os.kill(server.pid, signal.SIGTERM)
            assert await stopped(server) in (0, -signal.SIGTERM)
        assert answers.by_name["short"].text == "slept"
        assert answers.by_name["long"].error["data"] == {"reason": "lost"}
        assert answers.by_name["GET"].messages == []
        assert [text for text in NOT_IN_LOG if text in server.log()] == []
        server.start()
        async with RawClient(server.mcp_url, session_id=client.session_id) as again:
            assert (await again.call_tool("sleep", {"seconds": 0})).text == "slept"
            # A second SIGINT forces it to stop, and calls are answered all the same.
            async with anyio.create_task_group() as requests:
                requests.start_soon(answers.read, "forced", partial(sleep, again, 60))
                await answers.begin("forced")
                os.kill(server.pid, signal.SIGINT)
                await anyio.sleep(0.3)
                os.kill(server.pid, signal.SIGINT)
                assert await stopped(server) == 0
        assert answers.by_name["forced"].error["data"] == {"reason": "lost"}
        assert [text for text in NOT_IN_LOG if text in server.log()] == []


def sleep(client: RawClient, seconds: int) -> AbstractAsyncContextManager[Stream]:
    """Call the tool `sleep`; its stream opens when the server has the call."""
    message = client.message("tools/call", {"name": "sleep", "arguments": {"seconds": seconds}})
    return client.stream("POST", message)


def _talk(call: str) -> dict[str, Any]:
    return {"name": "talk", "arguments": {"call": call, "count": 0}}
