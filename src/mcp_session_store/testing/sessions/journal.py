"""Cases of the suite for session stores: the journal of calls that a restore replays."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from mcp_session_store.errors import JournalFull
from mcp_session_store.records import EndReason, JournalEntry
from mcp_session_store.store import MAX_JOURNAL_ENTRIES, SessionStore
from mcp_session_store.testing.factories import new_session
from mcp_session_store.testing.sessions.suite import MakeStore, StoreSuite, sweep_sessions


class Journal(StoreSuite):
    """The journal of calls that a restore replays."""

    async def test_a_new_session_has_no_journal(self, store: SessionStore) -> None:
        created = await store.create(new_session())
        assert await store.read_journal(created.key) == []
        assert await store.read_journal(uuid.uuid4()) == []

    async def test_the_journal_is_read_in_the_order_in_which_it_was_last_set(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        other = (await store.create(new_session())).key
        writes = [("level", "", "1"), ("subscribe", "a", "2"), ("subscribe", "b", "3"), ("level", "", "4")]
        for revision, (method, subject, params) in enumerate(writes, start=1):
            assert await store.write_journal(key, method=method, subject=subject, params=params) == revision
        await store.write_journal(other, method="level", subject="", params="5")
        journal = await store.read_journal(key)
        assert [entry.revision for entry in journal] == [2, 3, 4]
        assert journal == [
            JournalEntry(method="subscribe", subject="a", params="2"),
            JournalEntry(method="subscribe", subject="b", params="3"),
            JournalEntry(method="level", subject="", params="4"),
        ]
        record = await store.load(key)
        assert record is not None
        assert record.revision == 4

    async def test_an_entry_is_removed_from_the_journal(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        await store.write_journal(key, method="subscribe", subject="a", params="{}")
        await store.write_journal(key, method="subscribe", subject="b", params="{}")
        assert await store.write_journal(key, method="subscribe", subject="a", params=None) == 3
        assert await store.write_journal(key, method="subscribe", subject="never there", params=None) == 4
        assert await store.read_journal(key) == [JournalEntry(method="subscribe", subject="b", params="{}")]

    async def test_journaled_params_come_back_to_the_letter(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key
        params = json.dumps({"uri": "file:///名前 🦀", "x": "\0"}, ensure_ascii=False) + " "
        await store.write_journal(key, method="m", subject="file:///名前 🦀", params=params)
        assert await store.read_journal(key) == [JournalEntry(method="m", subject="file:///名前 🦀", params=params)]

    async def test_a_session_that_is_not_live_has_no_journal(self, store: SessionStore) -> None:
        ended, expired = await store.create(new_session()), await store.create(new_session())
        for key in (ended.key, expired.key):
            await store.write_journal(key, method="m", subject="", params="{}")
        await store.end(ended.key, reason=EndReason.CLIENT)
        await self.expire(store, expired.key)
        for key in (ended.key, expired.key, uuid.uuid4()):
            assert await store.read_journal(key) == []
            assert await store.write_journal(key, method="m", subject="", params="{}") is None

    async def test_a_journal_goes_with_its_session(self, store: SessionStore) -> None:
        session = new_session()
        await store.create(session)
        await store.write_journal(session.key, method="m", subject="", params="{}")
        await store.end(session.key, reason=EndReason.CLIENT)
        await self.age_tombstone(store, session.key)
        assert (await sweep_sessions(store)).purged == 1
        await store.create(session)
        assert await store.read_journal(session.key) == []

    async def test_several_who_write_a_journal_at_once_each_raise_the_revision(self, make_store: MakeStore) -> None:
        stores = [make_store("default") for _ in range(2)]
        key = (await stores[0].create(new_session())).key
        revisions = await asyncio.gather(
            *(
                stores[number % 2].write_journal(key, method="m", subject=str(number % 4), params=str(number))
                for number in range(20)
            )
        )
        assert sorted(revision or 0 for revision in revisions) == list(range(1, 21))
        # The last write for each subject stands, in the order of the writes.
        order = sorted(range(20), key=lambda number: revisions[number] or 0)
        last = {number % 4: number for number in order}
        expected = [str(number) for number in order if last[number % 4] == number]
        assert [entry.params for entry in await stores[0].read_journal(key)] == expected

    async def test_a_full_journal_takes_no_more_and_what_is_there_can_be_changed(self, store: SessionStore) -> None:
        key = (await store.create(new_session())).key

        def write(subject: str, params: str | None = "{}") -> Any:
            return store.write_journal(key, method="m", subject=subject, params=params)

        # In steps, because each call has a time limit and waits for those before it.
        for start in range(0, MAX_JOURNAL_ENTRIES, 100):
            await asyncio.gather(*(write(str(number)) for number in range(start, start + 100)))
        with pytest.raises(JournalFull):
            await write("one more")
        record = await store.load(key)
        assert record is not None
        assert record.revision == MAX_JOURNAL_ENTRIES
        assert await write("7", "[]") == MAX_JOURNAL_ENTRIES + 1
        assert (await store.read_journal(key))[-1] == JournalEntry(method="m", subject="7", params="[]")
        await write("8", None)
        await write("one more")
        assert len(await store.read_journal(key)) == MAX_JOURNAL_ENTRIES
