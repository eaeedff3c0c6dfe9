"""A process that holds the lock of an instance, until it is killed: `python -m tests.support.holding URL INSTANCE`.

It says "holds" when it has stored that. With `child` as third argument it then forks a child that goes on for ever.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from mcp_session_store.sql import SqlEventLog


async def hold(url: str, instance: str) -> None:
    held = asyncio.Event()
    async with SqlEventLog(url) as log:
        listening = asyncio.ensure_future(log.listen(lambda _: None, instance=instance, on_held=held.set))
        await held.wait()
        await log.beat(instance)
        if sys.argv[3:] == ["child"] and os.fork() == 0:
            time.sleep(3600)
        print("holds", flush=True)
        await listening


if __name__ == "__main__":
    asyncio.run(hold(*sys.argv[1:3]))
