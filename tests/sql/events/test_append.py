"""Appends of many sessions share their statements, and so their commit."""

from __future__ import annotations

import asyncio

import pytest

from mcp_session_store.sql import SqlEventLog
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import settled, sql_store
from tests.support.plans import given_to_driver

pytestmark = pytest.mark.anyio


async def test_appends_of_many_sessions_take_as_many_statements_as_one(database_url: str) -> None:
    async with sql_store(database_url) as store:
        log = SqlEventLog(store)
        keys = [(await store.create(new_session())).key for _ in range(20)]
        for key in keys:
            await log.append(key, [new_event(0)])
        with given_to_driver(store) as alone:
            await log.append(keys[0], [new_event(1)])
        with given_to_driver(store) as together:
            await asyncio.gather(*(log.append(key, [new_event(2), new_event(3)]) for key in keys))
        assert 1 <= len(alone) <= 3
        assert len(together) == len(alone)
        await settled(store, log)


async def test_only_the_first_event_of_a_log_dates_it(database_url: str) -> None:
    async with sql_store(database_url) as store:
        log = SqlEventLog(store)
        key = (await store.create(new_session())).key
        await log.append(key, [new_event(0)])
        with given_to_driver(store) as given:
            await log.append(key, [new_event(1)])
        # Postgres compares the values before it writes an index; SQLite writes that of each column which is set.
        if store.database.dialect.name == "sqlite":
            assert not [text for text, _ in given if "oldest_at=" in text]
        await settled(store, log)
