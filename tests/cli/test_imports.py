"""The command line as people start it: in an interpreter that has imported nothing before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from tests.support.commands import CommandFunction


@pytest.mark.parametrize("arguments", ["check", "doctor", "events stats", "sessions stats"])
def test_a_command_imports_all_that_it_needs(command: CommandFunction, sqlite_url: str, arguments: str) -> None:
    asyncio.run(migrate.upgrade(sqlite_url))
    done = command(*arguments.split(), environment={"MCP_SESSION_STORE_URL": sqlite_url}, executed=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
