"""Every statement on the messages of streams finds those of its sessions by their key, however many there are."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlMailbox
from mcp_session_store.sql.schema.tables import messages_table, stream_messages_table
from mcp_session_store.stream_mail import MARK_LIFETIME, Withdrawal
from mcp_session_store.testing import new_session
from mcp_session_store.testing.factories import new_stream_message
from mcp_session_store.testing.mailbox.suite import run_instances
from mcp_session_store.testing.sessions.streams import claim_stream
from tests.support.databases import engine_of, sql_store
from tests.support.plans import plan_of, statements_of

if TYPE_CHECKING:
    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio

SESSIONS = 2_000
MESSAGES = 10
"""Of each of them, one of which is a mark of what was given."""
TABLE = "mcp_session_stream_message"


async def fill(store: SqlSessionStore, *, created_at: datetime) -> None:
    rows: list[dict[str, Any]] = [
        {
            "key": key,
            "sender": 3,
            "sequence": number,
            "kind": "stream_notification",
            "bytes": 2,
            "created_at": created_at,
            "taken_by": None if number else 2,
            "body": "{}" if number else None,
        }
        for key in (uuid.uuid4() for _ in range(SESSIONS))
        for number in range(MESSAGES)
    ]
    async with engine_of(store).connect() as connection:
        await connection.exec_driver_sql("BEGIN")
        await connection.execute(sa.insert(stream_messages_table()), rows)
        await connection.exec_driver_sql("COMMIT")
        await connection.exec_driver_sql("ANALYZE")


async def use_one(store: SqlSessionStore) -> None:
    """All that is done with the stream of one session."""
    async with SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        key = (await store.create(new_session())).key
        await claim_stream(store, key, 2)
        messages = [new_stream_message(number, key=key, sender=1) for number in range(4)]
        for _ in range(2):
            await mailbox.say(messages)
        assert len((await mailbox.take(key, 2, given={})).messages) == 4
        assert len((await mailbox.take(key, 2, given={1: 1})).messages) == 2
        assert await mailbox.withdraw(key, 1, 1) is Withdrawal.GIVEN
        await mailbox.release(key, 2, given={1: 2})
        assert await mailbox.withdraw(key, 1, 3) is Withdrawal.WITHDRAWN
        await mailbox.take(key, 2, given={1: 2}, without_others=True)
        await store.end(key, reason=EndReason.CLIENT)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
async def test_what_is_done_with_one_stream_takes_the_primary_key(database_url: str, known: bool) -> None:
    async with sql_store(database_url) as store:
        if known:
            await fill(store, created_at=datetime.now(UTC))
        seen = {text: given for text, given in (await statements_of(store, use_one)).items() if TABLE in text}
        assert len(seen) > 9
        for statement, parameters in seen.items():
            plan = await plan_of(store, statement, parameters)
            shown = f"{statement}\n\n{plan}"
            assert f"Seq Scan on {TABLE}" not in plan, shown
            assert not re.search(rf"SCAN {TABLE}\b", plan), shown
            # By the session's key, or the place of a row that was found by it.
            for condition in re.findall(rf"(?<=Index Cond: )\(.*|SEARCH {TABLE}.*", plan):
                assert re.search(r"\bkey = |\bkey=\?|\browid=\?", condition), shown
            assert "INSERT" in statement or re.search(rf"{TABLE}_pkey|sqlite_autoindex_{TABLE}_1", plan), shown


async def sweep(store: SqlSessionStore) -> None:
    async with SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        assert (await mailbox.sweep(limit=20)).more


async def test_a_sweep_of_streams_passes_the_table_once_for_each_kind(database_url: str) -> None:
    # It has no index on its times, which each message would have to pay for: it is nearly empty as a rule.
    async with sql_store(database_url) as store:
        await fill(store, created_at=datetime.now(UTC) - 2 * MARK_LIFETIME)
        async with engine_of(store).connect() as connection:
            await connection.execute(
                sa.insert(messages_table()),
                [
                    {
                        "recipient": 9,
                        "sender": 1,
                        "sequence": number,
                        "key": uuid.uuid4(),
                        "kind": "answer",
                        "bytes": 2,
                        "created_at": datetime.now(UTC) - timedelta(days=1),
                        "body": "{}",
                    }
                    for number in range(50)
                ],
            )
        seen = await statements_of(store, sweep)
        swept = [text for text in seen if TABLE in text]
        assert len(swept) == 3  # the look, and what removes each kind
        for statement in swept:
            plan = await plan_of(store, statement, seen[statement])
            shown = f"{statement}\n\n{plan}"
            plans = 2 if "postgresql" in database_url else 1
            kinds = len(re.findall(r"body IS (?:NOT )?NULL", statement))
            assert len(re.findall(rf"(?:Seq Scan on|SCAN) {TABLE}\b", plan)) == plans * kinds, shown
            assert "Nested Loop" not in plan, shown
