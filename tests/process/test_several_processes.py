"""Several processes share a database: any of them serves any session."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from tests.support.clients import official_client, pid_of, sessions, until, whoami
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.records import Records
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair(application: Application, store_url: str) -> tuple[ServerProcess, ServerProcess]:
    """Two processes of one application, on one database."""
    return application.serve(store_url), application.serve(store_url)


async def test_one_session_is_used_on_two_processes_in_turn(
    application: Application, pair: tuple[ServerProcess, ServerProcess], records: Records
) -> None:
    first, second = pair
    async with RoundRobinProxy([first.port, second.port]) as proxy, RawClient(proxy.mcp_url) as client:
        opened = await client.initialize()
        assert (await client.notify("notifications/initialized")).status == 202
        told = [await whoami(client) for _ in range(20)]

        assert proxy.served == [first.port, second.port] * 11
        assert client.session_id == opened.session_id
        assert [one["pid"] for one in told] == [first.pid, second.pid] * 10
        # The process that opened it never had to restore it; the other did so once, and tells from whom.
        assert {one["restores"] for one in told[::2]} == {0}
        assert {(one["restores"], pid_of(one["previous_instance"])) for one in told[1::2]} == {(1, first.pid)}
        row = await records.restored(client.session_id)
        assert (row["restores"], pid_of(row["instance_hint"])) == (1, second.pid)
        replayed = application.handshakes(replayed=True)
        assert [(one.pid, one.replayed_in) for one in replayed] == [(second.pid, client.session_id)]
        assert len(application.handshakes(replayed=False)) == 1


async def test_many_sessions_are_used_at_once_on_two_processes(
    application: Application, pair: tuple[ServerProcess, ServerProcess], records: Records
) -> None:
    pids = {server.pid for server in pair}
    async with (
        RoundRobinProxy([server.port for server in pair]) as proxy,
        sessions(proxy.mcp_url, 6) as clients,
        official_client(proxy.mcp_url) as official,
    ):
        seen: dict[str | None, set[int]] = {client.session_id: set() for client in clients}

        async def use(client: RawClient) -> None:
            for _ in range(12):
                seen[client.session_id].add((await whoami(client))["pid"])

        async with anyio.create_task_group() as group:
            for client in clients:
                # Two at a time in each session: the first ones find it resident on neither, or on one only.
                group.start_soon(use, client)
                group.start_soon(use, client)
            for _ in range(12):
                assert (await official.whoami())["client"] == "official"

        assert list(seen.values()) == [pids] * len(clients)
        assert official.statuses.keys() <= {200, 202}
        # However many requests came at once: one restore for each session, where it was not opened.
        replayed = application.handshakes(replayed=True)
        assert len(replayed) == len({one.replayed_in for one in replayed}) == len(clients) + 1
        assert [(await records.restored(session_id))["restores"] for session_id in seen] == [1] * len(clients)


async def test_a_delete_ends_a_session_for_the_processes_where_it_is_not_resident(
    application: Application, pair: tuple[ServerProcess, ServerProcess], records: Records
) -> None:
    first, second = pair
    async with (
        RawClient(first.mcp_url) as client,
        RawClient(second.mcp_url) as elsewhere,
        RawClient(second.mcp_url, session_id="0" * 32) as unknown,
    ):
        await client.handshake()
        elsewhere.session_id = client.session_id
        assert (await elsewhere.delete()).status == 200

        row = await records.row(client.session_id)
        assert row["end_reason"] == "client"
        assert row["ended_at"] is not None
        refused = await elsewhere.call_tool("whoami")
        assert (refused.status, refused.body) == (404, (await unknown.call_tool("whoami")).body)
        assert (await elsewhere.delete()).status == 404
        await anyio.to_thread.run_sync(first.restart)
        assert (await client.call_tool("whoami")).status == 404
        # It was restored for none of this.
        assert application.handshakes(replayed=True) == []


async def test_four_workers_that_start_at_once_serve_all_sessions(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url, workers=4)
    await until(lambda: server.log().count("Application startup complete") == 4, "all workers have started")
    # On SQLite there was no file: they all came to migrate it, and none of them failed at that.
    assert await migrate.current(store_url) == HEAD
    assert "the session store is away" not in server.log()
    workers: set[int] = set()
    async with sessions(server.mcp_url, 12) as clients:

        async def use(client: RawClient) -> None:
            for _ in range(12):
                # Each request comes on a connection of its own, which any worker may accept.
                answer = await client.call_tool("whoami", connection="close")
                assert answer.status == 200, answer
                workers.add(json.loads(answer.text)["pid"])

        async def use_all() -> bool:
            async with anyio.create_task_group() as group:
                for client in clients:
                    group.start_soon(use, client)
            return len(workers) > 1

        # One may be so much faster than the others that it accepts all that comes for a while.
        await until(use_all, "several workers serve the sessions")
        restores = Counter(one.replayed_in for one in application.handshakes(replayed=True))
        rows = [await records.restored(session_id, times) for session_id, times in restores.items()]
    assert workers < set(server.pids())
    replayed = application.handshakes(replayed=True)
    # A worker restores a session once, however many of its requests it gets.
    assert len(replayed) == len({(one.pid, one.replayed_in) for one in replayed})
    assert sum(row["restores"] for row in rows) == len(replayed)
    assert "ERROR" not in server.log()
