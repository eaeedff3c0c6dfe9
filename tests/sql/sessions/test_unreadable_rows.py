"""Rows that cannot be read: refused alone, found by a check, and passed over by everything else."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.activity import Activity
from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.mailbox import Presence
from mcp_session_store.records import EndReason, EventKind, Principal, instance_name
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.sql import SqlEventLog, SqlMailbox
from mcp_session_store.sql.admin.events import EventDirectory
from mcp_session_store.sql.admin.rows import RowCheck
from mcp_session_store.sql.admin.sessions import SessionDirectory, SessionFilter, SessionState
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import events_swept, execute, sql_store

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.sql import SqlSessionStore

pytestmark = pytest.mark.anyio

OWNER = Principal.of(client_id="owner")
SECRET = "s3cret"

DAMAGE = {
    "a digest that is not hexadecimal": ("principal_digest", f"'{SECRET}'"),
}
DAMAGE_OF_SQLITE = {
    "a time that is a text": ("created_at", f"'{SECRET}'"),
    "an expiry that is a text": ("expires_at", f"'{SECRET}'"),
    "a name that is not UTF-8": ("client_name", f"CAST(x'{SECRET.encode().hex()}ff' AS TEXT)"),
    "params that are not UTF-8": ("initialize_params", "CAST(x'7bff7d' AS TEXT)"),
    "a name that is a BLOB": ("client_name", "x'00ff'"),
    "a count that is a text": ("restores", f"'{SECRET}'"),
    "a time beyond all years": ("last_seen_at", "9223372036854775807"),
}
DAMAGE_OF_POSTGRES = {
    "a time beyond all years": ("last_seen_at", "'20000-01-01'"),
    "a time before all years": ("created_at", "'0044-03-15 BC'"),
    "a time that never comes": ("expires_at", "'infinity'"),
    "an expiry beyond all years": ("expires_at", "'294276-12-31'"),
}


async def damage(store: SqlSessionStore, key: UUID, column: str, value: str) -> None:
    name = key.hex if store.database.dialect.single_writer else str(key)
    await execute(store, f"UPDATE mcp_session SET {column} = {value} WHERE key = '{name}'")


async def damaged_sessions(store: SqlSessionStore) -> dict[UUID, str]:
    """Sessions with one damage each, by key: the column. On Postgres the driver itself does not read some of them."""
    damaged = {}
    on_sqlite = store.database.dialect.single_writer
    kinds = DAMAGE | (DAMAGE_OF_SQLITE if on_sqlite else DAMAGE_OF_POSTGRES)
    for column, value in kinds.values():
        key = (await store.create(new_session(principal=OWNER))).key
        await damage(store, key, column, value)
        damaged[key] = column
    return damaged


async def test_a_row_that_cannot_be_read_fails_alone_and_without_its_content(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mcp_session_store")
    async with sql_store(database_url) as store:
        good = await store.create(new_session(principal=OWNER))
        damaged = await damaged_sessions(store)
        # All in one batch.
        keys = [good.key, *damaged]
        loaded = await asyncio.gather(*map(store.load, keys), return_exceptions=True)
        assert loaded[0] is not None
        assert not isinstance(loaded[0], BaseException)
        for column, outcome in zip(damaged.values(), loaded[1:], strict=True):
            assert isinstance(outcome, RecordUnreadable), column
            assert SECRET not in str(outcome)
            if str(outcome) != "a value that the driver does not read":
                assert str(outcome) == column
                assert outcome.digest_known == (column != "principal_digest")
                assert outcome.digest == (OWNER.digest if outcome.digest_known else None)
        claims = await asyncio.gather(
            *(store.claim(key, instance="one", restores=0) for key in keys), return_exceptions=True
        )
        assert claims[0] is not None
        assert not isinstance(claims[0], BaseException)
        assert SECRET not in caplog.text


async def test_the_activity_of_others_is_stored_beside_a_row_that_cannot_be_read(database_url: str) -> None:
    async with sql_store(database_url) as store:
        good = await store.create(new_session())
        damaged = await damaged_sessions(store)
        assert good.expires_at is not None
        touched = await store.touch([Activity(key=key, first_age=0, last_age=0) for key in (good.key, *damaged)])
        assert touched.not_live == set()
        record = await store.load(good.key)
        assert record is not None
        assert record.expires_at is not None
        assert record.expires_at > good.expires_at


async def test_ends_changes_and_sweeps_go_on_beside_rows_that_cannot_be_read(database_url: str) -> None:
    policy = RetentionPolicy(idle=timedelta(hours=1))
    async with sql_store(database_url, retention=policy) as store, SqlEventLog(store) as log:
        since = (await store.changes(None)).until
        good = await store.create(new_session())
        damaged = await damaged_sessions(store)
        await log.append(good.key, [new_event(0)])
        for key in damaged:
            assert await store.end(key, reason=EndReason.OPERATOR)
        ended = {change.key: change.ended for change in (await store.changes(since)).changes}
        assert ended == dict.fromkeys(damaged, EndReason.OPERATOR)
        await execute(store, "UPDATE mcp_session SET end_reason = 'a newer one' WHERE ended_at IS NOT NULL")
        ended = {change.key: change.ended for change in (await store.changes(since)).changes}
        assert ended == dict.fromkeys(damaged, EndReason.OPERATOR)
        if store.database.dialect.single_writer:
            # A key that is none: of a session, and of a log.
            for no_key in ("x'00'", "'no key'", "CAST(x'ff' AS TEXT)"):
                await store.create(new := new_session())
                await execute(
                    store,
                    f"UPDATE mcp_session SET key = {no_key}, changed_at = 9e15, expires_at = 1 "
                    f"WHERE key = '{new.key.hex}'",
                )
                await execute(
                    store,
                    "INSERT INTO mcp_session_log (key, namespace, sequence, total_bytes, trimmed, trimmed_bytes, "
                    f"oldest_at) VALUES ({no_key}, 'default', 1, 1, 0, 0, 1)",
                )
            assert {change.key for change in (await store.changes(since)).changes} == set(damaged)
            report = await store.sweep()
            assert report.expired == 3
        assert await store.sweep() is not None
        await events_swept(log)
        assert await store.load(good.key) is not None


async def test_a_journal_that_cannot_be_read_fails_alone(sqlite_url: str) -> None:
    async with sql_store(sqlite_url) as store:
        keys = []
        for _ in range(2):
            keys.append((await store.create(new_session())).key)
            await store.write_journal(keys[-1], method="m", subject="", params="{}")
        await execute(store, f"UPDATE mcp_session_journal SET params = CAST(x'ff' AS TEXT) WHERE key = '{keys[0].hex}'")
        bad, good = await asyncio.gather(*map(store.read_journal, keys), return_exceptions=True)
        assert isinstance(bad, RecordUnreadable)
        assert not isinstance(good, BaseException)
        assert [entry.method for entry in good] == ["m"]


async def test_events_that_cannot_be_read_are_missing_and_those_of_a_newer_version_are_passed_on(
    database_url: str,
) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        key = (await store.create(new_session())).key
        await log.append(key, [new_event(number) for number in range(4)])
        await execute(store, "UPDATE mcp_session_event SET kind = 'newer' WHERE sequence = 2")
        read = [1, 2, 3, 4]
        if store.database.dialect.single_writer:
            await execute(store, "UPDATE mcp_session_event SET message = CAST(x'ff' AS TEXT) WHERE sequence IN (1, 3)")
            read = [2, 4]
        stream = new_event(0).stream
        page = await log.read(key, stream, after=0)
        assert page is not None
        assert [event.sequence for event in page.events] == read
        assert next(event for event in page.events if event.sequence == 2).kind is EventKind.NOTIFICATION
        # However small the page, it is not empty while there is more.
        page = await log.read(key, stream, after=0, limit=1)
        assert page is not None
        assert [event.sequence for event in page.events] == read[:1]


async def test_a_heartbeat_that_cannot_be_read_hides_no_other_and_proves_no_death(sqlite_url: str) -> None:
    async with sql_store(sqlite_url) as store, SqlMailbox(store) as mailbox:
        for instance in ("a:1:good", "a:1:damaged"):
            await mailbox.beat(Presence(instance=instance))
        name = instance_name("a:1:damaged")
        await execute(store, f"UPDATE mcp_session_instance SET beat_at = '{SECRET}' WHERE name = '{name}'")
        names = {instance_name("a:1:good"), name}
        beats = await mailbox.last_beats(names)
        assert beats.keys() == names
        assert beats[name].ago == timedelta(0)
        assert {running.heartbeat.ago for running in await mailbox.instances()} >= {timedelta(0)}
        await mailbox.beat(Presence(instance="a:1:damaged"))
        async with RowCheck(sqlite_url) as check:
            assert await check.unreadable() == []


async def test_lists_go_on_beside_rows_that_cannot_be_read(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log:
        good = await store.create(new_session(principal=OWNER))
        await log.append(good.key, [new_event(0)])
        damaged = await damaged_sessions(store)
        listed: dict[UUID, Any] = {}
        async with SessionDirectory(database_url) as directory:
            for state in SessionState:
                cursor = None
                for _ in range(2 + len(damaged)):
                    page = await directory.page(SessionFilter(state=state), limit=2, after=cursor)
                    listed |= {session.key: session for session in page.sessions}
                    if (cursor := page.next) is None:
                        break
                assert cursor is None
            assert listed.keys() >= {good.key}
            for key in listed:
                assert await directory.find(key) is not None
            assert (await directory.statistics()).live >= 1
        async with EventDirectory(database_url) as events:
            assert [one.key for one in (await events.page()).logs] == [good.key]
            assert await events.find(good.key) is not None


async def test_a_check_finds_the_rows_that_cannot_be_read(database_url: str) -> None:
    async with sql_store(database_url, namespace="one") as store:
        good = await store.create(new_session(principal=OWNER))
        await store.write_journal(good.key, method="m", subject="", params="null")
        ended = await store.create(new_session())
        await store.end(ended.key, reason=EndReason.CLIENT)
        async with RowCheck(database_url) as check:
            assert await check.unreadable() == []
        damaged = await damaged_sessions(store)
        for params in ("[1]", "{", '"text"', "null"):
            key = (await store.create(new_session())).key
            await damage(store, key, "initialize_params", f"'{params}'")
            damaged[key] = "initialize_params"
        async with RowCheck(database_url) as check:
            found = await check.unreadable()
            assert {row.key: row.columns for row in found} == {key: [column] for key, column in damaged.items()}
            assert {(row.table, row.namespace, row.live) for row in found} == {("mcp_session", "one", True)}
