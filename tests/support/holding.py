"""A process that holds the lock of an instance, until it is killed: `python -m tests.support.holding URL INSTANCE`.

It says "holds" when it has stored that. With `child` as third argument it then forks a child that goes on for ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from mcp_session_store.mailbox import Presence
from mcp_session_store.sql import SqlMailbox


async def hold(url: str, instance: str) -> None:
    held = asyncio.Event()
    async with SqlMailbox(url) as mailbox:
        listening = asyncio.ensure_future(mailbox.listen(lambda: None, instance=instance, on_held=held.set))
        await held.wait()
        await mailbox.beat(Presence(instance=instance))
        if sys.argv[3:] == ["child"] and os.fork() == 0:
            time.sleep(3600)
        print("holds", flush=True)
        await listening


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:3]))
