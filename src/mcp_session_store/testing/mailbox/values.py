"""Cases of the suite for mailboxes: values that cannot be stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mcp_session_store.errors import InvalidValue
from mcp_session_store.mailbox import MAX_NUMBER
from mcp_session_store.testing.factories import new_message, new_presence
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, peek, read_all, run_instances
from mcp_session_store.testing.refusals import UNSTORABLE_TEXTS, refused

if TYPE_CHECKING:
    from mcp_session_store.mailbox import Mailbox


class Values(MailboxSuite):
    """`InvalidValue`: which calls raise it, and that nothing of them is stored."""

    # JSON escapes both, so that no body that a client sends holds them.
    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_a_body_that_cannot_be_stored_is_refused_with_its_call(self, mailbox: Mailbox, text: str) -> None:
        await run_instances(mailbox, 1, 2)
        bad = new_message(1, recipient=2, sender=1, body=text)
        good = new_message(2, recipient=2, sender=1)
        for messages in ([bad, good], [good, bad], [bad]):
            await refused(mailbox.post(messages))
        await refused(mailbox.post([new_message(1, recipient=None, sender=1, body=text)]))
        assert await peek(mailbox, 2) == []
        assert await mailbox.post([good]) == set()
        assert await peek(mailbox, 2) == [(1, 2)]

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_calls_beside_one_that_cannot_be_stored_are_stored(
        self, make_mailbox: MakeMailbox, text: str
    ) -> None:
        _, mailbox = make_mailbox()
        await run_instances(mailbox, 1, 2)
        calls = [[new_message(number, recipient=2, sender=1)] for number in range(10)]
        calls[3] = [new_message(3, recipient=2, sender=1, body=text)]
        outcomes = await asyncio.gather(*map(mailbox.post, calls), return_exceptions=True)
        assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, InvalidValue)] == [3]
        assert [message.sequence for message in await read_all(mailbox, 2)] == [0, 1, 2, 4, 5, 6, 7, 8, 9]

    @pytest.mark.parametrize(
        "changes",
        [
            {"sequence": 2**63},
            {"sequence": -1},
            {"recipient": -1},
            {"recipient": MAX_NUMBER + 1},
            {"sender": 0},
            {"sender": 2**70},
        ],
        ids=str,
    )
    async def test_a_number_of_a_message_that_is_out_of_its_bounds_is_refused(
        self, mailbox: Mailbox, changes: dict[str, int]
    ) -> None:
        await run_instances(mailbox, 1, 2)
        fields = {"sequence": 1, "recipient": 2, "sender": 1} | changes
        with pytest.raises(InvalidValue):
            await mailbox.post([new_message(2, recipient=2, sender=1), new_message(**fields)])
        assert await peek(mailbox, 2) == []

    @pytest.mark.parametrize("number", [0, -1, MAX_NUMBER + 1])
    async def test_a_number_of_an_instance_that_is_out_of_its_bounds_is_refused(
        self, mailbox: Mailbox, number: int
    ) -> None:
        with pytest.raises(InvalidValue):
            await mailbox.beat(new_presence(number))
        assert await mailbox.instances() == []

    @pytest.mark.parametrize("text", UNSTORABLE_TEXTS)
    async def test_a_presence_with_a_text_that_cannot_be_stored_is_refused(self, mailbox: Mailbox, text: str) -> None:
        [instance] = await run_instances(mailbox, 1)
        name = instance.rpartition(":")[2]
        for bad in (text, f"{text}:1:{name}", f"host:1:{text}"):
            await refused(mailbox.beat(new_presence(2, instance=bad)))
            await refused(mailbox.retire(bad))
            await refused(mailbox.listen(lambda: None, instance=bad))
        for field in ("server", "version"):
            await refused(mailbox.beat(new_presence(2, **{field: text})))
        await refused(mailbox.last_beats([name, text]))
        assert (await mailbox.last_beats([name])).keys() == {name}
        assert [running.instance for running in await mailbox.instances()] == [instance]
