"""The database stops, hangs, or loses connections, while a server runs or before it starts.

Where requests are refused, none waits: how they wait is the subject of `test_outages`.
"""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest
from mcp import Client

from tests.support.clients import BOUND, Load, call_is_refused, is_refused, opens, sessions, until, whoami
from tests.support.faults import FaultProxy, breaking
from tests.support.http import RawClient, assert_not_handled, assert_unavailable, is_not_handled
from tests.support.records import Records

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.postgres import PostgresServer, StopMode

pytestmark = pytest.mark.anyio


async def test_while_postgres_is_down_resident_sessions_are_served_and_all_recovers_when_it_is_back(
    application: Application, stoppable_postgres: PostgresServer, stoppable_url: str
) -> None:
    records = Records(stoppable_url)
    server = application.serve(stoppable_url, outage_patience=0)
    async with (
        sessions(server.mcp_url, 1) as (evicted,),
        RawClient(server.mcp_url) as new,
        RawClient(server.mcp_url) as deleting,
    ):
        await anyio.to_thread.run_sync(server.restart)
        async with sessions(server.mcp_url, 4) as resident, Load(resident) as load:
            deleting.session_id = resident[0].session_id
            modes: list[StopMode] = ["fast", "immediate"]
            for turn, mode in enumerate(modes):
                await load.advance(2)
                await anyio.to_thread.run_sync(stoppable_postgres.stop, mode)

                with anyio.fail_after(BOUND):
                    for _ in range(3):
                        assert_unavailable(await new.initialize())
                        assert_unavailable(await deleting.delete())
                        if turn == 0:
                            assert_not_handled(await evicted.call_tool("whoami"))
                            assert_unavailable(await evicted.notify("notifications/initialized"))
                            assert_unavailable(await evicted.get())
                            assert_unavailable(await evicted.delete())
                # Whatever was refused, the resident sessions go on; that of the refused DELETE too.
                await load.advance(3)

                await anyio.to_thread.run_sync(stoppable_postgres.start)
                await until(opens(new), "a handshake succeeds")
                new.session_id = None
                assert (await whoami(evicted))["restores"] == 1
                await load.advance(2)
            assert load.statuses.keys() == {200}
            assert (load.wrong, load.not_handled, load.disconnects) == ([], 0, 0)
        ids = [client.session_id for client in resident]
        assert [(await records.row(session_id))["ended_at"] for session_id in ids] == [None] * len(ids)
        assert (await deleting.delete()).status == 200
        assert (await deleting.call_tool("whoami")).status == 404
        assert (await records.row(deleting.session_id))["end_reason"] == "client"


async def test_a_server_that_starts_without_its_database_serves_modern_clients_and_recovers(
    application: Application, stoppable_postgres: PostgresServer, stoppable_url: str
) -> None:
    await anyio.to_thread.run_sync(stoppable_postgres.stop)
    server = application.serve(stoppable_url, outage_patience=0)
    async with (
        RawClient(server.mcp_url) as client,
        RawClient(server.mcp_url, session_id="0" * 32) as unknown,
    ):
        with anyio.fail_after(BOUND):
            assert_unavailable(await client.initialize())
            # Nobody can tell now whether there is such a session.
            assert_not_handled(await unknown.call_tool("whoami"))
            assert_unavailable(await unknown.delete())
        # Protocol 2026-07-28 knows no sessions: found out by the client, or known to it.
        for modern in (Client(server.mcp_url), Client(server.mcp_url, mode="2026-07-28")):
            async with modern:
                assert modern.protocol_version == "2026-07-28"
                assert not (await modern.call_tool("whoami", {})).is_error
        assert client.session_id is None

        await anyio.to_thread.run_sync(stoppable_postgres.start)
        await until(opens(client), "a handshake succeeds")
        assert (await whoami(client))["pid"] == server.pid
        assert (await unknown.call_tool("whoami")).status == 404
    assert "the session store is away" in server.log()


