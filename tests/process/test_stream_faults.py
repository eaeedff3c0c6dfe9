"""The database fails while calls talk: what they say goes on, and nothing of it is lost to a client that comes back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import BOUND, Talking, everything, sessions, until, whoami
from tests.support.faults import breaking
from tests.support.http import RawClient, assert_unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tests.support.deployment import Application
    from tests.support.faults import FaultProxy
    from tests.support.postgres import PostgresServer
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

COUNT = 20
INSTANCE_TIMEOUT = 6.0
"""Seconds that the servers are given. A process that gets no time on a busy machine is silent for less."""
OUTAGE = 9.0
"""Seconds that an outage lasts at least, in which nobody's heartbeat is noted: longer than that."""


async def _talk_through_an_outage(
    application: Application,
    servers: Sequence[ServerProcess],
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
) -> None:
    """Have calls talk before, while and after the database is away, to clients that do all that clients can do."""
    running, other = servers
    async with RawClient(running.mcp_url) as client, RawClient(running.mcp_url) as beside:
        await client.handshake()
        beside.session_id = client.session_id
        names = ("stays", "cut", "away", "elsewhere", "young")
        calls = [Talking(client, name, count=COUNT) for name in names]
        stays, cut, away, elsewhere, young = calls

        async def say(call: Talking, things: int) -> None:
            application.let_say(call.name, things)
            await call.take(things)

        for call in calls:
            application.hold(call.name)
        for call in (stays, cut, away, elsewhere):
            await call.connect(running)
            await call.take(1)
            await say(call, 5)
        # One client is away, for as long as it likes, and one follows its call from another process.
        await away.leave()
        await elsewhere.connect(other)
        await say(elsewhere, 1)

        await begin()
        with anyio.fail_after(BOUND):
            for call in (stays, cut):
                await say(call, 3)
                assert call.said == [*range(8)]
                assert len(call.event_ids) == 1 + 5
            # A call that begins now is served as well.
            await young.connect(running)
            await say(young, 3)
            assert (young.said, young.event_ids) == ([0, 1, 2], [])
        await cut.leave()
        # The server has noticed that when it has served something else.
        await whoami(beside)
        ended = (cut, away, elsewhere)
        for call in ended:
            application.release(call.name)
        await until(lambda: all(application.is_over(call.name) for call in ended), "three calls have ended")
        for call in (cut, away):
            with anyio.fail_after(BOUND):
                assert_unavailable(await beside.get(last_event_id=call.event_ids[-1]))
        await anyio.sleep(OUTAGE)
        await end()

        await cut.read(other)
        await away.read(running)
        await elsewhere.take()
        for call in (stays, young):
            # Soon events have ids again, and their clients can lose their connections.
            known = len(call.event_ids)
            while len(call.event_ids) == known:
                await say(call, 1)
            application.release(call.name)
            await call.read(other)

        for call in calls:
            assert call.said == everything(COUNT)
            assert call.repeated == []
            assert len(set(call.event_ids)) == len(call.event_ids)
            assert application.runs(call.name) == 1


async def test_streams_go_on_while_postgres_is_down_and_nothing_that_nobody_heard_is_lost(
    application: Application, stoppable_postgres: PostgresServer, stoppable_url: str
) -> None:
    servers = [application.serve(stoppable_url, events=True, instance_timeout=INSTANCE_TIMEOUT) for _ in range(2)]

    async def stop() -> None:
        await anyio.to_thread.run_sync(stoppable_postgres.stop, "immediate")

    async def start() -> None:
        await anyio.to_thread.run_sync(stoppable_postgres.start)

    await _talk_through_an_outage(application, servers, stop, start)


async def test_streams_go_on_while_the_database_hangs_and_nothing_that_nobody_heard_is_lost(
    application: Application, proxied_url: str, proxy: FaultProxy
) -> None:
    servers: list[ServerProcess] = []

    async def serve() -> None:
        # In a thread: the proxy runs in this event loop.
        def start() -> ServerProcess:
            return application.serve(proxied_url, events=True, instance_timeout=INSTANCE_TIMEOUT)

        servers.append(await anyio.to_thread.run_sync(start))

    async def hang() -> None:
        proxy.hang()

    async def go_on() -> None:
        proxy.resume()

    for _ in range(2):
        await serve()
    await _talk_through_an_outage(application, servers, hang, go_on)


async def test_clients_that_come_back_all_the_time_over_connections_to_the_database_that_break_miss_nothing(
    application: Application, proxied_url: str, proxy: FaultProxy
) -> None:
    dice = random.Random(4)

    def start() -> ServerProcess:
        return application.serve(proxied_url, events=True)

    servers = [await anyio.to_thread.run_sync(start) for _ in range(2)]
    async with sessions(servers[0].mcp_url, 4) as clients:
        calls = [Talking(client, f"call-{n}-{m}", count=COUNT) for n, client in enumerate(clients) for m in range(3)]

        async def listen(call: Talking) -> None:
            application.hold(call.name)
            await call.connect(dice.choice(servers))
            while not call.answered:
                if call.event_ids and dice.random() < 0.5:
                    await call.connect(dice.choice(servers))
                known = len(call.said)
                application.let_say(call.name)
                while len(call.said) == known:
                    await call.take(1)

        async with breaking(proxy, dice, 0.3), anyio.create_task_group() as listeners:
            for call in calls:
                listeners.start_soon(listen, call)

    for call in calls:
        # What is repeated had no id: it was stored, and the word that it was got lost on the way.
        assert call.said == everything(COUNT)
        assert len(set(call.event_ids)) == len(call.event_ids)
        assert application.runs(call.name) == 1
