"""Stores behind PgBouncer: the contract, many at once on few server connections, and nothing left behind on these."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from interop_tests.pgbouncer import POOL_SIZE
from mcp_session_store import EndReason, EventPolicy, InvalidValue, StoreUnavailable
from mcp_session_store.activity import Activity
from mcp_session_store.mailbox import Presence
from mcp_session_store.retention import EventSweepReport
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.admin.doctor import Verdict, examine
from mcp_session_store.sql.listening import PROBE_TIMEOUT
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import execute, settled
from tests.support.sql_contracts import SqlEventLogConformance, SqlMailboxConformance, SqlStoreConformance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

    from interop_tests.pgbouncer import PgBouncer

pytestmark = pytest.mark.anyio

STORES = 8


class TestContract(SqlStoreConformance):
    @pytest.fixture
    def contract_url(self, shared_url: str) -> str:
        return shared_url


class TestEventContract(SqlEventLogConformance):
    @pytest.fixture
    def contract_url(self, shared_url: str) -> str:
        return shared_url


class TestMailboxContract(SqlMailboxConformance):
    @pytest.fixture
    def contract_url(self, shared_url: str) -> str:
        return shared_url


@asynccontextmanager
async def stores_at(url: str, count: int) -> AsyncIterator[list[SqlSessionStore]]:
    """So many stores, each with connections of its own, that no call has opened yet."""
    # Very many calls at once share the few server connections.
    stores = [SqlSessionStore(url, timeout=60) for _ in range(count)]
    try:
        yield stores
        for store in stores:
            await settled(store)
    finally:
        for store in stores:
            await store.aclose()


async def use(store: SqlSessionStore, *, sessions: int = 20) -> None:
    """Every kind of call, many at a time, each with the result that it must have."""
    created = await asyncio.gather(*(store.create(new_session()) for _ in range(sessions)))
    keys = [record.key for record in created]
    loaded, claimed, touched, replaced, unknown = await asyncio.gather(
        asyncio.gather(*map(store.load, keys)),
        asyncio.gather(*(store.claim(key, instance="b", restores=0) for key in keys)),
        store.touch([Activity(key=key, first_age=0.0, last_age=0.0) for key in keys]),
        asyncio.gather(
            *(
                store.replace_initialize(
                    key,
                    initialize_params=f'{{"key": "{key}"}}',
                    protocol_version="2025-11-25",
                    client_name=str(key),
                    client_version="2",
                )
                for key in keys
            )
        ),
        store.load(uuid.uuid4()),
    )
    assert [record and record.key for record in loaded] == keys
    assert [record and (record.key, record.restores, record.instance_hint) for record in claimed] == [
        (key, 1, "b") for key in keys
    ]
    assert touched == (set(), {})
    assert replaced == [True] * sessions
    assert unknown is None
    await use_events(store, keys)
    ended, kept = keys[::2], keys[1::2]
    assert await asyncio.gather(*(store.end(key, reason=EndReason.CLIENT) for key in ended)) == [True] * len(ended)
    assert await asyncio.gather(*map(store.load, ended)) == [None] * len(ended)
    left = await asyncio.gather(*map(store.load, kept))
    assert [record and (record.key, record.client_name) for record in left] == [(key, str(key)) for key in kept]


async def use_events(store: SqlSessionStore, keys: Sequence[UUID]) -> None:
    """Make every kind of call for events, for sessions without events."""
    log = SqlEventLog(store, policy=EventPolicy(max_events_per_session=10))
    for again in (False, True):
        appends = (log.append(key, [new_event(n) for n in range(3)], again=again) for key in keys)
        assert await asyncio.gather(*appends) == [1] * len(keys)
    many = [new_event(n) for n in range(3, 12)]
    alone, *_ = await asyncio.gather(log.append(keys[0], many), log.follow(keys), log.heads(keys))
    assert alone == 4
    pages = await asyncio.gather(*(log.read(key, "instance.1", after=0) for key in keys))
    found = [[event.position for event in page.events] for page in pages if page is not None]
    # The most that a log may have, less a tenth, are left of one that had more.
    assert found == [list(range(3, 12)), *([[0, 1, 2]] * (len(keys) - 1))]
    assert await log.heads(keys) == dict.fromkeys(keys, 3) | {keys[0]: 12}
    assert await log.sweep() == EventSweepReport()
    await log.aclose()
    await settled(store, log)


async def server_connections(database_url: str) -> int:
    """How many connections the server has to this database, but for the one that asks."""
    ((count,),) = await execute(
        database_url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    return int(count)


@asynccontextmanager
async def taken_server_connections(url: str, count: int) -> AsyncIterator[list[asyncpg.Connection]]:
    """So many clients of PgBouncer, each in a transaction, and thereby on a server connection of its own."""
    address = make_url(url)
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            client = await asyncpg.connect(
                host=address.host,
                port=address.port,
                user=address.username,
                database=address.database,
                statement_cache_size=0,
                timeout=10,
                command_timeout=10,
            )
            stack.callback(client.terminate)
            await client.execute("BEGIN")
            clients.append(client)
        yield clients
        for client in clients:
            await client.execute("ROLLBACK")


async def test_many_stores_share_a_few_server_connections(migrated_url: str, postgres_url: str) -> None:
    async with stores_at(migrated_url, STORES) as stores:
        for _ in range(5):
            await asyncio.gather(*map(use, stores))
        assert await server_connections(postgres_url) == POOL_SIZE


async def test_on_the_server_connections_a_store_leaves_nothing_behind(migrated_url: str) -> None:
    # PgBouncer itself sees to it that each client has the application_name that it asked for. And a connection on which
    # a migration ran a DO block has the settings of PL/pgSQL as well.
    settings = (
        "SELECT name, setting FROM pg_settings WHERE name <> 'application_name' AND name NOT LIKE 'plpgsql.%' "
        "ORDER BY name"
    )
    async with taken_server_connections(migrated_url, POOL_SIZE) as clients:
        before = [await client.fetch(settings) for client in clients]
    for _ in range(3):
        async with stores_at(migrated_url, STORES) as stores:
            await asyncio.gather(*map(use, stores))
    async with taken_server_connections(migrated_url, POOL_SIZE) as clients:
        assert [await client.fetch(settings) for client in clients] == before
        assert [await client.fetch("SELECT name, statement FROM pg_prepared_statements") for client in clients] == [
            []
        ] * POOL_SIZE


async def test_what_asyncpg_asks_about_types_it_asks_within_a_transaction(
    pgbouncer_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes a setting meanwhile, which must not reach one server connection, and its way back another."""
    introspect = asyncpg.Connection._introspect_types
    in_transaction = []

    async def watched(connection: asyncpg.Connection, *arguments: object) -> object:
        in_transaction.append(connection.is_in_transaction())
        return await introspect(connection, *arguments)

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", watched)
    await migrate.upgrade(pgbouncer_url)
    await migrate.check(pgbouncer_url)
    async with stores_at(pgbouncer_url, 2) as stores:
        await asyncio.gather(*map(use, stores))
    assert in_transaction
    assert all(in_transaction)


