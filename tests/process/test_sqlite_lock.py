"""Somebody else keeps the SQLite file locked: a backup, a shell, a process that hangs in a transaction."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import anyio
import pytest
from sqlalchemy.engine import make_url

from tests.support.clients import BOUND, Load, is_refused, opens, sessions, until, whoami
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio


async def test_a_sqlite_file_that_somebody_else_keeps_locked_counts_as_down(
    application: Application, sqlite_url: str
) -> None:
    server = application.serve(sqlite_url, outage_patience=0)
    async with sessions(server.mcp_url, 1) as (evicted,), RawClient(server.mcp_url) as new:
        await anyio.to_thread.run_sync(server.restart)
        async with sessions(server.mcp_url, 2) as resident, Load(resident) as load:
            await load.advance(1)
            file = str(make_url(sqlite_url).database)
            with closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as other:
                other.execute("BEGIN IMMEDIATE")
                with anyio.fail_after(BOUND):
                    async with anyio.create_task_group() as group:
                        group.start_soon(is_refused, new.initialize)
                        # It can be read; where it is now is noted later.
                        group.start_soon(whoami, evicted)
                        group.start_soon(is_refused, evicted.delete)
                        await load.advance(5)
                other.execute("ROLLBACK")

            await until(opens(new), "a handshake succeeds")
            assert (await whoami(evicted))["restores"] == 1
            assert (await evicted.delete()).status == 200
            await load.advance(2)
            assert load.statuses.keys() == {200}
            assert (load.wrong, load.not_handled, load.disconnects) == ([], 0, 0)
