"""A call says very much to a client that reads slowly, or not at all: the server's memory does not grow with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from mcp_session_store.event_log import EVENT_PAGE
from tests.support.clients import Talking, everything, until, whoami
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

MANY = 10_000
"""Events of the long stream."""
PADDING = 7200
"""Bytes of each, and a little more."""
GROWTH = MANY * PADDING // 2
"""Bytes by which a server may grow. It has buffers, pages of events, and SQLite's caches; in Python, a stream that is
kept takes more than its bytes."""
POLICY = {
    "MCP_SESSION_STORE_EVENTS_MAX_EVENTS_PER_SESSION": str(2 * MANY),
    "MCP_SESSION_STORE_EVENTS_MAX_BYTES_PER_SESSION": str(1024**3),
}


class _Memory:
    """How much a server grows from when this is made.

    Args:
        server: It.
    """

    def __init__(self, server: ServerProcess) -> None:
        self._process = psutil.Process(server.pid)
        self._before = self._resident()

    def check(self) -> None:
        grown = self._resident() - self._before
        assert grown < GROWTH, f"the server has grown by {grown / 1024**2:.0f} MiB"

    def _resident(self) -> int:
        resident: int = self._process.memory_info().rss
        return resident


# On the database that is part of the server's process; the other one has the same pages.
@pytest.mark.timeout(400)
async def test_a_server_does_not_grow_with_what_its_clients_do_not_read(
    application: Application, sqlite_url: str
) -> None:
    server = application.serve(sqlite_url, events=True, environment=POLICY)
    async with RawClient(server.mcp_url) as client, RawClient(server.mcp_url) as beside:
        await client.handshake()
        beside.session_id = client.session_id
        # What any stream takes.
        await Talking(client, "usual", count=EVENT_PAGE, padding=PADDING).read(server)
        memory = _Memory(server)
        call = Talking(client, "long", count=MANY, padding=PADDING)

        async def is_over() -> bool:
            memory.check()
            return application.is_over(call.name)

        async with call.connected(server):
            await call.take(1)
            # The client stays, and reads nothing more.
            await until(is_over, "the call has said all", within=150)
        async with call.connected(server):
            # Nor does it here. The server goes on with others, and with all that it does by itself.
            for _ in range(50):
                await whoami(beside)
                memory.check()
        async with call.connected(server):
            for _ in range(MANY // EVENT_PAGE):
                await call.take(EVENT_PAGE)
                await whoami(beside)
                memory.check()
        await call.read(server)

        assert call.said == everything(MANY)
        assert len(set(call.event_ids)) == len(call.event_ids) == 1 + MANY + 1
        assert application.runs(call.name) == 1
