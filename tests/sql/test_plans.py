"""Every statement of a store and of a log finds its rows by an index, however many there are."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from mcp_session_store.activity import Activity
from mcp_session_store.errors import SessionLimitReached
from mcp_session_store.records import EndReason, Principal, instance_name
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlEventLog, SqlKeyValue, SqlMailbox, SqlStateStore
from mcp_session_store.sql.schema.tables import (
    events_table,
    journal_table,
    logs_table,
    messages_table,
    sessions_table,
    state_table,
    values_table,
)
from mcp_session_store.testing import new_event, new_message, new_session, new_state
from mcp_session_store.testing.factories import new_presence
from mcp_session_store.testing.mailbox.suite import run_instances
from tests.support.databases import engine_of, execute, settled, sql_store
from tests.support.internals import database_of, idle_connections_of, trim_waiting
from tests.support.plans import loops_of, plan_of, statements_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio

ROWS = 20_000
EVENTS = 3
"""Of each session that has not ended."""
FEW = "mcp_session_instance"
"""The table of instances, of which there are never many."""
POLICY = RetentionPolicy(absolute=timedelta(days=30), per_principal=2, anonymous=ROWS)


async def fill(store: SqlSessionStore) -> None:
    """Sessions of all kinds: live ones, expired ones, ones without an expiry, and tombstones; journals, and events."""
    sessions, journal, logs, stored = sessions_table(), journal_table(), logs_table(), events_table()
    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        moment = now - timedelta(minutes=number)
        ended = moment if number % 5 == 0 else None
        rows.append(
            {
                "key": uuid.uuid4(),
                "namespace": "default" if number % 10 else "another",
                "initialize_params": "{}",
                "protocol_version": "2025-11-25",
                "client_name": f"client {number % 50}",
                "client_version": "1",
                "principal_digest": None if number % 15 == 0 else f"{number % 1000:064x}",
                "principal_display": None,
                "instance_hint": f"instance {number % 7}",
                "created_at": moment,
                "last_seen_at": moment,
                "expires_at": None if number % 9 == 0 else moment + timedelta(days=7),
                "ended_at": ended,
                "end_reason": None if ended is None else "client",
                "restores": 0,
                "revision": 1,
                "changed_at": moment if number % 4 == 0 else None,
                "state_values": 0,
                "state_bytes": 0,
            }
        )
    entries = [{"key": row["key"], "method": "m", "subject": "", "params": "{}", "revision": 1} for row in rows]
    with_log = [row for row in rows if row["ended_at"] is None]
    event_logs = [
        {
            "key": row["key"],
            "namespace": row["namespace"],
            "sequence": EVENTS,
            "total_bytes": 2 * EVENTS,
            "trimmed": 0,
            "trimmed_bytes": 0,
            "oldest_at": row["created_at"],
        }
        for row in with_log
    ]
    events = [
        {
            "key": row["key"],
            "sequence": sequence,
            "stream": f"instance.{sequence % 2}",
            "position": sequence,
            "previous": -1,
            "kind": "notification",
            "message": "{}",
            "total_bytes": 2 * sequence,
            "created_at": row["created_at"],
        }
        for row in with_log
        for sequence in range(1, EVENTS + 1)
    ]
    values = [
        {
            "key": row["key"],
            "namespace": row["namespace"],
            "collection": "c",
            "bytes": 2,
            "created_at": row["created_at"],
            "expires_at": row["created_at"],
            "value": "{}",
        }
        for row in rows
    ]
    state = [
        {
            "key": row["key"],
            "name": name,
            "namespace": row["namespace"],
            "version": 1,
            "bytes": 5,
            "watched": int(name == "b"),
            "expires_at": row["created_at"] + timedelta(days=1) if name == "a" else None,
            "value": "null",
        }
        for row in with_log
        for name in ("a", "b")
    ]
    for row in with_log:
        row |= {"state_values": 2, "state_bytes": 10}
    async with engine_of(store).connect() as connection:
        await connection.exec_driver_sql("BEGIN")
        await connection.execute(sa.insert(values_table()), values)
        await connection.execute(sa.insert(sessions), rows)
        await connection.execute(sa.insert(state_table()), state)
        await connection.execute(sa.insert(journal), entries)
        await connection.execute(sa.insert(logs), event_logs)
        await connection.execute(sa.insert(stored), events)
        await connection.exec_driver_sql("COMMIT")
        await connection.exec_driver_sql("ANALYZE")


async def use_one(store: SqlSessionStore) -> None:
    """All that is done with one session whose key is known."""
    key = (await store.create(new_session())).key
    await store.load(key)
    await store.claim(key, instance="instance-b", restores=0)
    await store.touch([Activity(key=key, first_age=0.0, last_age=0.0)])
    await store.replace_initialize(
        key, initialize_params="{}", protocol_version="2025-11-25", client_name="", client_version=""
    )
    await store.write_journal(key, method="m", subject="", params="{}")
    await store.write_journal(key, method="m", subject="", params=None)
    await store.read_journal(key)
    log = SqlEventLog(store)
    for again in (False, True):
        await log.append(key, [new_event(0), new_event(1)], again=again)
    await log.read(key, "instance.1", after=0)
    await log.heads([key])
    await log.standalone_places([key])
    await log.follow([key])
    await trim_waiting(log, key)
    await log.aclose()
    async with SqlStateStore(store) as state:
        for value in ("1", "2"):
            await state.put(key, new_state("a", value, watched=True))
            assert await state.get(key, ["a"]) == await state.get(key)
        await state.delete(key, "a")
    await store.end(key, reason=EndReason.CLIENT)


async def use_everything(store: SqlSessionStore) -> None:
    principal = Principal.of(client_id="a")
    since = (await store.changes(None)).until
    await use_one(store)
    assert (await store.changes(since)).changes
    async with SqlStateStore(store) as state:
        assert (await state.sweep(limit=20)).removed
    async with SqlKeyValue(store) as values:
        for _ in range(2):
            await values.put_many(["a", "b"], [{}, {}], ttl=60)
        assert (await values.ttl("a"))[0] == {}
        assert await values.get_many(["a", "b"]) == [{}, {}]
        assert await values.delete_many(["a", "b"]) == 2
    await store.sweep(limit=20)
    log = SqlEventLog(store)
    assert (await log.sweep(limit=20)).removed
    await log.aclose()
    # The limits, too, and what makes room.
    store.retention = POLICY
    for _ in range(3):
        await store.create(new_session(principal=principal))
    store.retention = POLICY.model_copy(update={"per_principal_excess": "refuse"})
    await store.create(new_session())
    store.retention = POLICY.model_copy(update={"anonymous": await _anonymous(store)})
    with contextlib.suppress(SessionLimitReached):
        await store.create(new_session(principal=None))


async def fill_mailbox(store: SqlSessionStore) -> None:
    """Messages of three senders for twenty instances, which run."""
    messages = messages_table()
    rows = [
        {
            "recipient": number % 20 + 1,
            "sender": 100 + number % 3,
            "sequence": number,
            "key": uuid.uuid4(),
            "kind": "answer",
            "bytes": 2,
            "created_at": datetime.now(UTC),
            "body": "{}",
        }
        for number in range(ROWS)
    ]
    async with SqlMailbox(store) as mailbox:
        await run_instances(mailbox, *range(1, 21))
    async with engine_of(store).connect() as connection:
        await connection.exec_driver_sql("BEGIN")
        await connection.execute(sa.insert(messages), rows)
        await connection.exec_driver_sql("COMMIT")
        await connection.exec_driver_sql("ANALYZE")


async def use_mailbox(store: SqlSessionStore) -> None:
    async with SqlMailbox(store) as mailbox:
        one, other = await run_instances(mailbox, 50, 51)
        assert await mailbox.beat(new_presence(50, instance=one))
        assert await mailbox.beat(new_presence(52, instance=one))
        await mailbox.post([new_message(1, recipient=7, sender=50), new_message(2, recipient=None, sender=50)])
        delivered: dict[int, int] = {}
        for _ in range(3):
            for message in (await mailbox.receive(7, delivered=delivered, limit=50)).messages:
                delivered[message.sender] = message.sequence
        assert delivered
        assert await mailbox.last_beats([instance_name(one)])
        assert (await mailbox.instances())[0].waiting
        await mailbox.retire(other)


async def _anonymous(store: SqlSessionStore) -> int:
    (row,) = await execute(
        store, "SELECT count(*) AS stored FROM mcp_session WHERE principal_digest IS NULL AND namespace = 'default'"
    )
    count: int = row.stored
    return count


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
async def test_what_is_done_with_one_session_takes_the_primary_key(database_url: str, known: bool) -> None:
    # A planner that has no statistics, as of a new table, and on SQLite of any, takes one index for another easily.
    async with sql_store(database_url, retention=RetentionPolicy(idle=timedelta(days=1))) as store:
        if known:
            await fill(store)
        seen = await statements_of(store, use_one)
        assert len(seen) > 20
        for statement, parameters in seen.items():
            plan = await plan_of(store, statement, parameters)
            # Messages are found by their session's key, which their primary key does not lead with.
            assert "ix_mcp_session" not in plan.replace("ix_mcp_session_message_key", ""), f"{statement}\n\n{plan}"


async def test_a_statement_for_one_session_is_planned_once_and_not_for_each_call(postgres_url: str) -> None:
    async with sql_store(postgres_url, retention=RetentionPolicy(idle=timedelta(days=1)), pool_size=1) as store:
        for _ in range(12):  # Postgres makes five plans for their parameters first, and then compares
            await use_one(store)
            await settled(store)
        # Of the connection on which they were prepared.
        (connection,) = idle_connections_of(database_of(store))
        rows = await connection.exec_driver_sql(
            "SELECT statement FROM pg_prepared_statements WHERE custom_plans > 5 AND statement ~ 'mcp_session'"
        )
        assert [row.statement for row in rows] == []
        often = await connection.exec_driver_sql(
            "SELECT count(*) FROM pg_prepared_statements WHERE generic_plans > 5 AND statement ~ 'mcp_session'"
        )
        assert often.scalar_one() > 5


async def test_no_statement_reads_the_whole_table(database_url: str) -> None:
    async with sql_store(database_url, retention=RetentionPolicy(idle=timedelta(days=1))) as store:
        await fill(store)
        seen = await statements_of(store, use_everything)
        words = Counter(re.findall(r"INSERT INTO|UPDATE mcp|DELETE FROM|SELECT", "\n".join(seen)))
        assert min(words["INSERT INTO"], words["UPDATE mcp"], words["DELETE FROM"], words["SELECT"]) > 1
        for statement, parameters in seen.items():
            if "sum(mcp_session_value.bytes)" in statement:
                continue  # it adds up a whole namespace, which may be the whole table
            plan = await plan_of(store, statement, parameters)
            shown = f"{statement}\n\n{plan}"
            assert "Seq Scan on mcp_session" not in plan.replace(FEW, ""), shown
            assert not re.search(r"SCAN mcp_session", plan.replace(FEW, "")), shown
            assert "mcp_session" in plan or statement.startswith("INSERT"), shown


@pytest.mark.parametrize("known", ["nothing", "few", "many"])
async def test_each_row_of_a_batch_is_looked_up_once_by_an_index(sqlite_url: str, known: str) -> None:
    # Else the time grows with the square of the batch, or with the table, while all others that write wait.
    async with sql_store(sqlite_url, retention=RetentionPolicy(idle=timedelta(days=1))) as store:
        seen: dict[str, Sequence[Any]] = {}
        if known == "many":
            await fill(store)
            await fill_mailbox(store)
            seen |= await statements_of(store, use_everything)
            seen |= await statements_of(store, use_mailbox)
        seen |= await statements_of(store, use_one)
        if known == "few":
            # Statistics stay as they are when a table grows.
            await use_one(store)
            await execute(store, "ANALYZE")
        with_batch = {text: parameters for text, parameters in seen.items() if "json_each" in text}
        assert len(with_batch) > 15
        for statement, parameters in with_batch.items():
            loops = await loops_of(store, statement, parameters)
            for inner in (inner for _, *others in loops for inner in others):
                assert inner.startswith("SEARCH"), f"{statement}\n\n{loops}"


async def test_no_statement_reads_the_messages_of_all_instances(database_url: str) -> None:
    async with sql_store(database_url) as store:
        await fill_mailbox(store)
        seen = await statements_of(store, use_mailbox)
        assert len(seen) > 6
        for statement, parameters in seen.items():
            plan = await plan_of(store, statement, parameters)
            shown = f"{statement}\n\n{plan}"
            assert "Seq Scan on mcp_session_message" not in plan, shown
            assert not re.search(r"SCAN mcp_session_message", plan), shown
