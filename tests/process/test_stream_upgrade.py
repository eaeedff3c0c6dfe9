"""A database from before there were events: its sessions go on, and their streams resume."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mcp_session_store import session_key
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from tests.support.clients import Talking, everything, whoami
from tests.support.databases import migrated
from tests.support.http import INITIALIZE_PARAMS, RawClient
from tests.support.rows import insert_rows, session_row

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio


async def test_sessions_from_before_there_were_events_have_streams_that_resume(
    application: Application, database_url: str
) -> None:
    ids = [f"{number:032x}" for number in range(3)]
    rows = [
        session_row(key=session_key(one), client_name="raw", initialize_params=json.dumps(INITIALIZE_PARAMS))
        for one in ids
    ]
    await insert_rows(database_url, rows, revision="1_0002_retention")
    assert await migrate.current(database_url) == "1_0002_retention"

    await migrated(database_url)

    assert await migrate.current(database_url) == HEAD
    first, second = (application.serve(database_url, events=True) for _ in range(2))
    for session_id in ids:
        async with RawClient(first.mcp_url, session_id=session_id) as client:
            call = Talking(client, f"in-{session_id}", count=5)
            for server in (first, second, first):
                await call.read(server, events=2)
            await call.read(second)
            assert call.said == everything(5)
            assert application.runs(call.name) == 1


async def test_while_events_are_introduced_process_by_process_a_session_is_served_by_those_with_and_those_without(
    application: Application, store_url: str
) -> None:
    without = application.serve(store_url)
    new = application.serve(store_url, events=True)
    async with RawClient(without.mcp_url) as client:
        await client.handshake()
        unkept = Talking(client, "unkept", count=5)
        await unkept.read(without)
        assert (unkept.said, unkept.event_ids) == (everything(5), [])
        kept = Talking(client, "kept", count=5)
        await kept.read(new, events=3)
        # Where there are no events the call is not there to be resumed, and its client learns it.
        await kept.read(without)
        assert kept.said == [0, 1, "lost"]
        kept.forget_answer()
        await kept.read(new)
        assert kept.said == everything(5)
        client.url = without.mcp_url
        assert (await whoami(client))["pid"] == without.pid
        assert application.runs("kept") == 1
