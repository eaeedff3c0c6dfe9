"""The order of messages of several senders."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.sql import SqlMailbox
from mcp_session_store.sql.mailbox.receive import Receive
from mcp_session_store.testing import new_message
from mcp_session_store.testing.mailbox.suite import places, run_instances
from tests.support.databases import settled, sql_store

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

COPY = """
INSERT INTO mcp_session_message (recipient, sender, sequence, key, kind, created_at, bytes, body)
SELECT recipient, ?, sequence, key, kind, created_at, bytes, body FROM mcp_session_message WHERE sender = 7
"""


async def test_a_page_has_no_message_without_those_of_others_that_were_posted_before_it(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_url(sqlite_url).database)
    ranges = Receive.ranges
    posting = False

    def posting_between(receive: Receive) -> Iterator[tuple[int, int, int]]:
        for number, place in enumerate(ranges(receive)):
            if posting and number == 1:
                # The first range, of the senders before 5, has been read.
                with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                    other.execute(COPY, (1,))
                    other.execute(COPY, (9,))
            yield place

    monkeypatch.setattr(Receive, "ranges", posting_between)
    async with sql_store(sqlite_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2, 5, 7, 9)
        await mailbox.post([new_message(1, recipient=2, sender=5)])
        assert places((await mailbox.receive(2, delivered={})).messages) == [(5, 1)]
        await mailbox.receive(2, delivered={5: 1})
        await mailbox.post([new_message(1, recipient=2, sender=7)])
        posting = True
        page = await mailbox.receive(2, delivered={5: 1})
        posting = False
        senders = {message.sender for message in page.messages}
        assert 9 not in senders or 1 in senders
        assert {1, 9} <= {message.sender for message in (await mailbox.receive(2, delivered={5: 1})).messages}
        await settled(store, mailbox)
