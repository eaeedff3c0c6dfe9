"""Cases of the suite for session stores: cancelled calls, pings, and opening and closing a store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import MakeStore, StoreSuite

if TYPE_CHECKING:
    from mcp_session_store.store import SessionStore


class Calls(StoreSuite):
    """Cancelled calls, pings, and opening and closing a store."""

    async def test_a_call_that_is_cancelled_disturbs_no_other(self, store: SessionStore) -> None:
        sessions = [new_session() for _ in range(30)]
        tasks = [asyncio.ensure_future(store.create(session)) for session in sessions]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [outcome for number, outcome in enumerate(outcomes) if number % 3]
        assert kept == [await store.load(session.key) for number, session in enumerate(sessions) if number % 3]
        assert None not in kept

    async def test_a_store_may_be_opened_and_closed_more_than_once(self, make_store: MakeStore) -> None:
        store = make_store("default")
        await store.open()
        await store.open()
        await store.aclose()
        await store.aclose()

    async def test_a_ping_changes_nothing(self, store: SessionStore) -> None:
        session = new_session()
        created = await store.create(session)
        since = (await store.changes(None)).until
        await asyncio.gather(*(store.ping() for _ in range(20)))
        assert await store.load(session.key) == created
        assert not (await store.changes(since)).changes
