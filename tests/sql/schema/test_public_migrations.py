"""`mcp_session_store.migrations`: what programs migrate with, where an event loop runs and where none does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from anyio.to_thread import run_sync
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store import SchemaError, SqlSessionStore, migrations
from mcp_session_store.sql.schema.version import HEAD
from mcp_session_store.testing import new_session

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine


async def migrated(url_or_engine: str | URL | AsyncEngine) -> None:
    """Migrate an empty database, and look at it before and after."""
    if "sqlite" not in str(getattr(url_or_engine, "url", url_or_engine)):
        # A file that is not there is not looked at.
        assert await migrations.current(url_or_engine) is None
        with pytest.raises(SchemaError, match="mcp-session-store upgrade"):
            await migrations.check(url_or_engine)
    await migrations.upgrade(url_or_engine)
    await migrations.check(url_or_engine)
    assert await migrations.current(url_or_engine) == HEAD


@pytest.mark.anyio
async def test_a_program_with_an_event_loop_migrates_by_url(database_url: str) -> None:
    await migrated(database_url)
    async with SqlSessionStore(database_url) as store:
        assert await store.create(new_session())


@pytest.mark.anyio
async def test_a_program_with_an_event_loop_migrates_by_its_engine_and_goes_on_with_it(database_url: str) -> None:
    engine = create_async_engine(database_url.replace("postgresql://", "postgresql+asyncpg://"))
    try:
        await migrated(engine)
        async with SqlSessionStore(engine) as store:
            assert await store.create(new_session())
    finally:
        await engine.dispose()


def test_a_program_without_an_event_loop_migrates_by_url(database_url: str) -> None:
    asyncio.run(migrated(database_url))
    # Each in a loop of its own, too.
    asyncio.run(migrations.upgrade(database_url))
    asyncio.run(migrations.check(database_url))
    assert asyncio.run(migrations.current(database_url)) == HEAD


def test_a_program_without_an_event_loop_migrates_by_an_engine(database_url: str) -> None:
    async def migrate() -> None:
        engine = create_async_engine(database_url.replace("postgresql://", "postgresql+asyncpg://"))
        try:
            await migrated(engine)
        finally:
            await engine.dispose()

    asyncio.run(migrate())


@pytest.mark.anyio
async def test_code_that_may_not_await_migrates_in_a_thread(database_url: str) -> None:
    await run_sync(lambda: asyncio.run(migrated(database_url)))
    await migrations.check(database_url)
