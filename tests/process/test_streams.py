"""A client loses its connection while a call talks to it, and comes back to another process for the rest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.process.clients import PATIENCE, Talking, everything, official_client, until
from tests.support.faults import FaultProxy
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from tests.process.clients import OfficialClient
    from tests.process.conftest import Application
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

EVENTS = 200
"""Of the stream whose reader is killed at each of them."""
RETRY = 50
"""Milliseconds after which clients are told to come back."""


@pytest.fixture
def pair(application: Application, store_url: str) -> tuple[ServerProcess, ServerProcess]:
    """Two processes of one application, on one database."""
    return (
        application.serve(store_url, events=True, retry_interval=RETRY),
        application.serve(store_url, events=True, retry_interval=RETRY),
    )


async def test_a_reader_that_is_killed_at_each_event_and_goes_on_elsewhere_gets_what_was_sent(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    async with RawClient(pair[0].mcp_url) as client:
        await client.handshake()
        # One event primes the stream, and one is the answer.
        call = Talking(client, "all", count=EVENTS - 2)
        for turn in range(EVENTS):
            await call.read(pair[turn % 2], events=1)

        assert call.said == everything(EVENTS - 2)
        assert call.answer["result"]["content"][0]["text"] == str(pair[0].pid)
        assert len(set(call.event_ids)) == len(call.event_ids) == EVENTS
        assert call.retry == {RETRY}
        for server in pair:
            client.url = server.mcp_url
            # Who has the answer comes back for nothing more.
            assert (await client.get(last_event_id=call.event_ids[-1])).status == 405
        assert application.runs("all") == 1


async def test_a_reader_that_is_killed_at_each_event_follows_a_call_that_goes_on_elsewhere(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    count = EVENTS // 4
    application.hold("live")
    async with RawClient(pair[0].mcp_url) as client:
        await client.handshake()
        call = Talking(client, "live", count=count)
        await call.read(pair[0], events=1)
        for turn in range(count + 1):
            async with call.connected(pair[(turn + 1) % 2]):
                # It has all there is, and waits for what is said now.
                application.let_say("live")
                await call.take(None if turn == count else 1)

        assert call.said == everything(count)
        assert call.answer["result"]["content"][0]["text"] == str(pair[0].pid)
        assert application.runs("live") == 1


async def _talk_at_once(official: OfficialClient, calls: int, *, count: int, pause: float) -> None:
    """Have so many calls run beside each other, which must all end well; the client has all that they said."""
    async with anyio.create_task_group() as group:
        for number in range(calls):
            group.start_soon(partial(official.talk, f"call-{number}", count=count, pause=pause))


async def test_the_official_client_whose_connections_are_cut_again_and_again_misses_nothing(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    calls, count = 8, 40
    async with (
        RoundRobinProxy([server.port for server in pair], version="1.0") as proxy,
        official_client(proxy.mcp_url) as official,
        anyio.create_task_group() as group,
    ):

        async def cut() -> None:
            while True:
                # The moment matters to nobody, but on a slow machine, too, something must get through between two.
                await anyio.sleep(0.7)
                proxy.cut_streams()

        group.start_soon(cut)
        with anyio.fail_after(2 * PATIENCE):
            await _talk_at_once(official, calls, count=count, pause=0.05)
        group.cancel_scope.cancel()

    assert official.said == {f"call-{number}": everything(count) for number in range(calls)}
    assert [application.runs(call) for call in official.said] == [1] * calls
    assert len(official.resumed_after) > calls
    assert official.statuses.keys() <= {200, 202}


async def test_the_official_client_whose_connections_are_reset_comes_back_for_the_rest(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    calls, count = 8, 10
    names = [f"call-{number}" for number in range(calls)]
    for name in names:
        application.hold(name)
        application.let_say(name, count // 2)
    async with (
        RoundRobinProxy([server.port for server in pair]) as balancer,
        FaultProxy("127.0.0.1", balancer.port) as network,
        official_client(f"http://127.0.0.1:{network.port}/mcp") as official,
        anyio.create_task_group() as group,
    ):
        group.start_soon(partial(_talk_at_once, official, calls, count=count, pause=0))
        half = [[*range(count // 2)]] * calls
        await until(lambda: list(official.said.values()) == half, "all calls have said half")
        network.kill_connections()
        for name in names:
            application.release(name)

    assert official.said == {name: everything(count) for name in names}
    assert [application.runs(name) for name in names] == [1] * calls
    assert len(official.resumed_after) >= calls
