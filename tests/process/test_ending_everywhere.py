"""A session that ends anywhere ends everywhere: its other copies stop serving, within the bound that was set."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mcp_session_store import EndReason, SqlSessionStore, StoreUnavailable, session_key
from tests.support.clients import sessions, until, whoami
from tests.support.databases import migrated
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.http import Answer
    from tests.support.records import Records
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

END_WITHIN = 2.0
"""Seconds that the servers are given."""
SLACK = 25.0
"""Seconds that a slow machine may take in addition."""


@pytest.fixture
def pair(application: Application, store_url: str) -> tuple[ServerProcess, ServerProcess]:
    """Two processes on one database."""
    return (
        application.serve(store_url, "stateful", end_within=END_WITHIN),
        application.serve(store_url, "stateful", end_within=END_WITHIN),
    )


# A connection that listens holds the lock of its instance, too, which it takes once it listens.
_LISTENERS = (
    "FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
)


async def _scalar(url: str, query: str) -> int:
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        return int((await connection.execute(sa.text(query))).scalar_one())


async def _both_listen(url: str) -> None:
    """Wait until the two instances wait for hints."""

    async def listen() -> bool:
        return await _scalar(url, f"SELECT count(*) {_LISTENERS}") == 2

    await until(listen, "both instances listen")


async def _refused_within(client: RawClient, bound: float) -> float:
    """Use the session until it is refused, which it must be by the bound; the seconds that it took."""
    began = time.monotonic()
    statuses: list[int] = []

    async def refused() -> bool:
        statuses.append((await client.call_tool("whoami")).status)
        return statuses[-1] == 404

    await until(refused, f"the session is refused; the answers were {statuses}", within=bound)
    assert set(statuses) <= {200, 404}
    return time.monotonic() - began


async def _end_while_stopped(store: SqlSessionStore, client: RawClient, server: ServerProcess) -> None:
    """Stop a process, and end a session before it goes on."""
    assert client.session_id is not None
    for _ in range(10):
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert await store.end(session_key(client.session_id), reason=EndReason.OPERATOR)
            return
        except StoreUnavailable:
            # It was stopped within a transaction, whose locks it keeps.
            os.kill(server.pid, signal.SIGCONT)
            await anyio.sleep(0.1)
    raise AssertionError("the process was within a transaction each time that it was stopped")


@pytest.mark.parametrize("how", ["DELETE", "store"])
async def test_a_session_that_one_instance_ends_is_served_by_no_other(
    application: Application, pair: tuple[ServerProcess, ServerProcess], store_url: str, how: str
) -> None:
    first, second = pair
    async with RawClient(first.mcp_url) as here, RawClient(second.mcp_url) as there:
        await here.handshake()
        there.session_id = here.session_id
        for client in (here, there):
            await whoami(client)

        if how == "DELETE":
            assert (await here.delete()).status == 200
            assert (await here.call_tool("whoami")).status == 404
        else:
            assert here.session_id is not None
            async with SqlSessionStore(store_url) as store:
                assert await store.end(session_key(here.session_id), reason=EndReason.OPERATOR)
            await _refused_within(here, END_WITHIN + SLACK)
        await _refused_within(there, END_WITHIN + SLACK)
        reason = "client" if how == "DELETE" else "operator"
        ends = [f"end: {reason}"] * 2
        await until(
            lambda: [m for m in application.noted(replayed=False) if m.startswith("end")] == ends,
            "the application was told of the end, on both instances",
        )


async def test_open_streams_of_a_session_that_ended_elsewhere_are_closed_and_its_calls_answered_by_an_error(
    application: Application, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    first, second = pair
    application.calls_gate.touch()
    async with RawClient(first.mcp_url) as here, RawClient(second.mcp_url) as there, RawClient(second.mcp_url) as calls:
        await here.handshake()
        there.session_id = calls.session_id = here.session_id
        answers: list[Answer] = []

        async def call() -> None:
            answers.append(await calls.call_tool("wait"))

        async with there.get_stream() as stream, anyio.create_task_group() as group:
            assert stream.status == 200
            group.start_soon(call)
            await until(lambda: "waiting" in application.noted(replayed=False), "the call runs")
            assert (await here.delete()).status == 200
            with anyio.fail_after(END_WITHIN + SLACK):
                with pytest.raises(StopAsyncIteration):
                    await stream.next()
        assert [answer.status for answer in answers] == [200]
        assert answers[0].error["message"] == "Session ended"
        assert (await there.call_tool("whoami")).status == 404


async def test_a_listener_whose_connection_is_killed_loses_no_end(application: Application, postgres_url: str) -> None:
    await migrated(postgres_url)
    first = application.serve(postgres_url, "stateful", end_within=END_WITHIN)
    second = application.serve(postgres_url, "stateful", end_within=END_WITHIN)
    async with sessions(first.mcp_url, 2) as clients:
        for client in clients:
            async with RawClient(second.mcp_url, session_id=client.session_id) as elsewhere:
                await whoami(elsewhere)
                # The second time, those that came back.
                await _both_listen(postgres_url)
                assert await _scalar(postgres_url, f"SELECT count(pg_terminate_backend(pid)) {_LISTENERS}") == 2
                assert (await client.delete()).status == 200
                await _refused_within(elsewhere, END_WITHIN + SLACK)
    await _both_listen(postgres_url)


async def test_a_hint_is_faster_than_the_bound(application: Application, postgres_url: str) -> None:
    await migrated(postgres_url)
    # Polling would take longer than anybody waits: what is seen here is the hint.
    first = application.serve(postgres_url, "stateful", end_within=3600.0)
    second = application.serve(postgres_url, "stateful", end_within=3600.0)
    await _both_listen(postgres_url)
    async with RawClient(first.mcp_url) as here, RawClient(second.mcp_url) as there:
        await here.handshake()
        there.session_id = here.session_id
        await whoami(there)
        assert (await here.delete()).status == 200
        await _refused_within(there, SLACK)


async def test_a_process_that_was_paused_serves_no_session_that_ended_meanwhile(
    application: Application, store_url: str
) -> None:
    server = application.serve(store_url, "stateful", end_within=END_WITHIN)
    async with (
        RawClient(server.mcp_url) as ended,
        RawClient(server.mcp_url) as live,
        SqlSessionStore(store_url) as store,
    ):
        for client in (ended, live):
            await client.handshake()
            await whoami(client)
        statuses: dict[RawClient, int] = {}

        async def call(client: RawClient) -> None:
            statuses[client] = (await client.call_tool("whoami")).status

        try:
            await _end_while_stopped(store, ended, server)
            await anyio.sleep(END_WITHIN + 0.5)
            async with anyio.create_task_group() as group:
                for client in (ended, live):
                    group.start_soon(call, client)
                # The requests are there when the process goes on.
                await anyio.sleep(0.5)
                os.kill(server.pid, signal.SIGCONT)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert (statuses[ended], statuses[live]) == (404, 200)


async def test_an_absolute_lifetime_ends_a_session_that_is_in_use(
    application: Application, store_url: str, records: Records
) -> None:
    servers = [
        application.serve(
            store_url,
            "stateful",
            # The idle time makes the sweep leave it alone for four seconds, not sixty.
            environment={"MCP_SESSION_STORE_ABSOLUTE": "8s", "MCP_SESSION_STORE_IDLE": "16s"},
            clock_ahead=ahead,
            end_within=END_WITHIN,
            sweep_interval=0.2,
        )
        # One of them has a clock that is an hour off, and behaves like the other.
        for ahead in (0.0, 3600.0)
    ]
    async with RawClient(servers[0].mcp_url) as here, RawClient(servers[1].mcp_url) as there:
        began = time.monotonic()
        await here.handshake()
        there.session_id = here.session_id
        for client in (here, there):
            await whoami(client)
        async with there.get_stream() as stream:
            assert stream.status == 200
            await _refused_within(here, 8 + END_WITHIN + SLACK)
            assert time.monotonic() - began > 7
            await _refused_within(there, END_WITHIN + SLACK)
            with anyio.fail_after(SLACK), pytest.raises(StopAsyncIteration):
                await stream.next()

        async def swept() -> bool:
            row = await records.row(here.session_id)
            return bool(row["end_reason"] == "expired")

        await until(swept, "a sweep has ended it in the store")
