"""Clients of other versions and languages: an outage is latency to them, and a call that is refused fails alone."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.support.away import sessions_away

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.abc import Process

    from tests.support.deployment import Application
    from tests.support.faults import FaultProxy
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

SCRIPTS = Path(__file__).parent / "clients"
PLACES = Path(os.environ["INTEROP_CLIENTS"])
"""Folder into which `.ci/interop` has installed the clients."""
CLIENTS = {
    "Python SDK 1.30": [str(PLACES / "python1" / "bin" / "python"), str(SCRIPTS / "python1.py")],
    "TypeScript SDK 1.32": ["node", str(PLACES / "typescript" / "client.mjs")],
}


class Client:
    """A client of one session, which makes a call when it is asked to."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)

    async def call(self) -> str:
        """Make a call, and return its outcome."""
        await self.stdin.send(b"\n")
        return await self.line()

    async def line(self) -> str:
        """Return the next line that the client prints."""
        with anyio.fail_after(90):
            return (await self._stdout.receive_until(b"\n", 10_000)).decode()


@asynccontextmanager
async def connected(client: str, server: ServerProcess) -> AsyncIterator[Client]:
    """Start a client, which opens a session and makes a call."""
    async with await anyio.open_process([*CLIENTS[client], server.mcp_url], stderr=None) as process:
        started = Client(process)
        assert (await started.line()).startswith("session ")
        assert await started.call() == "result"
        yield started
        await started.stdin.aclose()


def assert_refused(outcome: str) -> None:
    assert outcome.startswith("error -32603 "), outcome
    assert "was not handled" in outcome


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_goes_on_in_its_session_after_a_refused_call(
    application: Application, sqlite_url: str, client: str
) -> None:
    server = application.serve(sqlite_url, outage_patience=0)
    async with connected(client, server) as caller:
        await anyio.to_thread.run_sync(server.restart)
        with sessions_away(sqlite_url):
            for _ in range(2):
                assert_refused(await caller.call())
        assert await caller.call() == "result"
    assert len(application.handshakes(replayed=False)) == 1


@pytest.mark.parametrize("client", CLIENTS)
async def test_an_outage_is_latency_to_a_client_and_an_error_of_one_call_when_it_is_long(
    application: Application, proxied_url: str, proxy: FaultProxy, client: str
) -> None:
    server = await anyio.to_thread.run_sync(partial(application.serve, proxied_url, outage_patience=10))
    async with connected(client, server) as caller:
        for is_long in (False, True):
            await anyio.to_thread.run_sync(server.restart)
            proxy.refuse()
            proxy.kill_connections()
            outcomes: list[str] = []

            async def call(outcomes: list[str] = outcomes) -> None:
                outcomes.append(await caller.call())

            async with anyio.create_task_group() as calls:
                calls.start_soon(call)
                if not is_long:
                    await anyio.sleep(3)
                    assert outcomes == []
                    await proxy.accept()
            if is_long:
                assert_refused(outcomes[0])
                await proxy.accept()
                with anyio.fail_after(30):
                    while await caller.call() != "result":
                        await anyio.sleep(0.5)
            else:
                assert outcomes == ["result"]
    assert len(application.handshakes(replayed=False)) == 1