@pytest.mark.parametrize("behind_pgbouncer", [True, False], ids=["with the option", "without the option"])
async def test_a_server_connection_that_changes_between_two_calls_needs_the_option(
    pgbouncer: PgBouncer, migrated_url: str, postgres_url: str, behind_pgbouncer: bool
) -> None:
    url = migrated_url if behind_pgbouncer else pgbouncer.url_of(postgres_url, pgbouncer=None)
    async with stores_at(url, 1) as (store,):
        key = (await store.create(new_session())).key
        for _ in range(10):
            # On each connection of its pool, of which the one that came back first is taken next.
            assert await store.load(key) is not None
            await settled(store)
        known = await server_connections(postgres_url)
        assert known < POOL_SIZE, "calls one after the other need no second server connection"
        # All that it has spoken to are in use: it gets one that is new.
        async with taken_server_connections(url, known):
            if behind_pgbouncer:
                assert await store.load(key) is not None
            else:
                with pytest.raises(StoreUnavailable, match=r"InvalidSQLStatementNameError.*\?pgbouncer=true"):
                    await store.load(key)


async def test_bad_data_keeps_no_server_connection(migrated_url: str) -> None:
    async with stores_at(migrated_url, POOL_SIZE + 1) as stores:
        for store in stores:
            # Found by the driver, when the statement has been prepared and its values are to be sent.
            key = (await store.create(new_session())).key
            with pytest.raises(InvalidValue):
                await store.claim(key, instance="instance-b", restores=2**40)
            log = SqlEventLog(store)
            with pytest.raises(InvalidValue):
                await log.append(key, [new_event(2**63)])
            await log.aclose()
        await asyncio.gather(*map(use, stores))


@pytest.mark.parametrize("behind_pgbouncer", [True, False], ids=["with the option", "without the option"])
async def test_an_instance_holds_nothing_and_leaves_no_lock_on_a_server_connection(
    pgbouncer: PgBouncer, migrated_url: str, postgres_url: str, behind_pgbouncer: bool
) -> None:
    """A session's lock on a connection that others use next would say for ever that the instance lives."""
    url = migrated_url if behind_pgbouncer else pgbouncer.url_of(postgres_url, pgbouncer=None)
    async with stores_at(url, 1) as (store,):
        mailbox = SqlMailbox(store)
        held = asyncio.Event()
        listening = asyncio.ensure_future(mailbox.listen(lambda: None, instance="host:1:pooled", on_held=held.set))
        # Longer than the probe is waited for.
        await asyncio.wait({listening}, timeout=PROBE_TIMEOUT + 1)
        assert not held.is_set()
        assert not mailbox.hears
        assert await mailbox.beat(Presence(instance="host:1:pooled"))
        ((epoch,),) = await execute(postgres_url, "SELECT lock_epoch FROM mcp_session_instance WHERE name = 'pooled'")
        assert epoch is None
        assert not (await mailbox.last_beats(["pooled"]))["pooled"].released
        listening.cancel()
        await asyncio.wait({listening})
        await mailbox.aclose()
    locks = "SELECT objid FROM pg_locks JOIN pg_database d ON d.oid = database WHERE datname = current_database()"
    assert await execute(postgres_url, f"{locks} AND locktype = 'advisory'") == []


@pytest.mark.parametrize("behind_pgbouncer", [True, False], ids=["with the option", "without the option"])
async def test_the_doctor_notices_the_pooler(
    pgbouncer: PgBouncer, migrated_url: str, postgres_url: str, behind_pgbouncer: bool
) -> None:
    url = migrated_url if behind_pgbouncer else pgbouncer.url_of(postgres_url, pgbouncer=None)
    found = {finding.check: finding async for finding in examine(url)}
    assert found["pooler"].values == {"pooler": True, "pgbouncer": behind_pgbouncer}
    if behind_pgbouncer:
        assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    else:
        assert found["notifications"].verdict is Verdict.WARN
        assert "?pgbouncer=true" in f"{found['pooler'].remedy}"
    direct = {finding.check: finding async for finding in examine(postgres_url)}
    assert direct["pooler"].values["pooler"] is False
