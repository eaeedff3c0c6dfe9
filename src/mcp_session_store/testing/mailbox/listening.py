"""Cases of the suite for mailboxes: hints of new messages."""

from __future__ import annotations

import asyncio
import contextlib

from mcp_session_store.testing.factories import new_message, new_presence
from mcp_session_store.testing.mailbox.suite import MailboxSuite, MakeMailbox, read_all, run_instances


class Listening(MailboxSuite):
    """Hints of new messages, which may be late, duplicated or lost."""

    async def test_an_instance_that_listens_may_be_cancelled(self, make_mailbox: MakeMailbox) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        await run_instances(here, 1)
        [instance] = await run_instances(there, 2)
        for number in (2, None, 2):
            listening = asyncio.ensure_future(there.listen(lambda: None, instance=instance, number=number))
            await asyncio.sleep(0.01)
            assert not listening.done()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            assert listening.cancelled()

    async def test_a_mailbox_that_hears_gives_a_hint(self, make_mailbox: MakeMailbox) -> None:
        (_, here), (_, there) = make_mailbox(), make_mailbox()
        await run_instances(here, 1)
        presence, hinted = new_presence(2), asyncio.Event()
        assert await there.beat(presence)
        listening = asyncio.ensure_future(there.listen(hinted.set, instance=presence.instance, number=2))
        for _ in range(100):
            await asyncio.sleep(0.02)
            if there.hears:
                break
        if there.hears:
            # What was posted before it listened it must look for once.
            await read_all(there, 2)
            await asyncio.sleep(0.05)
            hinted.clear()
            await here.post([new_message(1, recipient=2, sender=1)])
            await asyncio.wait_for(hinted.wait(), 30)
            assert len(await read_all(there, 2)) == 1
        assert not listening.done()
        listening.cancel()
        await asyncio.wait({listening})
