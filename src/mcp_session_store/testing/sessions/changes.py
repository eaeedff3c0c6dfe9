"""Cases of the suite for session stores: changes that copies of sessions must learn of, and hints of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.records import Change, EndReason
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import SHORT, MakeStore, StoreSuite, ordered, sweep_sessions

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.store import SessionStore


class ChangesAndHints(StoreSuite):
    """Changes that copies of sessions must learn of, and hints of them."""

    async def test_changes_begin_with_the_moment_to_go_on_from(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        await store.end(created.key, reason=EndReason.CLIENT)
        assert (await store.changes(None)).changes == []

    @pytest.mark.parametrize("reason", EndReason)
    async def test_the_end_of_a_session_is_a_change(self, make_store: MakeStore, reason: EndReason) -> None:
        here, there = make_store("default"), make_store("default")
        created = await there.create(new_session())
        since = (await here.changes(None)).until
        await there.end(created.key, reason=reason)
        changes = await here.changes(since)
        assert changes.changes == [Change(key=created.key, revision=0, ended=reason)]
        assert changes.until >= since

    async def test_a_new_revision_is_a_change(self, store: SessionStore) -> None:
        replaced, journaled = await store.create(new_session()), await store.create(new_session())
        since = (await store.changes(None)).until
        await store.replace_initialize(
            replaced.key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
        )
        for _ in range(2):
            await store.write_journal(journaled.key, method="m", subject="", params="{}")
        assert ordered((await store.changes(since)).changes) == ordered(
            [Change(key=replaced.key, revision=1, ended=None), Change(key=journaled.key, revision=2, ended=None)]
        )

    async def test_what_copies_need_not_learn_is_no_change(self, make_store: MakeStore) -> None:
        store = make_store("default")
        since = (await store.changes(None)).until
        used, expired = await store.create(new_session()), await store.create(new_session())
        await store.claim(used.key, instance="instance-b", restores=0)
        await store.touch([Activity(key=used.key, first_age=0.0, last_age=0.0)])
        await self.expire(store, expired.key)
        await store.end(expired.key, reason=EndReason.CLIENT)
        store.retention = SHORT
        assert (await store.changes(since)).changes == []

    async def test_a_session_that_a_sweep_ended_soon_after_its_use_is_a_change(self, make_store: MakeStore) -> None:
        # Another instance may hold it, by a policy with a longer idle time.
        store = make_store("default")
        since = (await store.changes(None)).until
        expired = await store.create(new_session())
        await self.expire(store, expired.key)
        store.retention = SHORT
        assert (await sweep_sessions(store)).expired == 1
        changes = (await store.changes(since)).changes
        assert [(change.key, change.ended) for change in changes] == [(expired.key, EndReason.EXPIRED)]

    async def test_no_change_is_missing_however_often_it_is_asked(self, make_store: MakeStore) -> None:
        here, there = make_store("default"), make_store("default")
        sessions = [await there.create(new_session()) for _ in range(40)]
        seen: set[UUID] = set()
        since = (await here.changes(None)).until

        async def end_all() -> None:
            for session in sessions:
                await there.end(session.key, reason=EndReason.CLIENT)

        ending = asyncio.ensure_future(end_all())
        done = False
        while not done:
            done = ending.done()
            await asyncio.sleep(0)
            changes = await here.changes(since)
            since = changes.until
            seen |= {change.key for change in changes.changes}
        await ending
        assert seen == {session.key for session in sessions}

    async def test_who_waits_for_hints_may_be_cancelled(self, store: SessionStore) -> None:
        hints: list[object] = []
        created = await store.create(new_session())
        for _ in range(3):
            listening = asyncio.ensure_future(store.listen(hints.append))
            await asyncio.sleep(0.01)
            assert not listening.done()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            assert listening.cancelled()
        assert await store.end(created.key, reason=EndReason.CLIENT)
