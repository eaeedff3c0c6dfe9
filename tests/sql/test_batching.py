"""Calls that come together share statements, and nobody suffers for another."""

from __future__ import annotations

import asyncio
import contextvars
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from mcp_session_store.errors import InvalidValue, SessionStoreError, StoreBusy, StoreClosed, StoreUnavailable
from mcp_session_store.records import EndReason
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.sql.batching import MAX_BATCH_BYTES, Batcher
from mcp_session_store.sql.database import Attempt, Database
from mcp_session_store.sql.dialects.compiled import Statement
from mcp_session_store.sql.schema.tables import sessions_table
from mcp_session_store.testing import new_session
from tests.support.databases import connections_checked_out, engine_of, settled, sql_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from typing import Any


pytestmark = pytest.mark.anyio


class Recorded:
    """A batcher on a real database, whose statements wait until they are let go."""

    def __init__(self, database: Database, **options: Any) -> None:
        self.batches: list[list[int]] = []
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.refused: set[int] = set()
        self.database = database
        self.batcher: Batcher[int, int] = Batcher(database, self._execute, {}, writes=True, **options)

    async def _execute(self, attempt: Attempt, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.started.set()
        await self.go.wait()
        await attempt.connection.execute(sa.select(sa.literal(1)))
        if self.refused & set(items):
            raise ValueError("what the driver says of a value that it cannot encode")
        return [10 * item for item in items]

    def submit(self, item: int) -> asyncio.Task[int]:
        return asyncio.ensure_future(self.batcher.submit(item))

    async def first_is_running(self) -> asyncio.Task[int]:
        """Submit 0, and hold its statement."""
        self.go.clear()
        first = self.submit(0)
        await self.started.wait()
        return first


@asynccontextmanager
async def recorded(url: str, **options: Any) -> AsyncIterator[Recorded]:
    database = Database(url, schema=None, auto_upgrade=False, timeout=options.pop("timeout", 5.0))
    recorded = Recorded(database, **options)
    try:
        yield recorded
    finally:
        await recorded.batcher.aclose()
        await database.aclose()
        assert database.connections.in_use == 0


async def test_a_lone_call_goes_at_once_and_those_that_come_meanwhile_share_the_next(migrated_url: str) -> None:
    async with recorded(migrated_url) as calls:
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in range(1, 6)]
        await asyncio.sleep(0)
        calls.go.set()
        assert await asyncio.gather(first, *others) == [0, 10, 20, 30, 40, 50]
        assert calls.batches == [[0], [1, 2, 3, 4, 5]]


async def test_a_statement_is_shared_by_so_many_and_no_more(migrated_url: str) -> None:
    async with recorded(migrated_url, max_batch=4) as calls:
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in range(1, 10)]
        await asyncio.sleep(0)
        calls.go.set()
        await asyncio.gather(first, *others)
        assert calls.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


async def test_a_statement_is_shared_by_so_many_bytes_and_no_more(migrated_url: str) -> None:
    size = MAX_BATCH_BYTES // 3
    async with recorded(migrated_url, weigh=lambda item: size if item < 10 else 3 * MAX_BATCH_BYTES) as calls:
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in (1, 2, 3, 4, 10, 5, 6)]
        await asyncio.sleep(0)
        calls.go.set()
        await asyncio.gather(first, *others)
        # In the order of their arrival, and what has more than all may have together goes alone.
        assert calls.batches == [[0], [1, 2, 3], [4], [10], [5, 6]]


async def test_a_batcher_with_much_to_carry_lets_other_writers_of_sqlite_have_their_turn(sqlite_url: str) -> None:
    async with recorded(sqlite_url, weigh=lambda _: MAX_BATCH_BYTES // 2) as calls:
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in range(1, 9)]
        turns: list[int] = []

        async def write(_: Attempt, items: Sequence[int]) -> Sequence[int]:
            turns.append(len(calls.batches))
            return items

        another: Batcher[int, int] = Batcher(calls.database, write, {}, writes=True)
        waiting = asyncio.ensure_future(another.submit(1))
        await asyncio.sleep(0)
        calls.go.set()
        await asyncio.gather(first, waiting, *others)
        assert turns == [2]
        await another.aclose()


async def test_a_patient_caller_waits_longer_while_others_before_it_are_served(migrated_url: str) -> None:
    hanging = asyncio.Event()

    async def execute(_: Attempt, items: Sequence[int]) -> Sequence[int]:
        await (hanging.wait() if 5 in items else asyncio.sleep(0.7))
        return items

    database = Database(migrated_url, schema=None, auto_upgrade=False, timeout=3.0)
    batcher: Batcher[int, int] = Batcher(database, execute, {}, writes=False, max_batch=1, patient=True)
    outcomes = await asyncio.gather(*map(batcher.submit, range(7)), return_exceptions=True)
    # More than three seconds for the last of these; then no statement ends any more.
    assert outcomes[:5] == list(range(5))
    assert [type(outcome) for outcome in outcomes[5:]] == [StoreUnavailable] * 2
    hanging.set()
    await batcher.aclose()
    await database.aclose()


