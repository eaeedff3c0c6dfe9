"""Cases of the suite for mailboxes: sweeps of silent instances, and of messages that will not be read."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

from mcp_session_store.mailbox import INSTANCE_KEPT, MESSAGE_LIFETIME, MESSAGES_KEPT, MailboxSweepReport, MessageKind
from mcp_session_store.testing.factories import new_message, new_presence
from mcp_session_store.testing.mailbox.suite import (
    MailboxSuite,
    MakeMailbox,
    peek,
    run_instances,
    sweep_messages,
)

if TYPE_CHECKING:
    from mcp_session_store.mailbox import Mailbox

SECOND = timedelta(seconds=1)


class Sweeping(MailboxSuite):
    """Sweeps of silent instances, and of messages that will not be read."""

    async def test_a_sweep_leaves_what_may_be_read(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        assert await mailbox.sweep() == MailboxSweepReport()
        await mailbox.post([new_message(1, recipient=2, sender=1)])
        assert await mailbox.sweep() == MailboxSweepReport()
        assert await peek(mailbox, 2) == [(1, 1)]

    async def test_a_sweep_removes_what_a_running_instance_has_not_read(self, mailbox: Mailbox) -> None:
        _, reader = await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(number, recipient=2, sender=1) for number in (1, 2)])
        await self.age_messages(mailbox, MESSAGE_LIFETIME + 5 * SECOND)
        await mailbox.post([new_message(3, recipient=2, sender=1)])
        assert await mailbox.beat(new_presence(2, instance=reader))
        assert await sweep_messages(mailbox) == MailboxSweepReport(unread={MessageKind.ANSWER: 2})
        assert await peek(mailbox, 2) == [(1, 3)]

    async def test_a_sweep_leaves_what_an_instance_without_heartbeats_could_not_read(self, mailbox: Mailbox) -> None:
        _, reader = await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(1, recipient=2, sender=1)])
        # Its last heartbeat came soon after the message, which was long ago.
        await self.age_messages(mailbox, timedelta(minutes=4))
        await self.age_instance(mailbox, reader, timedelta(minutes=4) - MESSAGE_LIFETIME / 2)
        assert await sweep_messages(mailbox) == MailboxSweepReport()
        assert await peek(mailbox, 2) == [(1, 1)]
        # It comes back, reads, and sends the next.
        await mailbox.receive(2, delivered={1: 1})
        assert await mailbox.beat(new_presence(2, instance=reader))
        assert await sweep_messages(mailbox) == MailboxSweepReport()

    async def test_what_waits_for_an_instance_goes_with_it(self, mailbox: Mailbox) -> None:
        _, stopped, other = await run_instances(mailbox, 1, 2, 3)
        await mailbox.post([new_message(1, recipient=None, sender=1)])
        for _ in range(2):
            await mailbox.retire(stopped)
        assert await peek(mailbox, 2) == []
        assert await peek(mailbox, 3) == [(1, 1)]
        assert await mailbox.beat(new_presence(4, instance=other))
        assert await sweep_messages(mailbox) == MailboxSweepReport(gone={MessageKind.ANSWER: 1})
        assert await peek(mailbox, 3) == []

    async def test_a_sweep_removes_what_waits_for_an_instance_that_is_silent_for_an_hour(
        self, mailbox: Mailbox
    ) -> None:
        _, dead, silent = await run_instances(mailbox, 1, 2, 3)
        await mailbox.post([new_message(1, recipient=None, sender=1, kind=MessageKind.CANCELLED)])
        await mailbox.post([new_message(2, recipient=2, sender=1)])
        await self.age_instance(mailbox, dead, MESSAGES_KEPT + timedelta(minutes=5))
        await self.age_instance(mailbox, silent, MESSAGES_KEPT - timedelta(minutes=5))
        removed = {MessageKind.ANSWER.value: 1, MessageKind.CANCELLED.value: 1}
        assert await sweep_messages(mailbox) == MailboxSweepReport(gone=removed)
        assert await peek(mailbox, 3) == [(1, 1)]
        # It may come back all the same.
        assert await mailbox.beat(new_presence(2, instance=dead))
        await mailbox.post([new_message(3, recipient=2, sender=1)])
        assert await sweep_messages(mailbox) == MailboxSweepReport()
        assert await peek(mailbox, 2) == [(1, 3)]

    async def test_a_sweep_removes_instances_that_are_silent_for_a_day(self, mailbox: Mailbox) -> None:
        _, dead, silent = await run_instances(mailbox, 1, 2, 3)
        await mailbox.post([new_message(1, recipient=None, sender=1)])
        await self.age_instance(mailbox, dead, INSTANCE_KEPT + timedelta(hours=1))
        await self.age_instance(mailbox, silent, INSTANCE_KEPT - timedelta(hours=1))
        report = await sweep_messages(mailbox)
        assert (report.instances, report.unread) == (1, {})
        assert [running.number for running in await mailbox.instances()] == [1, 3]
        assert await peek(mailbox, 2) == []

    async def test_a_sweep_goes_on_step_by_step(self, mailbox: Mailbox) -> None:
        _, stopped, reader = await run_instances(mailbox, 1, 2, 3)
        await mailbox.post([new_message(number, recipient=None, sender=1) for number in range(10)])
        await self.age_messages(mailbox, MESSAGE_LIFETIME + 5 * SECOND)
        await mailbox.post([new_message(10, recipient=3, sender=1)])
        for instance, number in ((reader, 3), (stopped, 9)):
            assert await mailbox.beat(new_presence(number, instance=instance))
        report = await mailbox.sweep(limit=4)
        assert report.more
        assert report.gone.get(MessageKind.ANSWER, 0) + report.unread.get(MessageKind.ANSWER, 0) <= 8
        rest = await sweep_messages(mailbox, limit=4)
        removed = Counter(report.gone) + Counter(rest.gone), Counter(report.unread) + Counter(rest.unread)
        assert removed == ({MessageKind.ANSWER: 10}, {MessageKind.ANSWER: 10})
        assert await peek(mailbox, 3) == [(1, 10)]

    async def test_several_that_sweep_at_once_remove_each_message_once(self, make_mailbox: MakeMailbox) -> None:
        mailboxes = [make_mailbox()[1] for _ in range(3)]
        _, reader = await run_instances(mailboxes[0], 1, 2)
        await mailboxes[0].post([new_message(number, recipient=2, sender=1) for number in range(60)])
        await self.age_messages(mailboxes[0], MESSAGE_LIFETIME + 5 * SECOND)
        assert await mailboxes[0].beat(new_presence(2, instance=reader))
        removed = 0
        for _ in range(200):
            reports = await asyncio.gather(*(mailbox.sweep(limit=7) for mailbox in mailboxes))
            removed += sum(sum(report.unread.values()) for report in reports)
            if not any(report.unread or report.more for report in reports):
                break
        assert removed == 60
