"""The database is away for some seconds, as in a failover: for clients that is latency."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest
from sqlalchemy.engine import make_url

from tests.support.clients import official_client, sessions, until, whoami
from tests.support.http import RawClient, assert_not_handled, assert_unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from tests.support.deployment import Application
    from tests.support.faults import FaultProxy
    from tests.support.http import Answer
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

PATIENCE = 14.0
"""Seconds that requests wait."""
SHORT = 6.0
"""Seconds of an outage that no client notices: longer than the store tries a call, and so much shorter than requests
wait that a busy machine may be slow."""


@asynccontextmanager
async def postgres_away(proxy: FaultProxy) -> AsyncIterator[None]:
    """Postgres refuses connections, and has cut all that there were."""
    proxy.refuse()
    proxy.kill_connections()
    yield
    await proxy.accept()


@asynccontextmanager
async def sqlite_away(url: str) -> AsyncIterator[None]:
    """The file is locked by another program: nothing can be written."""
    with closing(
        sqlite3.connect(str(make_url(url).database), isolation_level=None, timeout=30, check_same_thread=False)
    ) as other:
        await anyio.to_thread.run_sync(other.execute, "BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


class Calls:
    """Calls that are under way during an outage, and their answers."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.failures: list[object] = []

    async def call(self, client: RawClient) -> None:
        self.answers.append(await client.call_tool("whoami"))

    async def open(self, client: RawClient) -> None:
        self.answers.append(await client.initialize())

    async def get(self, client: RawClient) -> None:
        async with client.get_stream() as stream:
            if stream.status != 200:
                self.failures.append(stream.status)

    async def official(self, url: str) -> None:
        async with official_client(url) as client:
            if (await client.whoami())["restores"]:
                self.failures.append("a new session was restored")


async def go_on(client: RawClient, done: anyio.Event, answers: list[Answer]) -> None:
    """Call now and then."""
    while not done.is_set():
        answers.append(await client.call_tool("whoami"))
        await anyio.sleep(0.3)


async def check_outages(
    server: ServerProcess,
    away: Callable[[], AbstractAsyncContextManager[None]],
    *,
    all_wait: bool,
    connections: Callable[[], int],
) -> None:
    """Have two outages, one of which is longer than patience, and check what clients see of them.

    Args:
        server: The server.
        away: Takes the database away meanwhile.
        all_wait: Whether all requests need the database in an outage; where it can be read, some do not.
        connections: Returns the number of connections to the database.
    """
    async with sessions(server.mcp_url, 20) as clients:
        await anyio.to_thread.run_sync(server.restart)
        resident, first, second = clients[:6], clients[6:14], clients[14:]
        for client in resident:
            await whoami(client)
        process = psutil.Process(server.pid)
        done = anyio.Event()
        of_residents: list[Answer] = []
        async with (
            RawClient(server.mcp_url) as new,
            RawClient(server.mcp_url) as refused,
            anyio.create_task_group() as group,
        ):
            for client in resident:
                group.start_soon(go_on, client, done, of_residents)
            await until(lambda: len(of_residents) > 6, "resident sessions are served")

            calls = Calls()
            async with anyio.create_task_group() as requests, away():
                before = len(of_residents)
                for client in first:
                    # Several of one session.
                    requests.start_soon(calls.call, client)
                    requests.start_soon(calls.call, client)
                requests.start_soon(calls.open, new)
                requests.start_soon(calls.get, first[0])
                requests.start_soon(calls.official, server.mcp_url)
                await anyio.sleep(SHORT)
                if all_wait:
                    assert calls.answers == []
                assert len(of_residents) - before > 20
            assert [answer for answer in calls.answers if "result" not in answer.messages[-1]] == []
            assert {answer.status for answer in calls.answers} == {200}
            assert calls.failures == []
            assert len(calls.answers) == 17
            for client in [*first, new]:
                # One restore for all of them, and none for a new session.
                assert (await whoami(client))["restores"] == (client is not new)

            calls, opening = Calls(), Calls()
            async with away(), anyio.create_task_group() as requests:
                for client in second:
                    requests.start_soon(calls.call, client)
                requests.start_soon(opening.open, refused)
            failed = [answer for answer in calls.answers if "error" in answer.messages[-1]]
            for answer in failed:
                assert_not_handled(answer)
            assert len(failed) == len(second) or not all_wait
            assert_unavailable(opening.answers[0])

            # Each goes on in its session.
            for client in second:
                await until(partial(_answers, client), "a session goes on after the outage")
                assert (await whoami(client))["restores"] == 1
            done.set()
        assert {answer.status for answer in of_residents} == {200}
        assert [answer for answer in of_residents if "result" not in answer.messages[-1]] == []
        await until(lambda: connections() <= 8, "no connection is left behind")
        assert process.num_threads() < 20


async def _answers(client: RawClient) -> bool:
    return "result" in (await client.call_tool("whoami")).messages[-1]


async def test_an_outage_of_postgres_is_latency(application: Application, proxied_url: str, proxy: FaultProxy) -> None:
    server = await anyio.to_thread.run_sync(partial(application.serve, proxied_url, outage_patience=PATIENCE))
    await check_outages(server, lambda: postgres_away(proxy), all_wait=True, connections=lambda: proxy.connections)


async def test_a_locked_sqlite_file_is_latency(application: Application, sqlite_url: str) -> None:
    server = application.serve(sqlite_url, outage_patience=PATIENCE)
    await check_outages(server, lambda: sqlite_away(sqlite_url), all_wait=False, connections=lambda: 0)
