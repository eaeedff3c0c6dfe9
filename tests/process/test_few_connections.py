"""A database that gives a server fewer connections than its processes would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import BOUND, sessions, whoami
from tests.support.http import RawClient
from tests.support.roles import limited

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("limit", [3, 6])
async def test_processes_that_share_few_connections_refuse_no_request(
    application: Application, postgres_url: str, limit: int
) -> None:
    async with limited(postgres_url, limit=limit) as url:
        server = application.serve(url, workers=2, events=True, outage_patience=0)
        served: list[bool] = []

        async def client() -> None:
            for _ in range(4):
                async with RawClient(server.mcp_url) as client:
                    opened = await client.initialize()
                    served.append(opened.status == 200)
                    for _ in range(4):
                        served.append("result" in (await client.call_tool("whoami")).messages[-1])
                    served.append((await client.delete()).status == 200)

        async with sessions(server.mcp_url, 4) as kept:
            with anyio.fail_after(2 * BOUND):
                async with anyio.create_task_group() as group:
                    for _ in range(8):
                        group.start_soon(client)
                for one in kept:
                    await whoami(one)
        assert len(served) == 192
        assert all(served)
        server.terminate()
