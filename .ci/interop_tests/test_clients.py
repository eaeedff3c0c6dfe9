"""Clients of other versions and languages: a call that is refused for now fails alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.support.away import sessions_away

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio

SCRIPTS = Path(__file__).parent / "clients"
PLACES = Path(os.environ["INTEROP_CLIENTS"])
"""Folder into which `.ci/interop` has installed the clients."""
CLIENTS = {
    "Python SDK 1.30": [str(PLACES / "python1" / "bin" / "python"), str(SCRIPTS / "python1.py")],
    "TypeScript SDK 1.32": ["node", str(PLACES / "typescript" / "client.mjs")],
}


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_goes_on_in_its_session_after_a_refused_call(
    application: Application, sqlite_url: str, client: str
) -> None:
    server = application.serve(sqlite_url, outage_patience=0)
    async with await anyio.open_process([*CLIENTS[client], server.mcp_url], stderr=None) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, BufferedByteReceiveStream(process.stdout)

        async def outcome() -> str:
            await stdin.send(b"\n")
            return await line()

        async def line() -> str:
            with anyio.fail_after(20):
                return (await stdout.receive_until(b"\n", 10_000)).decode()

        assert (await line()).startswith("session ")
        assert await outcome() == "result"
        await anyio.to_thread.run_sync(server.restart)
        with sessions_away(sqlite_url):
            for _ in range(2):
                refused = await outcome()
                assert refused.startswith("error -32603 "), refused
                assert "was not handled" in refused
        assert await outcome() == "result"
        await stdin.aclose()
    assert len(application.handshakes(replayed=False)) == 1