async def test_a_database_that_hangs_counts_as_down_and_resident_sessions_do_not_wait_for_it(
    application: Application, proxied_url: str, proxy: FaultProxy
) -> None:
    # In a thread, here as everywhere: the proxy runs in this event loop.
    server = await anyio.to_thread.run_sync(partial(application.serve, proxied_url, outage_patience=0))
    async with sessions(server.mcp_url, 2) as (evicted, deleting), RawClient(server.mcp_url) as new:
        await anyio.to_thread.run_sync(server.restart)
        async with sessions(server.mcp_url, 2) as resident, Load(resident) as load:
            await load.advance(1)
            proxy.hang()

            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as group:
                    group.start_soon(is_refused, new.initialize)
                    group.start_soon(call_is_refused, lambda: evicted.call_tool("whoami"))
                    group.start_soon(is_refused, lambda: evicted.notify("notifications/initialized"))
                    # Whether it takes effect when the network lets it through, nobody knows: it may be repeated.
                    group.start_soon(is_refused, deleting.delete)
                    await load.advance(5)

            proxy.resume()
            await until(opens(new), "a handshake succeeds")
            assert (await whoami(evicted))["restores"] == 1
            assert (await deleting.delete()).status in (200, 404)
            assert (await deleting.call_tool("whoami")).status == 404
            await load.advance(2)
            assert load.statuses.keys() == {200}
            assert (load.wrong, load.not_handled, load.disconnects) == ([], 0, 0)


async def test_a_server_whose_database_hangs_still_stops_and_its_sessions_go_on_in_the_next(
    application: Application, proxied_url: str, proxy: FaultProxy
) -> None:
    server = await anyio.to_thread.run_sync(application.serve, proxied_url)
    async with sessions(server.mcp_url, 2) as clients, RawClient(server.mcp_url) as new:
        async with anyio.create_task_group() as group:

            async def open_in_vain() -> None:
                with suppress(httpx2.TransportError):
                    assert_unavailable(await new.initialize())

            proxy.hang()
            group.start_soon(open_in_vain)
            await until(lambda: len(application.handshakes(replayed=False)) == 3, "a handshake is to be stored")
            # It takes long, and not for ever: `terminate` fails after half a minute.
            assert await anyio.to_thread.run_sync(server.terminate) in (0, -signal.SIGTERM)
        proxy.resume()
        await anyio.to_thread.run_sync(server.start)
        for client in clients:
            assert (await whoami(client))["restores"] == 1


@pytest.mark.timeout(400)
async def test_connections_that_break_at_random_moments_lose_nothing_that_was_acknowledged(
    application: Application, postgres_url: str, proxied_url: str, proxy: FaultProxy
) -> None:
    records = Records(postgres_url)
    dice = random.Random(2)
    kept: list[str | None] = []
    ended: list[str | None] = []
    server = await anyio.to_thread.run_sync(application.serve, proxied_url)

    async def open_sessions() -> None:
        for number in range(12):
            async with RawClient(server.mcp_url) as client:
                await until(opens(client), "a handshake succeeds")
                # It is resident, and waits for no query.
                assert (await client.notify("notifications/initialized")).status == 202
                assert (await whoami(client))["restores"] == 0
                if number % 3:
                    kept.append(client.session_id)
                    continue
                deleted = await client.delete()
                if deleted.status == 200:
                    ended.append(client.session_id)
                else:
                    assert_unavailable(deleted)

    async def settled(client: RawClient, status: int) -> None:
        """Ask until the answer is not "come again", and it must be this one."""

        async def answered() -> bool:
            answer = await client.call_tool("whoami")
            if is_not_handled(answer):
                assert_not_handled(answer)
                return False
            assert answer.status == status, answer
            return True

        async with client:
            await until(answered, "an answer that is not to come again", within=120)

    async with breaking(proxy, dice), anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(open_sessions)
    assert kept
    assert ended
    assert proxy.accepted > 10

    async def all_live_on() -> bool:
        rows = [await records.row(session_id) for session_id in kept]
        return all(row["expires_at"] - row["created_at"] > timedelta(hours=23) for row in rows)

    # Their first activity was reported, however often that failed.
    await until(all_live_on, "all sessions that were used live for as long as the policy says", within=60)

    await anyio.to_thread.run_sync(server.restart)
    async with breaking(proxy, dice), anyio.create_task_group() as group:
        for session_id in kept:
            group.start_soon(settled, RawClient(server.mcp_url, session_id=session_id), 200)
        for session_id in ended:
            group.start_soon(settled, RawClient(server.mcp_url, session_id=session_id), 404)
    for session_id in kept:
        await records.restored(session_id)
