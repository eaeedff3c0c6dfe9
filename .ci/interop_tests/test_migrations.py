"""Migrations by way of PgBouncer: every command, several processes at once, on first contact."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from mcp_session_store.errors import SchemaMissing
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from mcp_session_store.testing import new_session
from tests.support.servers import ROOT

pytestmark = pytest.mark.anyio

PROCESSES = 5
"""More than there are server connections."""


async def run(*arguments: str) -> str:
    """Run a command of Python's, which must succeed; return its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MCP_SESSION_STORE_")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_a_database_goes_up_and_down(pgbouncer_url: str) -> None:
    with pytest.raises(SchemaMissing):
        await migrate.check(pgbouncer_url)
    await migrate.upgrade(pgbouncer_url)
    await migrate.check(pgbouncer_url)
    assert await migrate.current(pgbouncer_url) == HEAD
    await migrate.downgrade(pgbouncer_url, revision="base")
    assert await migrate.current(pgbouncer_url) is None
    await migrate.upgrade(pgbouncer_url, schema="sessions")
    await migrate.check(pgbouncer_url, schema="sessions")


async def test_processes_may_upgrade_at_once(pgbouncer_url: str) -> None:
    command = ("mcp_session_store.cli", "upgrade", "--url", pgbouncer_url)
    outputs = await asyncio.gather(*(run(*command) for _ in range(PROCESSES)))
    assert [HEAD in output for output in outputs] == [True] * PROCESSES
    await migrate.check(pgbouncer_url)


async def test_alembic_takes_the_option(pgbouncer_url: str) -> None:
    await run("alembic", "-x", f"url={pgbouncer_url}", "upgrade", "head")
    await migrate.check(pgbouncer_url)


async def test_stores_may_upgrade_at_once_on_first_contact(pgbouncer_url: str) -> None:
    stores = [SqlSessionStore(pgbouncer_url, auto_upgrade=True, timeout=30) for _ in range(PROCESSES)]
    try:
        await asyncio.gather(*(store.create(new_session()) for store in stores))
    finally:
        for store in stores:
            await store.aclose()
