"""A process is killed, and clients that wait for its calls learn of it at once; nothing else is taken for a death."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.sql.dialects.advisory_locks import LOCK_CLASS
from tests.support.clients import PATIENCE, Talking, until
from tests.support.databases import execute
from tests.support.http import RawClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.deployment import Application
    from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.anyio

FOR_EVER = 3600.0
"""Seconds without a heartbeat after which an instance is dead: no test waits for that."""
NOTICED = 4.0
"""Seconds within which a death is noticed."""


class Waiting:
    """A call that runs in one process, and whose client waits at another."""

    def __init__(self, application: Application, url: str) -> None:
        self._application = application
        self._running, self._other = (
            application.serve(url, events=True, instance_timeout=FOR_EVER, retry_interval=50) for _ in range(2)
        )

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[None]:
        """The call has said one thing, and its client waits for more meanwhile."""
        async with RawClient(self._running.mcp_url) as client:
            await client.handshake()
            self._call = Talking(client, "waiting", count=10)
            self._application.hold("waiting")
            self._application.let_say("waiting")
            await self._call.read(self._running, events=2)
            async with self._call.connected(self._other):
                await self.goes_on()
                yield

    async def goes_on(self) -> None:
        """The call says one more thing, which is what its client gets next."""
        self._application.let_say("waiting")
        await self._call.take(1)
        assert self._call.said == [*range(len(self._call.said))]

    async def is_stopped(self, seconds: float) -> None:
        """The process does nothing for a while."""
        os.kill(self._running.pid, signal.SIGSTOP)
        await anyio.sleep(seconds)
        os.kill(self._running.pid, signal.SIGCONT)

    async def is_killed(self) -> None:
        """The process is killed, and its client gets the error."""
        self._running.kill()
        # By its heartbeats alone it would be missed after an hour.
        await self._call.take()
        assert self._call.said[-1] == "lost"
        assert self._application.runs("waiting") == 1


async def test_a_death_is_noticed_at_once_and_a_stop_is_none_on_sqlite(
    application: Application, sqlite_url: str
) -> None:
    waiting = Waiting(application, sqlite_url)
    async with waiting.begun():
        await waiting.is_stopped(10)
        await waiting.goes_on()
        await waiting.is_killed()


async def test_a_death_is_noticed_at_once_and_nothing_else_is_taken_for_one_on_postgres(
    application: Application, stoppable_postgres: PostgresServer, stoppable_url: str
) -> None:
    database = make_url(stoppable_url).database

    async def holders() -> list[int]:
        rows = await execute(
            stoppable_postgres.url(),
            "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database "
            f"WHERE datname = '{database}' AND locktype = 'advisory' AND classid = {LOCK_CLASS}",
        )
        return [row.pid for row in rows]

    async def both_hold() -> bool:
        return len(await holders()) == 2

    async def cut() -> None:
        for pid in await holders():
            await execute(stoppable_postgres.url(), f"SELECT pg_terminate_backend({pid})")

    waiting = Waiting(application, stoppable_url)
    async with waiting.begun():
        await until(both_hold, "each process holds a lock")
        await waiting.is_stopped(10)
        await waiting.goes_on()

        await cut()
        await anyio.sleep(NOTICED)
        await waiting.goes_on()
        await until(both_hold, "each process holds its lock again")

        # Cut, and unable to connect again: the pool's connection says that nothing is held.
        await execute(stoppable_postgres.url(), f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        await cut()
        await anyio.sleep(NOTICED)
        await waiting.goes_on()
        await execute(stoppable_postgres.url(), f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        await until(both_hold, "each process holds its lock again")

        stoppable_postgres.stop("immediate")
        stoppable_postgres.start()
        await anyio.sleep(NOTICED)
        await waiting.goes_on()
        await until(both_hold, "each process holds its lock again")

        await waiting.is_killed()
        with anyio.fail_after(PATIENCE):
            assert len(await holders()) == 1
