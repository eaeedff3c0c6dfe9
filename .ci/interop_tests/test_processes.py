"""Server processes that share a database by way of PgBouncer."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import sessions, until, whoami
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.deployment import Application
    from tests.support.http import Stream

pytestmark = pytest.mark.anyio

CLIENTS = 12


async def test_sessions_are_used_on_two_processes_by_turns_and_after_a_restart(
    application: Application, migrated_url: str
) -> None:
    servers = [application.serve(migrated_url) for _ in range(2)]
    async with RoundRobinProxy([server.port for server in servers]) as proxy, sessions(proxy.mcp_url, CLIENTS) as users:
        ids = [user.session_id for user in users]
        seen: dict[str | None, set[int]] = {session_id: set() for session_id in ids}

        async def use(user: RawClient) -> None:
            for _ in range(12):
                seen[user.session_id].add((await whoami(user))["pid"])

        async def use_all() -> set[int]:
            async with anyio.create_task_group() as group:
                for user in users:
                    # Two at a time in each session: the first ones find it resident on one process only.
                    group.start_soon(use, user)
                    group.start_soon(use, user)
            return {server.pid for server in servers}

        first = await use_all()
        assert list(seen.values()) == [first] * CLIENTS
        for server in servers:
            server.restart()
        second = await use_all()
        assert list(seen.values()) == [first | second] * CLIENTS
        assert [user.session_id for user in users] == ids
    # Each session was opened once, and restored once in each process that did not open it.
    assert len(application.handshakes(replayed=False)) == CLIENTS
    assert len(application.handshakes(replayed=True)) == 3 * CLIENTS


async def test_a_session_that_one_process_ends_is_served_by_no_other(
    application: Application, migrated_url: str
) -> None:
    # No notification arrives through PgBouncer: all changes come by polling.
    end_within, slack = 2.0, 25.0
    first, second = [application.serve(migrated_url, "stateful", end_within=end_within) for _ in range(2)]
    async with (
        sessions(first.mcp_url, 5) as users,
        RawClient(second.mcp_url) as elsewhere,
        elsewhere_stream(second.mcp_url, users[0]) as stream,
    ):
        for user in users:
            elsewhere.session_id = user.session_id
            await whoami(elsewhere)
        for user in users:
            assert (await user.delete()).status == 200
        for user in users:
            elsewhere.session_id = user.session_id

            async def refused() -> bool:
                return (await elsewhere.call_tool("whoami")).status == 404

            await until(refused, "the other process refuses it, too", within=end_within + slack)
        with anyio.fail_after(slack), pytest.raises(StopAsyncIteration):
            await stream.next()
    assert "failed" not in second.log()


@asynccontextmanager
async def elsewhere_stream(url: str, user: RawClient) -> AsyncIterator[Stream]:
    """The stream of a user's session, at another process."""
    async with RawClient(url, session_id=user.session_id) as client, client.get_stream() as stream:
        assert stream.status == 200
        yield stream
