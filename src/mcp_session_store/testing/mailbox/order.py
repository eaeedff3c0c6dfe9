"""Cases of the suite for mailboxes: order of each sender's messages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, places, read_all, run_instances

if TYPE_CHECKING:
    from mcp_session_store.mailbox import Mailbox


class Order(MailboxSuite):
    """Order of each sender's messages."""

    async def test_messages_of_one_sender_are_read_in_their_order(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        for first in range(0, 100, 7):
            await mailbox.post(
                [
                    new_message(10 * sequence, recipient=None if sequence % 3 else 2, sender=1)
                    for sequence in range(first, first + 7)
                ]
            )
        sequences = [message.sequence for message in await read_all(mailbox, 2, limit=9)]
        assert sequences == sorted(sequences)
        assert len(sequences) == 105

    async def test_messages_of_several_senders_are_read_each_in_its_order(self, make_mailbox: MakeMailbox) -> None:
        mailboxes = {number: make_mailbox()[1] for number in range(1, 6)}
        for number, mailbox in mailboxes.items():
            await run_instances(mailbox, number)
        sequences = dict.fromkeys(mailboxes, 0)
        read: dict[int, list[tuple[int, int]]] = {number: [] for number in mailboxes}

        async def send(sender: int) -> None:
            for _ in range(20):
                batch = [new_message(sequences[sender] + offset, recipient=None, sender=sender) for offset in range(3)]
                sequences[sender] += 3
                assert await mailboxes[sender].post(batch) == set()

        async def receive(recipient: int) -> None:
            delivered: dict[int, int] = {}
            while len(read[recipient]) < 60 * 4:
                read[recipient] += places(await read_all(mailboxes[recipient], recipient, delivered, limit=10))
                await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(*map(send, mailboxes), *map(receive, mailboxes)), 120)
        for recipient, messages in read.items():
            for sender in mailboxes.keys() - {recipient}:
                of_sender = [sequence for who, sequence in messages if who == sender]
                assert of_sender == list(range(60)), (recipient, sender)
            assert await read_all(mailboxes[recipient], recipient, dict.fromkeys(mailboxes, 59)) == []
