"""Cases of the suite for mailboxes: cancelled calls, and opening and closing a mailbox."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, places, read_all, run_instances

if TYPE_CHECKING:
    from mcp_session_store.mailbox import Mailbox


class Calls(MailboxSuite):
    """Cancelled calls, and opening and closing a mailbox."""

    async def test_a_post_that_is_cancelled_disturbs_no_other(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        tasks = [
            asyncio.ensure_future(mailbox.post([new_message(number, recipient=2, sender=1)])) for number in range(30)
        ]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        stored = {sequence for _, sequence in places(await read_all(mailbox, 2))}
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                assert number % 3 == 0
            else:
                assert number in stored

    async def test_a_receive_that_is_cancelled_loses_nothing(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in range(10)])
        for _ in range(5):
            task = asyncio.ensure_future(mailbox.receive(2, delivered={}))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
        assert len(await read_all(mailbox, 2)) == 10

    async def test_a_mailbox_may_be_opened_and_closed_more_than_once(self, make_mailbox: MakeMailbox) -> None:
        _, mailbox = make_mailbox()
        await mailbox.open()
        await mailbox.open()
        await mailbox.aclose()
        await mailbox.aclose()
