"""Processes and the schema of their database: who migrates what, and who refuses to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from tests.support.clients import whoami
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application

pytestmark = pytest.mark.anyio


async def test_a_server_on_an_unmigrated_postgres_does_not_start_and_its_log_names_the_command(
    application: Application, postgres_url: str
) -> None:
    with pytest.raises(AssertionError, match=r"mcp-session-store upgrade --url \S*postgresql://") as failure:
        application.serve(postgres_url)
    url = make_url(postgres_url)
    assert "Application startup failed" in str(failure.value)
    assert str(url.database) in str(failure.value)
    assert str(url.password) not in str(failure.value)
    assert await migrate.current(postgres_url) is None


async def test_a_server_with_auto_upgrade_migrates_postgres_when_it_starts(
    application: Application, postgres_url: str
) -> None:
    server = application.serve(postgres_url, auto_upgrade=True)
    assert await migrate.current(postgres_url) == HEAD
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        assert (await whoami(client))["pid"] == server.pid
