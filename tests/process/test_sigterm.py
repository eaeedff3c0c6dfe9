"""A server is redeployed under load: it gets SIGTERM, and a new one starts on its port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import Load, official_client, sessions

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.records import Records

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("app", ["mcpserver_both", "fastmcp_both"])
async def test_a_redeploy_under_load_loses_no_session(
    application: Application, store_url: str, records: Records, app: str
) -> None:
    # Open SSE streams never end by themselves, so a shutdown has to be bounded; FastMCP terminates all
    # transports in it.
    server = application.serve(store_url, app, options=["--timeout-graceful-shutdown", "10"])
    async with (
        sessions(f"{server.url}/sse/mcp", 4) as sse,
        sessions(f"{server.url}/json/mcp", 4) as plain,
        official_client(f"{server.url}/sse/mcp") as official,
    ):
        clients = [*sse, *plain]
        before = await official.whoami()
        ids = [client.session_id for client in clients]
        # Each kind has a stream open, as clients do; the official one opens its own.
        async with sse[0].get_stream() as first, plain[0].get_stream() as second, Load(clients) as load:
            assert (first.status, second.status) == (200, 200)
            await load.advance(2)
            await anyio.to_thread.run_sync(server.terminate)
            await anyio.to_thread.run_sync(server.start)
            await load.advance(3)
        after = await official.whoami()

        # Requests without an answer are fine while there is no server. To be told that a session is unknown is not.
        assert load.statuses.keys() <= {200, 503}, (load.statuses, load.disconnects)
        assert load.wrong == []
        assert [client.session_id for client in clients] == ids
        assert before["pid"] != after["pid"] == server.pid
        assert official.statuses.keys() <= {200, 202, 503}
        rows = [await records.restored(session_id) for session_id in [*ids, *official.session_ids]]
        assert {(row["ended_at"], row["restores"]) for row in rows} == {(None, 1)}
    assert "Application shutdown complete" in server.log()
    assert len(application.handshakes(replayed=False)) == 9
