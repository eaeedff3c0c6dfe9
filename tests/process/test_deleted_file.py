"""The file of a SQLite database is deleted under a running server, and put back: for clients that is an outage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy.engine import make_url

from tests.support.clients import sessions, until, whoami
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.http import Answer

pytestmark = pytest.mark.anyio


async def test_clients_wait_for_a_file_that_was_deleted_until_it_is_put_back(
    application: Application, sqlite_url: str, tmp_path: Path
) -> None:
    server = application.serve(sqlite_url)
    file = Path(str(make_url(sqlite_url).database))
    answers: list[Answer] = []

    async def call(client: RawClient) -> None:
        answers.append(await client.call_tool("whoami"))

    async def opening(client: RawClient) -> None:
        answers.append(await client.initialize())

    async with sessions(server.mcp_url, 3) as (resident, *evicted), RawClient(server.mcp_url) as new:
        await anyio.to_thread.run_sync(server.restart)
        await whoami(resident)
        kept = file.rename(tmp_path / "kept.db")
        # Without a request: the poll for changes looks, too.
        await until(lambda: "the session store is away" in server.log(), "the loss is noticed")
        async with anyio.create_task_group() as group:
            for client in evicted:
                group.start_soon(call, client)
            group.start_soon(opening, new)
            await whoami(resident)
            await anyio.sleep(0.5)
            assert answers == []
            assert not file.exists()
            kept.rename(file)
        assert [answer.status for answer in answers] == [200] * 3
        assert all("result" in answer.messages[-1] for answer in answers)
        for client in evicted:
            assert (await whoami(client))["restores"] == 1
    assert server.log().count("the session store is away") == 1
