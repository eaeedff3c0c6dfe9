"""Cases of the suite for mailboxes: posting to one instance, and to all others."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import timedelta

import pytest

from mcp_session_store.mailbox import SILENT_AFTER, Mailbox, MessageKind
from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import (
    MailboxSuite,
    MakeMailbox,
    peek,
    places,
    read_all,
    run_instances,
)


class Posting(MailboxSuite):
    """Posting to one instance, and to all others."""

    @pytest.mark.parametrize("kind", MessageKind)
    async def test_a_message_is_read_as_it_was_posted(self, make_mailbox: MakeMailbox, kind: MessageKind) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        await run_instances(here, 1)
        await run_instances(there, 2)
        new = new_message(2**62, recipient=2, sender=1, kind=kind)
        assert await here.post([new]) == set()
        page = await there.receive(2, delivered={})
        [message] = page.messages
        assert not page.more
        assert (message.sender, message.sequence, message.key) == (1, 2**62, new.key)
        assert message.kind is kind
        assert message.body == new.body
        assert timedelta(0) <= message.age < timedelta(minutes=1)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(json.dumps({"name": "\0"}), id="escaped NUL"),
            pytest.param(json.dumps({"name": "\ud800"}), id="escaped surrogate"),
            pytest.param(json.dumps({"name": "名前 🦀 é"}, ensure_ascii=False), id="not ASCII"),
            pytest.param('{"b": 1,  "a": 2, "a": 3, "n": 1.0e2, "x": [null, "\'\\"$1?:a%s"]}', id="as written"),
            pytest.param(json.dumps({"name": "x" * 4 * 1024**2}), id="4 MiB"),
            pytest.param("", id="nothing"),
        ],
    )
    async def test_bodies_come_back_to_the_letter(self, mailbox: Mailbox, text: str) -> None:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(0, recipient=2, sender=1, body=text)])
        assert [message.body for message in await read_all(mailbox, 2)] == [text]

    async def test_the_age_of_a_message_is_the_time_since_its_post(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(1, recipient=2, sender=1)])
        await asyncio.sleep(0.05)
        await mailbox.post([new_message(2, recipient=2, sender=1)])
        early, late = (await mailbox.receive(2, delivered={})).messages
        assert early.age - late.age > timedelta(milliseconds=20)

    async def test_each_recipient_reads_what_is_for_it(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2, 3)
        recipients = [2, 3, 3, 2, 3]
        assert (
            await mailbox.post(
                [new_message(number, recipient=recipient, sender=1) for number, recipient in enumerate(recipients)]
            )
            == set()
        )
        assert places(await read_all(mailbox, 2)) == [(1, 0), (1, 3)]
        assert places(await read_all(mailbox, 3)) == [(1, 1), (1, 2), (1, 4)]
        assert places(await read_all(mailbox, 1)) == []

    async def test_a_post_without_messages_is_allowed(self, mailbox: Mailbox) -> None:
        assert await mailbox.post([]) == set()

    async def test_a_message_to_a_number_that_no_running_instance_has_is_not_stored(self, mailbox: Mailbox) -> None:
        _, stopped = await run_instances(mailbox, 1, 2)
        await run_instances(mailbox, 3, None)
        await mailbox.retire(stopped)
        numbers = [2, 3, 4, 3]
        messages = [new_message(sequence, recipient=number, sender=1) for sequence, number in enumerate(numbers)]
        assert await mailbox.post(messages) == {2, 4}
        for number, expected in {2: [], 3: [(1, 1), (1, 3)], 4: []}.items():
            assert await peek(mailbox, number) == expected
        # An instance that takes the number later is not the one that they were for.
        await run_instances(mailbox, 2)
        assert await peek(mailbox, 2) == []

    async def test_an_instance_that_is_silent_for_long_is_sent_nothing(self, mailbox: Mailbox) -> None:
        _, silent, quiet = await run_instances(mailbox, 1, 2, 3)
        await self.age_instance(mailbox, silent, SILENT_AFTER + timedelta(seconds=10))
        await self.age_instance(mailbox, quiet, SILENT_AFTER - timedelta(seconds=30))
        messages = [new_message(number, recipient=number, sender=1) for number in (2, 3)]
        assert await mailbox.post([*messages, new_message(9, recipient=None, sender=1)]) == {2}
        assert await peek(mailbox, 2) == []
        assert await peek(mailbox, 3) == [(1, 3), (1, 9)]

    async def test_a_message_to_all_is_read_by_every_other_instance(self, make_mailbox: MakeMailbox) -> None:
        (_, mailbox), (_, there), (_, theirs) = make_mailbox(), make_mailbox(), make_mailbox("theirs")
        await run_instances(mailbox, 1, 2, None)
        await run_instances(there, 3)
        await run_instances(theirs, 4)
        key = uuid.uuid4()
        assert (
            await mailbox.post(
                [
                    new_message(1, recipient=3, sender=1),
                    new_message(2, recipient=None, sender=1, key=key, kind=MessageKind.NOTIFICATION),
                    new_message(3, recipient=2, sender=1),
                ]
            )
            == set()
        )
        assert places(await read_all(mailbox, 2)) == [(1, 2), (1, 3)]
        for_all = (await read_all(there, 3))[1]
        assert (for_all.sequence, for_all.key, for_all.kind) == (2, key, MessageKind.NOTIFICATION)
        for number in (1, 4):
            assert await peek(mailbox, number) == []

    async def test_a_message_to_all_where_there_is_no_other_is_not_stored(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1)
        assert await mailbox.post([new_message(1, recipient=None, sender=1)]) == set()
        assert await peek(mailbox, 1) == []

    async def test_a_message_of_an_instance_to_itself_is_not_stored(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, 1, 2)
        messages = [new_message(number, recipient=number, sender=1) for number in (1, 2)]
        assert await mailbox.post(messages) == set()
        assert await peek(mailbox, 1) == []
        assert await peek(mailbox, 2) == [(1, 2)]
