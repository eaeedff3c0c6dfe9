"""Rows that are removed and that another transaction keeps: no statement of a mailbox passes them again."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store.sql import SqlMailbox
from mcp_session_store.testing import new_message
from mcp_session_store.testing.mailbox.suite import run_instances
from tests.support.databases import engine_of, execute, settled, sql_store
from tests.support.plans import given_to_driver, plan_of

pytestmark = pytest.mark.anyio

DEAD = 4000


def pages_read(plan: str) -> int:
    """Return the most pages that a step of a statement read, by its plan with counted buffers."""
    steps = plan.partition("Planning:")[0].splitlines()
    counts = [re.findall(r"(?:hit|read)=(\d+)", line) for line in steps if "Buffers:" in line]
    return max(sum(map(int, numbers)) for numbers in counts)


async def test_a_receive_reads_few_pages_while_another_transaction_is_open(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2, 3)
        # As autovacuum does, after which the server plans anew.
        await execute_alone(postgres_url, "VACUUM ANALYZE mcp_session_message")
        async with engine_of(store).connect() as other:
            await other.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await other.exec_driver_sql("SELECT count(*) FROM mcp_session_message")
            delivered: dict[int, int] = {}
            for start in range(0, DEAD, 200):
                for sender in (1, 3):
                    await mailbox.post(
                        [new_message(start + number, recipient=2, sender=sender) for number in range(200)]
                    )
                    for message in (await mailbox.receive(2, delivered=delivered)).messages:
                        delivered[message.sender] = message.sequence
            # The last one removes one message of each sender and reads another.
            for number in (DEAD, DEAD + 1):
                for sender in (1, 3):
                    await mailbox.post([new_message(number, recipient=2, sender=sender)])
                with given_to_driver(store) as given:
                    page = await mailbox.receive(2, delivered=delivered)
                delivered |= {message.sender: message.sequence for message in page.messages}
            [(statement, parameters)] = [(text, given_) for text, given_ in given if "mcp_session_message" in text]
            async with engine_of(store).connect() as connection:
                explained = await connection.exec_driver_sql(
                    f"EXPLAIN (ANALYZE, BUFFERS) {statement}", tuple(parameters)
                )
                plan = "\n".join(row[0] for row in explained)
            assert pages_read(plan) < 50, plan
            await other.exec_driver_sql("ROLLBACK")
        await settled(store, mailbox)


async def execute_alone(url: str, statement: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)
    await engine.dispose()


async def test_the_plans_for_an_empty_table_are_those_for_a_full_one(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store, SqlMailbox(store) as mailbox:
        await run_instances(mailbox, 1, 2)
        with given_to_driver(store) as given:
            await mailbox.post([new_message(1, recipient=2, sender=1)])
            await mailbox.receive(2, delivered={})
            await mailbox.receive(2, delivered={1: 1, 3: 5})
        await settled(store, mailbox)
        for _ in range(2):
            for statement, parameters in given:
                plan = await plan_of(store, statement, parameters)
                assert "Seq Scan on mcp_session_message" not in plan, f"{statement}\n\n{plan}"
                if "INSERT" not in statement:
                    conditions = re.findall(r"Index Cond: \((.*)\)", plan)
                    assert any("ROW(sender, sequence) > ROW" in condition for condition in conditions), plan
                    assert all("sender" in condition for condition in conditions), plan
            # As a server does of its own accord.
            await execute_alone(postgres_url, "VACUUM ANALYZE mcp_session_message")
        ((pages,),) = await execute(postgres_url, sa.text("SELECT pg_relation_size('mcp_session_message') / 8192"))
        assert pages > 100
