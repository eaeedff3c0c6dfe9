"""Fixtures for the process tests: the application, served from processes that are killed and started again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from tests.support.databases import migrated
from tests.support.deployment import Application
from tests.support.faults import FaultProxy
from tests.support.records import Records

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.postgres import PostgresServer
    from tests.support.servers import ServeFunction


@pytest.fixture
def application(serve: ServeFunction, tmp_path: Path) -> Iterator[Application]:
    application = Application(serve, tmp_path)
    yield application
    application.check_logs()


@pytest.fixture
async def store_url(database_url: str) -> str:
    """A database that is ready for sessions: Postgres is migrated, a SQLite file is not there yet."""
    if make_url(database_url).get_backend_name() == "postgresql":
        await migrated(database_url)
    return database_url


@pytest.fixture
def records(store_url: str) -> Records:
    """Records of sessions in that database."""
    return Records(store_url)


@pytest.fixture
async def stoppable_url(stoppable_postgres: PostgresServer) -> AsyncIterator[str]:
    """A migrated database on the server that can be stopped."""
    with stoppable_postgres.database() as url:
        await migrated(url)
        yield url


@pytest.fixture
async def proxy(postgres_url: str) -> AsyncIterator[FaultProxy]:
    """A network that fails on command, in front of a migrated database."""
    await migrated(postgres_url)
    url = make_url(postgres_url)
    assert url.host is not None
    assert url.port is not None
    async with FaultProxy(url.host, url.port) as proxy:
        yield proxy


@pytest.fixture
def proxied_url(postgres_url: str, proxy: FaultProxy) -> str:
    """The same database, through it."""
    url = make_url(postgres_url).set(host="127.0.0.1", port=proxy.port)
    return url.render_as_string(hide_password=False)
