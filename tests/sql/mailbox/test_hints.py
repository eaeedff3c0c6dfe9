"""Hints of new messages: one for each commit and recipient, on a channel that only the recipient listens to."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.sql import SqlMailbox
from mcp_session_store.testing import new_message
from mcp_session_store.testing.mailbox.suite import run_instances
from tests.support.databases import settled, sql_store

if TYPE_CHECKING:
    from typing import Any

pytestmark = pytest.mark.anyio


async def test_each_commit_notifies_each_recipient_once(postgres_url: str) -> None:
    heard: Counter[str] = Counter()
    over = asyncio.Event()

    def note(_connection: Any, _pid: int, channel: str, _payload: str) -> None:
        heard[channel] += 1
        if channel == "over":
            over.set()

    url = make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    channels = [f"mcp_session_mail_{number}" for number in range(1, 6)]
    for channel in ("over", *channels):
        await connection.add_listener(channel, note)
    async with sql_store(postgres_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2, 3)
        batch = [new_message(number, recipient=2 + number % 2, sender=1) for number in range(50)]
        await mailbox.post([*batch, new_message(50, recipient=None, sender=1), new_message(51, recipient=5, sender=1)])
        await mailbox.post([new_message(52, recipient=2, sender=1)])
        # What is stored already is news to none.
        await mailbox.post(batch)
        await connection.execute("NOTIFY over")
        await asyncio.wait_for(over.wait(), 20)
        await settled(store, mailbox)
    await connection.close()
    assert heard == {"over": 1, "mcp_session_mail_2": 2, "mcp_session_mail_3": 1}
