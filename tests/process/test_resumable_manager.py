"""The SDK's own manager with an event log: sessions in one process's memory, streams that resume."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.process.clients import PATIENCE, Talking, everything, official_client, until
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from tests.process.conftest import Application

pytestmark = pytest.mark.anyio

COUNT = 30


async def test_a_client_that_lost_its_connection_gets_what_it_missed(application: Application, store_url: str) -> None:
    server = application.serve(store_url, "resumable", retry_interval=50)
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        whole = Talking(client, "whole", count=COUNT)
        for _ in range(COUNT + 2):
            await whole.read(server, events=1)
        application.hold("live")
        live = Talking(client, "live", count=COUNT)
        await live.read(server, events=1)
        for _ in range(COUNT):
            async with live.connected(server):
                application.let_say("live")
                await live.take(1)
        application.release("live")
        await live.read(server)

        for call in (whole, live):
            assert call.said == everything(COUNT)
            assert len(set(call.event_ids)) == len(call.event_ids) == COUNT + 2
            assert (await client.get(last_event_id=call.event_ids[-1])).status == 405
            assert application.runs(call.name) == 1


async def test_the_official_client_misses_nothing(application: Application, store_url: str) -> None:
    server = application.serve(store_url, "resumable", retry_interval=50)
    names = [f"call-{number}" for number in range(4)]
    async with (
        RoundRobinProxy([server.port], version="1.0") as proxy,
        official_client(proxy.mcp_url) as official,
    ):
        await until(lambda: proxy.cut_streams() > 0, "the client listens")
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for name in names:
                    group.start_soon(partial(official.talk, name, count=COUNT, pause=0.02, leaves_before=[10]))
                await official.announce("first", 5)
                await until(lambda: all(official.said.get(name) for name in names), "all calls talk")
                proxy.cut_streams()
                await official.announce("second", 5)
        await until(lambda: len(official.announced) >= 10, "the client has heard all")
        assert official.announced == [f"said://{text}/{number}" for text in ("first", "second") for number in range(5)]
    assert official.said == {name: everything(COUNT) for name in names}
    assert len(official.resumed_after) >= len(names)
    assert [application.runs(name) for name in names] == [1] * len(names)