async def test_more_than_the_bound_may_not_wait(migrated_url: str) -> None:
    async with recorded(migrated_url, max_waiting=3) as calls:
        first = await calls.first_is_running()
        waiting = [calls.submit(item) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreBusy, match="3 calls already wait"):
            await calls.batcher.submit(4)
        calls.go.set()
        assert await asyncio.gather(first, *waiting) == [0, 10, 20, 30]
        assert await calls.batcher.submit(5) == 50


async def test_who_gives_up_leaves_his_place_to_others(migrated_url: str) -> None:
    async with recorded(migrated_url, max_waiting=1) as calls:
        first = await calls.first_is_running()
        for item in (1, 2, 3):
            waiting = calls.submit(item)
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        last = calls.submit(4)
        await asyncio.sleep(0)
        calls.go.set()
        assert list(await asyncio.gather(first, last)) == [0, 40]
        assert calls.batches == [[0], [4]]


async def test_the_cancellation_of_one_fails_none_of_those_who_share_its_statement(migrated_url: str) -> None:
    async with recorded(migrated_url) as calls:
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        calls.started.clear()
        calls.go.set()
        calls.go.clear()
        await calls.started.wait()
        others[1].cancel()
        first.cancel()
        calls.go.set()
        outcomes = await asyncio.gather(first, *others, return_exceptions=True)
        assert [outcomes[1], outcomes[3]] == [10, 30]
        assert isinstance(outcomes[2], asyncio.CancelledError)


async def test_a_refused_item_fails_none_of_those_who_share_its_statement(migrated_url: str) -> None:
    async with recorded(migrated_url) as calls:
        calls.refused = {7, 23}
        first = await calls.first_is_running()
        others = [calls.submit(item) for item in range(1, 31)]
        await asyncio.sleep(0)
        calls.go.set()
        outcomes = await asyncio.gather(first, *others, return_exceptions=True)
        failed = [item for item, outcome in enumerate(outcomes) if isinstance(outcome, InvalidValue)]
        assert failed == [7, 23]
        assert [outcome for item, outcome in enumerate(outcomes) if item not in failed] == [
            10 * item for item in range(31) if item not in failed
        ]
        # By halves, and not one by one.
        assert len(calls.batches) < 22


async def test_those_who_fail_together_fail_with_an_error_each(migrated_url: str) -> None:
    async with recorded(migrated_url, timeout=1.0) as calls:
        calls.go.clear()
        outcomes = await asyncio.gather(*(calls.submit(item) for item in range(3)), return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
        assert len(set(map(id, outcomes))) == 3
        calls.go.set()


async def test_nobody_waits_longer_than_the_timeout(migrated_url: str) -> None:
    async with recorded(migrated_url, timeout=2.0) as calls:
        calls.go.clear()
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match="did not answer within 2 s"):
                await calls.batcher.submit(0)
        calls.go.set()
        assert await calls.batcher.submit(1) == 10


async def test_calls_that_wait_when_the_batcher_is_closed_end(migrated_url: str) -> None:
    async with recorded(migrated_url, timeout=3.0) as calls:
        first = await calls.first_is_running()
        second = calls.submit(1)
        await asyncio.sleep(0)
        await calls.batcher.aclose()
        for outcome in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(outcome, StoreClosed)


async def test_a_batcher_carries_no_context_from_one_request_into_another(migrated_url: str) -> None:
    request = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def execute(attempt: Attempt, items: Sequence[int]) -> Sequence[int]:
        seen.append(request.get())
        return items

    database = Database(migrated_url, schema=None, auto_upgrade=False, timeout=5.0)
    batcher: Batcher[int, int] = Batcher(database, execute, {}, writes=False)
    request.set("first")
    await batcher.submit(1)
    await batcher.aclose()
    await database.aclose()
    assert seen == ["none"]


# On the store


