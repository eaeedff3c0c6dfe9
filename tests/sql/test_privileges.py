"""A role of Postgres with the privileges that first contact asks for, and no others."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.tables import (
    VERSION_TABLE,
    privileges_for_events,
    privileges_for_mailbox,
    privileges_for_sessions,
)
from mcp_session_store.testing import new_event, new_message, new_session
from mcp_session_store.testing.mailbox.suite import read_all, run_instances
from tests.support.databases import execute, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import sqlalchemy as sa

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def granted(postgres_url: str, *needed: Mapping[sa.Table, str]) -> AsyncIterator[str]:
    """The URL of a migrated database for a role with these privileges."""
    await migrate.upgrade(postgres_url)
    role = f"role_{secrets.token_hex(6)}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    await execute(postgres_url, f"GRANT SELECT ON {VERSION_TABLE} TO {role}")
    for privileges in needed:
        for table, names in privileges.items():
            await execute(postgres_url, f"GRANT {names} ON {table.fullname} TO {role}")
    try:
        yield make_url(postgres_url).set(username=role, password="x").render_as_string(hide_password=False)
    finally:
        await execute(postgres_url, f"DROP OWNED BY {role}")
        await execute(postgres_url, f"DROP ROLE {role}")


async def test_sessions_end_and_are_swept(postgres_url: str) -> None:
    async with granted(postgres_url, privileges_for_sessions()) as url, SqlSessionStore(url) as store:
        key = (await store.create(new_session())).key
        assert await store.end(key, reason=EndReason.CLIENT)
        await store.sweep()
        await settled(store)


async def test_messages_are_posted_read_and_swept(postgres_url: str) -> None:
    needed = privileges_for_mailbox()
    async with granted(postgres_url, needed) as url, SqlMailbox(url) as mailbox:
        [_, instance] = await run_instances(mailbox, 1, 2)
        assert await mailbox.post([new_message(1, recipient=None, sender=1)]) == set()
        assert len(await read_all(mailbox, 2)) == 1
        assert len(await mailbox.instances()) == 2
        await mailbox.sweep()
        await mailbox.retire(instance)
        await settled(mailbox)


async def test_events_are_stored_read_and_swept(postgres_url: str) -> None:
    needed = privileges_for_sessions(), privileges_for_events()
    async with granted(postgres_url, *needed) as url, SqlSessionStore(url) as store, SqlEventLog(store) as log:
        key = (await store.create(new_session())).key
        first = await log.append(key, [new_event(0)])
        assert await log.heads([key]) == {key: first}
        await log.follow([key])
        await log.sweep()
        assert await store.end(key, reason=EndReason.CLIENT)
        await settled(store, log)
