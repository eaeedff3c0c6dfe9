"""A call that is refused for now fails alone: the official client goes on in its session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from mcp import MCPError

from tests.support.away import sessions_away
from tests.support.clients import official_client

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio


async def test_the_official_client_goes_on_in_its_session(application: Application, sqlite_url: str) -> None:
    server = application.serve(sqlite_url, outage_patience=0)
    async with official_client(server.mcp_url) as client:
        before = await client.whoami()
        await anyio.to_thread.run_sync(server.restart)
        with sessions_away(sqlite_url):
            for _ in range(3):
                with pytest.raises(MCPError, match="was not handled: Session store unavailable; try again later"):
                    await client.whoami()
        after = await client.whoami()
        assert before["pid"] != after["pid"] == server.pid
        assert len(client.session_ids) == 1
    assert len(application.handshakes(replayed=False)) == 1
    assert len(application.handshakes(replayed=True)) == 1
