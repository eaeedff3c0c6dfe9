"""Cases of the suite for mailboxes: separation of the instances of different namespaces."""

from __future__ import annotations

from mcp_session_store.testing.factories import new_message
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, peek, run_instances


class Namespaces(MailboxSuite):
    """Separation of the instances of different namespaces."""

    async def test_the_instances_of_another_namespace_are_not_listed(self, make_mailbox: MakeMailbox) -> None:
        (_, mine), (_, theirs) = make_mailbox("mine"), make_mailbox("theirs")
        assert (mine.namespace, theirs.namespace) == ("mine", "theirs")
        my_ids, their_ids = await run_instances(mine, 1, None), await run_instances(theirs, 2)
        assert {running.instance for running in await mine.instances()} == set(my_ids)
        assert {running.instance for running in await theirs.instances()} == set(their_ids)

    async def test_the_heartbeats_of_another_namespace_are_seen(self, make_mailbox: MakeMailbox) -> None:
        (_, mine), (_, theirs) = make_mailbox("mine"), make_mailbox("theirs")
        [instance] = await run_instances(theirs, 2)
        name = instance.rpartition(":")[2]
        assert (await mine.last_beats([name])).keys() == {name}

    async def test_nothing_is_posted_to_another_namespace(self, make_mailbox: MakeMailbox) -> None:
        (_, mine), (_, theirs) = make_mailbox("mine"), make_mailbox("theirs")
        await run_instances(mine, 1, 2)
        await run_instances(theirs, 3)
        messages = [new_message(number, recipient=number, sender=1) for number in (2, 3)]
        assert await mine.post([*messages, new_message(9, recipient=None, sender=1)]) == {3}
        assert await peek(theirs, 3) == []
        assert await peek(mine, 2) == [(1, 2), (1, 9)]
