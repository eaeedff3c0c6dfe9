"""A server is redeployed under load: it gets SIGTERM, and a new one starts on its port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.process.clients import Load, official_client, sessions

if TYPE_CHECKING:
    from tests.process.conftest import Application
    from tests.process.records import Records

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("app", ["mcpserver", "fastmcp"])
async def test_a_redeploy_under_load_loses_no_session(
    application: Application, store_url: str, records: Records, app: str
) -> None:
    # Open SSE streams never end by themselves, so a shutdown has to be bounded; FastMCP terminates all
    # transports in it.
    server = application.serve(store_url, app, options=["--timeout-graceful-shutdown", "1"])
    async with sessions(server.mcp_url, 6) as clients, official_client(server.mcp_url) as official:
        before = await official.whoami()
        ids = [client.session_id for client in clients]
        # Each has a stream open, as clients do: the official one by itself, and one of the raw ones.
        async with clients[0].get_stream() as stream, Load(clients) as load:
            assert stream.status == 200
            await load.advance(2)
            await anyio.to_thread.run_sync(server.terminate)
            await anyio.to_thread.run_sync(server.start)
            await load.advance(3)
        after = await official.whoami()

        assert load.statuses.keys() <= {200, 503}, (load.statuses, load.disconnects)
        assert load.wrong == []
        assert [client.session_id for client in clients] == ids
        assert before["pid"] != after["pid"] == server.pid
        assert official.statuses.keys() <= {200, 202, 503}
        rows = [await records.row(session_id) for session_id in [*ids, *official.session_ids]]
        assert {(row["ended_at"], row["restores"]) for row in rows} == {(None, 1)}
    assert len(application.handshakes(replayed=False)) == 7
