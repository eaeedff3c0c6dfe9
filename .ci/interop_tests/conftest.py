"""Fixtures for databases behind PgBouncer, beside those that all tests share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from interop_tests.pgbouncer import PgBouncer
from mcp_session_store.sql.schema import migrate
from tests.support import servers
from tests.support.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import PostgresServer

pytest_plugins = ["tests.conftest", "tests.process.conftest"]


@pytest.fixture(scope="session")
def _shared_pgbouncer(postgres_server_url: str) -> Iterator[PgBouncer]:
    with PgBouncer(postgres_server_url) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def pgbouncer(_shared_pgbouncer: PgBouncer) -> PgBouncer:
    """A PgBouncer in front of the Postgres server of this test session."""
    # So that its log is shown with this test, too.
    servers.started.append(_shared_pgbouncer)
    return _shared_pgbouncer


@pytest.fixture
def pgbouncer_url(pgbouncer: PgBouncer, postgres_url: str) -> str:
    """The URL, by way of PgBouncer, of an empty database that is this test's own; `postgres_url` goes past it."""
    return pgbouncer.url_of(postgres_url)


@pytest.fixture
async def migrated_url(anyio_backend: str, pgbouncer_url: str) -> str:
    """The same, migrated."""
    await migrate.upgrade(pgbouncer_url)
    return pgbouncer_url


@pytest.fixture(scope="module")
def shared_url(_shared_pgbouncer: PgBouncer, postgres_server_url: str) -> Iterator[str]:
    """The URL, by way of PgBouncer, of a migrated database for all tests of a module."""
    with fresh_database(postgres_server_url) as url:
        pooled = _shared_pgbouncer.url_of(url)
        asyncio.run(migrate.upgrade(pooled))
        yield pooled


@pytest.fixture
def stoppable_pgbouncer(stoppable_postgres: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer that the test may stop and start, in front of a Postgres server that it may, too."""
    with PgBouncer(stoppable_postgres.url()) as pgbouncer:
        yield pgbouncer
