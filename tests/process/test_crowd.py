"""Clients that go away from calls which ask them something keep no others out, on a server with a full memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import until
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio

MOST = 4
"""Sessions that the server holds in memory."""


async def test_calls_that_ask_clients_that_have_gone_keep_no_other_client_out(
    application: Application, store_url: str
) -> None:
    server = application.serve(store_url, "questioning", max_sessions=MOST)
    async with RawClient(server.mcp_url) as live, RawClient(server.mcp_url) as newcomer:
        await live.handshake()
        async with live.get_stream() as stream:
            assert stream.status == 200
            for _ in range(MOST - 1):
                async with RawClient(server.mcp_url) as attacker:
                    await attacker.handshake()
                    asks = attacker.message("tools/call", {"name": "ask", "arguments": {}})
                    async with attacker.stream("POST", asks) as call:
                        assert (await call.next())["method"] == "elicitation/create"
            refused = 0

            async def opened() -> bool:
                nonlocal refused
                answer = await newcomer.initialize()
                refused += answer.status == 503
                await anyio.sleep(1)
                return answer.status == 200

            await until(opened, "the newcomer is served", within=90)
            assert refused > 0
            ping = await live.request("ping")
            assert ping.status == 200
