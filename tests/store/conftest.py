"""Fixtures for tests that may share a database, because their keys are random."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.sql.schema import migrate
from tests.support.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database, of each kind in turn, for all tests of a module."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('shared') / 'sessions.db'}"
        else:
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres_server_url")))
        asyncio.run(migrate.upgrade(url))
        yield url
