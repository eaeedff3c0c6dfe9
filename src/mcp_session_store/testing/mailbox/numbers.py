"""Cases of the suite for mailboxes: numbers of instances, which are unique."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from mcp_session_store.mailbox import INSTANCE_KEPT, MAX_NUMBER, Mailbox
from mcp_session_store.testing.factories import new_message, new_presence
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, peek, run_instances


class Numbers(MailboxSuite):
    """Numbers of instances, which are unique."""

    @pytest.mark.parametrize("number", [1, MAX_NUMBER, None])
    async def test_an_instance_has_the_number_that_it_drew(self, mailbox: Mailbox, number: int | None) -> None:
        await run_instances(mailbox, number)
        assert [running.number for running in await mailbox.instances()] == [number]

    async def test_any_number_of_instances_may_have_none(self, mailbox: Mailbox) -> None:
        await run_instances(mailbox, None, None, None)
        assert len(await mailbox.instances()) == 3

    @pytest.mark.parametrize("namespace", ["default", "theirs"])
    async def test_a_number_that_another_instance_has_is_refused(
        self, make_mailbox: MakeMailbox, namespace: str
    ) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox(namespace)
        [first] = await run_instances(there, 5)
        second = new_presence(5)
        for _ in range(2):
            assert not await here.beat(second)
        assert (await here.last_beats([second.instance.rpartition(":")[2]])) == {}
        assert [running.instance for running in await there.instances()] == [first]
        assert await here.beat(replace(second, number=6))
        # The first may go on, and its number is free when it has stopped.
        assert await there.beat(new_presence(5, instance=first))
        await there.retire(first)
        assert await here.beat(new_presence(5))

    async def test_an_instance_may_draw_another_number(self, mailbox: Mailbox) -> None:
        [first, second] = await run_instances(mailbox, 1, 2)
        before = {running.instance: running for running in await mailbox.instances()}
        assert not await mailbox.beat(new_presence(2, instance=first, residents=7))
        after = {running.instance: running for running in await mailbox.instances()}
        assert (after[first].number, after[first].residents) == (1, before[first].residents)
        assert await mailbox.beat(new_presence(3, instance=first, residents=7))
        after = {running.instance: running for running in await mailbox.instances()}
        assert (after[first].number, after[first].residents) == (3, 7)
        assert after[first].started_at == before[first].started_at
        assert await mailbox.post([new_message(1, recipient=1, sender=2)]) == {1}
        assert await mailbox.post([new_message(2, recipient=3, sender=2)]) == set()
        assert await mailbox.beat(new_presence(1, instance=second))
        assert await mailbox.beat(new_presence(None, instance=first))
        assert await mailbox.beat(new_presence(3, instance=second))

    async def test_of_instances_that_take_a_number_at_once_one_has_it(self, make_mailbox: MakeMailbox) -> None:
        mailboxes = [make_mailbox()[1] for _ in range(4)]
        new = [new_presence(9) for _ in mailboxes]
        taken = await asyncio.gather(
            *(mailbox.beat(presence) for mailbox, presence in zip(mailboxes, new, strict=True))
        )
        assert sorted(taken) == [False, False, False, True]
        # The same for instances that run already.
        running = await run_instances(mailboxes[0], 11, 12, 13, 14)
        taken = await asyncio.gather(
            *(
                mailbox.beat(new_presence(10, instance=instance))
                for mailbox, instance in zip(mailboxes, running, strict=True)
            )
        )
        assert sorted(taken) == [False, False, False, True]
        numbers = [instance.number for instance in await mailboxes[0].instances()]
        assert sorted(numbers, key=str) == sorted(
            [9, 10, *(number for number, is_taken in zip((11, 12, 13, 14), taken, strict=True) if not is_taken)],
            key=str,
        )

    async def test_what_waited_for_an_instance_is_not_for_another_with_its_number(self, mailbox: Mailbox) -> None:
        _, gone = await run_instances(mailbox, 1, 2)
        await mailbox.post([new_message(1, recipient=2, sender=1)])
        await self.age_instance(mailbox, gone, INSTANCE_KEPT + timedelta(days=1))
        assert (await mailbox.sweep()).instances == 1
        await run_instances(mailbox, 2)
        assert await peek(mailbox, 2) == []
