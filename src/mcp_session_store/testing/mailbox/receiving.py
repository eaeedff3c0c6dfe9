"""Cases of the suite for mailboxes: pages, and the removal of what was read."""

from __future__ import annotations

import json

from mcp_session_store.mailbox import MESSAGE_PAGE, Mailbox
from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, peek, places, read_all, run_instances


class Receiving(MailboxSuite):
    """Pages, and the removal of what was read."""

    async def test_nothing_is_read_where_nothing_waits(self, mailbox: Mailbox) -> None:
        for delivered in ({}, {1: 5, 7: 9}):
            page = await mailbox.receive(2, delivered=delivered)
            assert (page.messages, page.more) == ([], False)

    async def test_what_was_delivered_is_removed_and_the_rest_stays(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        for sender in (1, 3):
            await mailbox.post([new_message(number, recipient=2, sender=sender) for number in range(6)])
        page = await mailbox.receive(2, delivered={1: 3})
        expected = [(1, 4), (1, 5), *((3, number) for number in range(6))]
        assert places(page.messages) == expected
        # It is gone, and not only passed over.
        assert await peek(mailbox, 2) == expected
        await mailbox.receive(2, delivered={1: 5, 3: 5})
        assert await peek(mailbox, 2) == []

    async def test_messages_of_known_and_of_unknown_senders_are_read(self, mailbox: Mailbox) -> None:
        senders = [1, 3, 4, 7, 9]
        await run_instances(mailbox, *senders, 5)
        for sender in senders:
            await mailbox.post([new_message(number, recipient=5, sender=sender) for number in range(2)])
        page = await mailbox.receive(5, delivered={3: 0, 7: 1, 8: 5})
        assert sorted(places(page.messages)) == [(1, 0), (1, 1), (3, 1), (4, 0), (4, 1), (9, 0), (9, 1)]

    async def test_what_another_instance_has_read_is_not_removed(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        await mailbox.post([new_message(1, recipient=None, sender=1)])
        await mailbox.receive(2, delivered={1: 1})
        assert await peek(mailbox, 2) == []
        assert await peek(mailbox, 3) == [(1, 1)]

    async def test_pages_are_as_long_as_asked_for(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        for sender in (1, 3):
            await mailbox.post([new_message(number, recipient=2, sender=sender) for number in range(5)])
        page = await mailbox.receive(2, delivered={}, limit=10)
        assert len(page.messages) == 10
        assert not page.more
        page = await mailbox.receive(2, delivered={}, limit=9)
        assert len(page.messages) == 9
        assert page.more
        assert len(await read_all(mailbox, 2, limit=1)) == 10

    async def test_a_page_has_a_bound(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in range(MESSAGE_PAGE + 1)])
        page = await mailbox.receive(2, delivered={})
        assert len(page.messages) <= MESSAGE_PAGE
        assert page.more
        assert len(await read_all(mailbox, 2)) == MESSAGE_PAGE + 1

    async def test_a_page_has_fewer_messages_where_they_are_large(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        sizes = [3 * 1024**2, 10, 3 * 1024**2, 3 * 1024**2, 10, 10]
        bodies = [json.dumps("x" * size) for size in sizes]
        for number, body in enumerate(bodies):
            await mailbox.post([new_message(number, recipient=2, sender=1, body=body)])
        page = await mailbox.receive(2, delivered={})
        assert 1 <= len(page.messages) < 3
        assert page.more
        assert [message.body for message in await read_all(mailbox, 2)] == bodies
