"""Cases of the suite for mailboxes: messages of sessions that end."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.records import EndReason
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, peek, run_instances
from mcp_session_store.testing.sessions.suite import SHORT, sweep_sessions

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.store import SessionStore


class SessionEnds(MailboxSuite):
    """Messages of sessions that end."""

    async def _posted(self, mailbox: Mailbox, *keys: UUID) -> None:
        await run_instances(mailbox, 1, 2, 3)
        for number, key in enumerate(keys):
            await mailbox.post([new_message(number, recipient=None, sender=1, key=key)])

    async def _assert_left(self, mailbox: Mailbox, *sequences: int) -> None:
        for number in (2, 3):
            assert await peek(mailbox, number) == [(1, sequence) for sequence in sequences]

    @pytest.mark.parametrize("reason", EndReason)
    async def test_a_session_that_ends_loses_its_messages(
        self, store: SessionStore, mailbox: Mailbox, reason: EndReason
    ) -> None:
        ended, other, without = [await self._opened(store) for _ in range(3)]
        await self._posted(mailbox, ended, other, ended)
        for key in (ended, without):
            assert await store.end(key, reason=reason)
        await self._assert_left(mailbox, 1)

    async def test_an_end_that_ends_nothing_removes_nothing(self, store: SessionStore, mailbox: Mailbox) -> None:
        key = await self._opened(store)
        await self._posted(mailbox, key)
        assert not await store.end(uuid.uuid4(), reason=EndReason.CLIENT)
        await self._assert_left(mailbox, 0)

    async def test_a_session_that_a_sweep_ends_loses_its_messages(self, store: SessionStore, mailbox: Mailbox) -> None:
        expired, live = await self._opened(store), await self._opened(store)
        await self._posted(mailbox, expired, live)
        await self.expire(store, expired)
        store.retention = SHORT
        assert (await sweep_sessions(store)).expired == 1
        await self._assert_left(mailbox, 1)

    async def test_a_session_that_ends_for_the_limit_loses_its_messages(self, make_mailbox: MakeMailbox) -> None:
        store, mailbox = make_mailbox()
        store.retention = RetentionPolicy(per_principal=1)
        first = await self._opened(store)
        await self._posted(mailbox, first)
        await self._opened(store)
        await self._assert_left(mailbox)
