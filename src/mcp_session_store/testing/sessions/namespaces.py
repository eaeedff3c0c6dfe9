"""Cases of the suite for session stores: separation of the sessions of different namespaces."""

from __future__ import annotations

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.errors import SessionConflict
from mcp_session_store.records import EndReason
from mcp_session_store.retention import SweepReport
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import SHORT, MakeStore, StoreSuite, sweep_sessions


class Namespaces(StoreSuite):
    """Separation of the sessions of different namespaces."""

    async def test_a_session_of_another_namespace_does_not_exist(self, make_store: MakeStore) -> None:
        mine, theirs = make_store("mine"), make_store("theirs")
        created = await theirs.create(new_session())
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        assert await mine.load(created.key) is None
        assert await mine.claim(created.key, instance="instance-b", restores=0) is None
        assert (await mine.touch([Activity(key=created.key, first_age=0.0, last_age=0.0)])).not_live == {created.key}
        assert await mine.end(created.key, reason=EndReason.CLIENT) is False
        assert not await mine.replace_initialize(
            created.key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
        )
        assert await mine.write_journal(created.key, method="m", subject="", params="{}") is None
        assert await theirs.load(created.key) == created

    async def test_what_belongs_to_another_namespace_is_not_told_read_or_swept(self, make_store: MakeStore) -> None:
        mine, theirs = make_store("mine"), make_store("theirs")
        ended, expired, journaled = [await theirs.create(new_session()) for _ in range(3)]
        since = (await mine.changes(None)).until
        await theirs.end(ended.key, reason=EndReason.CLIENT)
        await self.age_tombstone(theirs, ended.key)
        await self.expire(theirs, expired.key)
        await theirs.write_journal(journaled.key, method="m", subject="", params="{}")
        mine.retention = SHORT
        assert await sweep_sessions(mine) == SweepReport()
        assert await mine.read_journal(journaled.key) == []
        assert (await mine.changes(since)).changes == []
        theirs.retention = SHORT
        assert await sweep_sessions(theirs) == SweepReport(expired=1, purged=1)

    async def test_a_key_that_another_namespace_has_taken_is_a_conflict(self, make_store: MakeStore) -> None:
        session = new_session()
        created = await make_store("theirs").create(session)
        with pytest.raises(SessionConflict):
            await make_store("mine").create(session)
        assert await make_store("theirs").load(session.key) == created

    async def test_stores_of_one_namespace_see_the_same_sessions(self, make_store: MakeStore) -> None:
        here, there = make_store("default"), make_store("default")
        created = await here.create(new_session())
        assert await there.load(created.key) == created
        await there.end(created.key, reason=EndReason.CLIENT)
        assert await here.load(created.key) is None
