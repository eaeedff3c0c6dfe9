"""A client loses its connection while a call talks to it, and comes back to another process for the rest."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.support.clients import PATIENCE, Talking, everything, official_client, until
from tests.support.faults import FaultProxy
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.clients import OfficialClient
    from tests.support.deployment import Application
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


async def _talk_at_once(official: OfficialClient, calls: int, **arguments: Any) -> None:
    """Have so many calls run beside each other, which must all end well."""
    async with anyio.create_task_group() as group:
        for number in range(calls):
            group.start_soon(partial(official.talk, f"call-{number}", **arguments))


async def _talk_until(
    application: Application,
    official: OfficialClient,
    calls: int,
    condition: Callable[[], bool],
    *,
    count: int,
    **arguments: Any,
) -> None:
    """Have so many calls run beside each other, whose results wait until a condition holds."""
    names = [f"call-{number}" for number in range(calls)]
    for name in names:
        application.hold(name)
        application.let_say(name, count)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(_talk_at_once, official, calls, count=count, **arguments))
        await until(condition, "clients have come back often enough")
        for name in names:
            application.release(name)


@asynccontextmanager
async def _cutting(proxy: RoundRobinProxy, interval: float) -> AsyncIterator[None]:
    """Meanwhile all streams that can be resumed are cut again and again."""

    async def cut() -> None:
        while True:
            # The moment matters to nobody, but on a slow machine, too, something must get through between two.
            await anyio.sleep(interval)
            proxy.cut_streams()

    async with anyio.create_task_group() as group:
        group.start_soon(cut)
        yield
        group.cancel_scope.cancel()


async def test_the_official_client_whose_connections_are_cut_again_and_again_misses_nothing(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    calls, count = 8, 40
    async with (
        RoundRobinProxy([server.port for server in pair], version="1.0") as proxy,
        official_client(proxy.mcp_url) as official,
        _cutting(proxy, 0.7),
    ):

        def was_often_cut() -> bool:
            return len(official.resumed_after) > calls

        with anyio.fail_after(2 * PATIENCE):
            await _talk_until(application, official, calls, was_often_cut, count=count, pause=0.05)

    assert official.said == {f"call-{number}": everything(count) for number in range(calls)}
    assert [application.runs(call) for call in official.said] == [1] * calls
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


async def test_a_server_that_closes_a_stream_has_its_client_come_back_to_any_process(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    running, other = pair
    application.hold("poll")
    application.let_say("poll", 3)
    async with RawClient(running.mcp_url) as client:
        await client.handshake()
        call = Talking(client, "poll", count=9, leaves_before=[3, 6])
        async with call.connected(running):
            await call.take(1 + 3)
            application.let_say("poll")
            # The stream is closed, without a word.
            await call.take()
        assert call.said == [*range(3)]
        async with call.connected(running):
            await call.take(1)
            application.let_say("poll", 2)
            await call.take(2)
            application.let_say("poll")
            # A stream that was resumed is closed as well.
            await call.take()
        assert call.said == [*range(6)]
        application.release("poll")
        await call.read(other)

        assert call.said == everything(9)
        assert len(set(call.event_ids)) == len(call.event_ids) == 1 + 9 + 1
        assert call.retry == {RETRY}
        assert application.runs("poll") == 1


async def test_the_official_client_polls_a_call_that_closes_its_stream(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    calls, leaves = 4, (0, 5, 6, 19)
    async with RoundRobinProxy([server.port for server in pair]) as proxy, official_client(proxy.mcp_url) as official:
        with anyio.fail_after(PATIENCE):
            await _talk_at_once(official, calls, count=20, pause=0.05, leaves_before=leaves)
        assert official.said == {f"call-{number}": everything(20) for number in range(calls)}
        assert len(official.resumed_after) >= calls
        assert official.statuses.keys() <= {200, 202}
        assert [application.runs(call) for call in official.said] == [1] * calls


# What differs between the databases does so for all frameworks alike.
@pytest.mark.parametrize(
    ("app", "database_url"),
    [("mcpserver", "postgres"), ("mcpserver", "sqlite"), ("lowlevel", "postgres"), ("fastmcp", "sqlite")],
    indirect=["database_url"],
)
async def test_workers_of_one_server_go_on_with_the_streams_of_each_other(
    application: Application, store_url: str, app: str
) -> None:
    server = application.serve(store_url, app, workers=4, events=True, retry_interval=RETRY)
    await until(lambda: server.log().count("Application startup complete") == 4, "all workers have started")
    calls = 6
    async with (
        RoundRobinProxy([server.port], version="1.0") as proxy,
        official_client(proxy.mcp_url) as official,
        _cutting(proxy, 0.5),
    ):

        def was_cut_and_came_to_others() -> bool:
            # More than one of the workers had something of the session.
            return len(official.resumed_after) > calls and bool(application.handshakes(replayed=True))

        with anyio.fail_after(2 * PATIENCE):
            await _talk_until(
                application, official, calls, was_cut_and_came_to_others, count=20, pause=0.05, leaves_before=(10,)
            )

    assert official.said == {f"call-{number}": everything(20) for number in range(calls)}
    assert [application.runs(call) for call in official.said] == [1] * calls
    assert official.statuses.keys() <= {200, 202}
