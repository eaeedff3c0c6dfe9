"""Cases of the suite for mailboxes: calls that are repeated after a failure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, peek, places, read_all, run_instances

if TYPE_CHECKING:
    from mcp_session_store.mailbox import Mailbox


class Repetition(MailboxSuite):
    """Calls that are repeated after a failure."""

    async def test_what_is_posted_again_is_stored_once(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        messages = [
            new_message(1, recipient=2, sender=1),
            new_message(2, recipient=None, sender=1),
            new_message(3, recipient=9, sender=1),
        ]
        for _ in range(3):
            assert await mailbox.post(messages) == {9}
        assert await peek(mailbox, 2) == [(1, 1), (1, 2)]
        assert await peek(mailbox, 3) == [(1, 2)]

    async def test_a_part_that_was_posted_before_keeps_its_body(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        first = [new_message(number, recipient=2, sender=1, body=f'"first {number}"') for number in (1, 2)]
        again = [new_message(number, recipient=2, sender=1, body=f'"again {number}"') for number in (1, 2, 3)]
        await mailbox.post(first)
        await mailbox.post(again)
        bodies = [message.body for message in await read_all(mailbox, 2)]
        assert bodies == ['"first 1"', '"first 2"', '"again 3"']

    async def test_what_is_posted_again_after_it_was_read_is_not_read_again(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        messages = [new_message(number, recipient=2, sender=1) for number in range(5)]
        await mailbox.post(messages)
        delivered: dict[int, int] = {}
        assert len(await read_all(mailbox, 2, delivered)) == 5
        assert len(await read_all(mailbox, 2, delivered)) == 0
        await mailbox.post(messages)
        assert await read_all(mailbox, 2, delivered) == []
        await mailbox.post([new_message(5, recipient=2, sender=1)])
        assert places(await read_all(mailbox, 2, delivered)) == [(1, 5)]

    async def test_many_that_are_posted_again_do_not_keep_out_a_new_one(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        messages = [new_message(number, recipient=2, sender=1) for number in range(50)]
        delivered = {1: 49}
        await mailbox.receive(2, delivered=delivered)
        await mailbox.post([*messages, new_message(50, recipient=2, sender=1)])
        assert places(await read_all(mailbox, 2, delivered, limit=10)) == [(1, 50)]

    async def test_a_page_that_was_not_delivered_is_read_again(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        for sender in (1, 3):
            await mailbox.post([new_message(number, recipient=2, sender=sender) for number in range(4)])
        for _ in range(2):
            page = await mailbox.receive(2, delivered={}, limit=3)
            assert places(page.messages) == [(1, 0), (1, 1), (1, 2)]
            assert page.more
        # A part of it may be delivered, and that may be said again.
        for _ in range(2):
            rest = await mailbox.receive(2, delivered={1: 1, 3: 0})
            assert places(rest.messages) == [(1, 2), (1, 3), (3, 1), (3, 2), (3, 3)]
            assert not rest.more

    async def test_a_receive_that_is_repeated_with_less_loses_nothing_that_waits(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in range(4)])
        await mailbox.receive(2, delivered={1: 2})
        assert await peek(mailbox, 2) == [(1, 3)]

    async def test_the_same_is_posted_by_several_tasks_at_once(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        messages = [new_message(number, recipient=2, sender=1) for number in range(20)]
        assert await asyncio.gather(*(mailbox.post(messages) for _ in range(5))) == [set()] * 5
        assert len(await read_all(mailbox, 2)) == 20