class Statements:
    """Counts the statements that a store gives to the driver, and its connections in use."""

    def __init__(self, store: SqlSessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.most_connections = 0
        arguments_of = Statement.arguments

        def note(statement: Statement, parameters: dict[str, object]) -> list[object]:
            self.texts.append(statement.text)
            self.most_connections = max(self.most_connections, connections_checked_out(store))
            return arguments_of(statement, parameters)

        monkeypatch.setattr(Statement, "arguments", note)


async def test_a_spray_of_unknown_ids_costs_few_statements_and_one_connection(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sql_store(migrated_url) as store:
        statements = Statements(store, monkeypatch)
        assert await asyncio.gather(*(store.load(uuid.uuid4()) for _ in range(2000))) == [None] * 2000
        assert len(statements.texts) <= 21
        assert statements.most_connections == 1


async def test_creates_that_come_together_share_statements(migrated_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with sql_store(migrated_url) as store:
        statements = Statements(store, monkeypatch)
        await asyncio.gather(*(store.create(new_session()) for _ in range(600)))
        assert len(statements.texts) <= 3
        assert len(set(statements.texts)) == 1


async def test_a_session_that_the_database_refuses_fails_alone(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of the values that only a database refuses.
    monkeypatch.setattr("mcp_session_store.sql.sessions.store.check_session", lambda _: None)
    async with sql_store(migrated_url) as store:
        good = [new_session() for _ in range(20)]
        bad = [
            new_session(initialize_params="secret \0"),
            new_session(initialize_params="secret \ud800"),
            new_session(client_name="secret \ud800"),
        ]
        sessions = [*good[:5], bad[0], *good[5:12], bad[1], bad[2], *good[12:]]
        outcomes = await asyncio.gather(*map(store.create, sessions), return_exceptions=True)
        for session, outcome in zip(sessions, outcomes, strict=True):
            if session in bad:
                assert isinstance(outcome, SessionStoreError)
                assert not isinstance(outcome, StoreUnavailable)
                assert outcome.__cause__ is None
                assert outcome.__context__ is None
            else:
                assert outcome == await store.load(session.key)


async def test_different_calls_for_one_session_at_once_all_take_effect(migrated_url: str) -> None:
    async with sql_store(migrated_url) as store:
        session = new_session()
        await store.create(session)
        claims = [store.claim(session.key, instance=f"i{n}", restores=0) for n in range(5)]
        ends = [store.end(session.key, reason=EndReason.CLIENT) for _ in range(2)]
        claimed, ended = await asyncio.gather(asyncio.gather(*claims), asyncio.gather(*ends))
        assert sum(ended) == 1
        counted = [record.restores for record in claimed if record is not None]
        assert counted == list(range(1, len(counted) + 1))
        assert await store.load(session.key) is None


async def test_two_stores_that_change_the_same_sessions_do_not_block_each_other(migrated_url: str) -> None:
    async with sql_store(migrated_url) as here, sql_store(migrated_url) as there:
        sessions = [new_session() for _ in range(100)]
        await asyncio.gather(*map(here.create, sessions))
        for turn in range(5):
            calls = [
                store.claim(session.key, instance=f"{turn}", restores=turn)
                for store, order in ((here, sessions), (there, sessions[::-1]))
                for session in order
            ]
            assert None not in await asyncio.gather(*calls)
        ends = [
            store.end(session.key, reason=EndReason.CLIENT)
            for store, order in ((here, sessions), (there, sessions[::-1]))
            for session in order
        ]
        assert sum(await asyncio.gather(*ends)) == 100


async def test_cancelled_calls_leave_no_connection_in_use(migrated_url: str) -> None:
    async with sql_store(migrated_url) as store:
        for wait in range(12):
            calls = [*(store.create(new_session()) for _ in range(3)), store.load(uuid.uuid4())]
            tasks = [asyncio.ensure_future(call) for call in calls]
            for _ in range(wait):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await settled(store)
        session = new_session()
        assert await store.create(session) == await store.load(session.key)


async def test_a_store_that_is_closed_while_a_connection_goes_back_has_it_back(migrated_url: str) -> None:
    for wait in range(6):
        store = SqlSessionStore(migrated_url)
        call = asyncio.ensure_future(store.load(uuid.uuid4()))
        while not call.done():
            await asyncio.sleep(0)
        for _ in range(wait):
            await asyncio.sleep(0)
        await store.aclose()
        assert connections_checked_out(store) == 0


async def test_sessions_are_locked_in_the_order_of_their_keys(postgres_url: str) -> None:
    async with sql_store(postgres_url) as store:
        sessions = sorted((new_session() for _ in range(10)), key=lambda session: session.key)
        for session in reversed(sessions):  # so that they do not lie in the table in that order anyhow
            await store.create(session)
        await settled(store)
        engine = engine_of(store)
        table = sessions_table()
        lock = sa.select(table.c.key).with_for_update(nowait=True)
        async with engine.connect() as holder, engine.connect() as other:
            await holder.execution_options(isolation_level="READ COMMITTED")
            await other.execution_options(isolation_level="READ COMMITTED")
            await holder.execute(lock.where(table.c.key == sessions[0].key))
            # The last first: and yet it is the first that the statement waits for, with no lock on another.
            ends = [
                asyncio.ensure_future(store.end(session.key, reason=EndReason.CLIENT)) for session in sessions[::-1]
            ]
            waiting = sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            while not (await other.execute(waiting)).scalar_one():
                await other.rollback()
            locked = await other.execute(lock.where(table.c.key != sessions[0].key))
            assert len(locked.all()) == 9
            await other.rollback()
            await holder.rollback()
            assert await asyncio.gather(*ends) == [True] * 10
