"""Sessions expire by what the database says."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import until, whoami
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.records import Records

pytestmark = pytest.mark.anyio


async def test_a_session_lives_ten_minutes_until_it_is_used_and_is_unknown_when_it_has_expired(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url)
    async with (
        RawClient(server.mcp_url) as used,
        RawClient(server.mcp_url) as unused,
        RawClient(server.mcp_url) as expired,
        RawClient(server.mcp_url, session_id="0" * 32) as unknown,
    ):
        for client in (used, unused, expired):
            assert (await client.initialize()).status == 200
            row = await records.row(client.session_id)
            assert abs(row["expires_at"] - row["created_at"] - timedelta(minutes=10)) < timedelta(seconds=1)

        await used.notify("notifications/initialized")
        assert (await used.call_tool("whoami")).status == 200

        async def lives_on() -> bool:
            row = await records.row(used.session_id)
            return bool(row["expires_at"] - row["last_seen_at"] > timedelta(hours=23))

        await until(lives_on, "the first use has given the session the policy's life")
        row = await records.row(unused.session_id)
        assert row["expires_at"] - row["created_at"] < timedelta(minutes=11)
        await records.expire(expired.session_id)

        await anyio.to_thread.run_sync(server.restart)

        refused = await expired.call_tool("whoami")
        assert (refused.status, refused.body) == (404, (await unknown.call_tool("whoami")).body)
        assert (await expired.notify("notifications/initialized")).status == 404
        assert (await expired.get()).status == 404
        assert (await expired.delete()).status == 404
        for client in (used, unused):
            assert (await whoami(client))["restores"] == 1

            async def lives(client: RawClient = client) -> bool:
                row = await records.row(client.session_id)
                return bool(row["expires_at"] - row["last_seen_at"] > timedelta(hours=23))

            await until(lives, "a use after a restore is reported at once")
        restored = {one.replayed_in for one in application.handshakes(replayed=True)}
        assert restored == {used.session_id, unused.session_id}
