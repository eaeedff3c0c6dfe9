"""copy: sessions from one database to another, exactly, repeatedly, and beside running servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tracemalloc
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer

from mcp_session_store import durable_app
from mcp_session_store.activity import Activity
from mcp_session_store.records import EndReason, EventKind, NewEvent, Principal
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.admin import copying
from mcp_session_store.sql.admin.copied_rows import belonging_to_sessions
from mcp_session_store.sql.admin.copying import SessionCopy
from mcp_session_store.sql.dialects.functions import MOMENT
from mcp_session_store.sql.schema.tables import journal_table, logs_table, sessions_table, values_table
from mcp_session_store.sql.schema.version import HEAD
from mcp_session_store.sql.transaction import transaction
from mcp_session_store.testing import new_presence
from tests.support.asgi import Client
from tests.support.clients import until
from tests.support.databases import execute, migrated
from tests.support.postgres import fresh_database
from tests.support.rows import insert_rows, session_row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from starlette.applications import Starlette

    from tests.support.commands import InvokeFunction

HOUR = timedelta(hours=1)
PRINCIPAL = Principal.of(client_id="client", issuer="https://issuer", subject="ö")


@pytest.fixture(params=["sqlite-postgres", "postgres-sqlite"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A source and a destination of different kinds, migrated."""
    with ExitStack() as stack:
        postgres = stack.enter_context(fresh_database(request.getfixturevalue("postgres_server_url")))
        found = [postgres, f"sqlite:///{tmp_path / 'sessions.db'}"]
        for url in found:
            asyncio.run(migrated(url))
        if request.param == "sqlite-postgres":
            found.reverse()
        yield found[0], found[1]


def on_the_millisecond(row: dict[str, Any]) -> dict[str, Any]:
    """A row with times that SQLite can hold."""
    moments = {name: value for name, value in row.items() if isinstance(value, datetime)}
    return row | {name: value.replace(microsecond=value.microsecond // 1000 * 1000) for name, value in moments.items()}


def rows_of(url: str, table: sa.Table | None = None) -> dict[uuid.UUID, tuple[Any, ...]]:
    table = sessions_table() if table is None else table
    return {row.key: tuple(row) for row in asyncio.run(execute(url, sa.select(table).order_by(table.c.key)))}


def belongings_of(url: str) -> list[list[tuple[Any, ...]]]:
    """The rows of each table about sessions: of journals, and of state."""
    return [
        [tuple(row) for row in asyncio.run(execute(url, sa.select(table).order_by(*table.primary_key)))]
        for table in belonging_to_sessions(None)
    ]


def belonging(table: sa.Table, key: uuid.UUID, number: int) -> dict[str, Any]:
    """A row of a table about sessions."""
    moment = on_the_millisecond({"at": datetime.now(UTC) + HOUR})["at"]
    values = {sa.Uuid: key, sa.Text: f"{number} ö", sa.Integer: 2**31 - 1 - number, sa.BigInteger: 2**53 - number}
    return {column.name: moment if column.type is MOMENT else values[type(column.type)] for column in table.c}


def source_rows() -> list[dict[str, Any]]:
    return [
        on_the_millisecond(row)
        for row in (
            session_row(
                revision=3, restores=7, initialize_params='{"a":"\\u0000 ö \\ud83d\\ude00"}', client_name="Ä 語"
            ),
            session_row(expires=None, namespace="other", principal=PRINCIPAL),
            session_row(changed_at=datetime.now(UTC), revision=1),
            session_row(expires=-HOUR),
            session_row(ended=HOUR),
        )
    ]


def seed(url: str) -> list[dict[str, Any]]:
    rows = source_rows()
    asyncio.run(insert_rows(url, rows))
    for table in belonging_to_sessions(None):
        values = [belonging(table, rows[0]["key"], number) for number in range(3)]
        asyncio.run(execute(url, sa.insert(table).values(values)))
    return rows


def copied(invoke: InvokeFunction, urls: tuple[str, str], *arguments: str) -> dict[str, Any]:
    done = invoke("copy", "--from", urls[0], "--to", urls[1], "--json", *arguments)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_copy_is_exact_and_can_be_repeated(invoke: InvokeFunction, urls: tuple[str, str]) -> None:
    rows = seed(urls[0])
    live = {row["key"] for row in rows[:3]}
    dry = copied(invoke, urls, "--dry-run")
    assert (dry["copied"], rows_of(urls[1])) == (3, {})
    first = copied(invoke, urls)
    assert (first["copied"], first["namespaces"], first["running"]) == (3, {"default": 2, "other": 1}, 0)
    assert rows_of(urls[1]) == {key: row for key, row in rows_of(urls[0]).items() if key in live}
    assert belongings_of(urls[1]) == belongings_of(urls[0])
    again = copied(invoke, urls)
    assert (again["copied"], again["updated"], again["unchanged"]) == (0, 0, 3)
    assert rows_of(urls[1]).keys() == live
    assert belongings_of(urls[1]) == belongings_of(urls[0])


def test_a_copy_again_takes_what_has_changed_and_leaves_what_was_used_since(
    invoke: InvokeFunction, urls: tuple[str, str]
) -> None:
    changed, ended, used, expired, left = rows = [on_the_millisecond(session_row()) for _ in range(5)]
    asyncio.run(insert_rows(urls[0], rows))
    copied(invoke, urls)

    async def go_on() -> None:
        async with SqlSessionStore(urls[0]) as store, SqlSessionStore(urls[1]) as there:
            await store.end(ended["key"], reason=EndReason.CLIENT)
            await store.end(left["key"], reason=EndReason.EXPIRED)
            table = sessions_table()
            await execute(urls[0], sa.update(table).where(table.c.key == changed["key"]).values(revision=1))
            for key in (used["key"], left["key"]):
                await there.touch([Activity(key=key, first_age=0.0, last_age=0.0)])
            await there.end(expired["key"], reason=EndReason.OPERATOR)

    asyncio.run(go_on())
    dry = copied(invoke, urls, "--dry-run")
    done = copied(invoke, urls)
    assert dry | {"dry_run": False} == done
    assert {name: done[name] for name in ("copied", "updated", "newer", "ended")} == {
        "copied": 0,
        "updated": 1,
        "newer": 2,
        "ended": 1,
    }

    async def look() -> None:
        async with SqlSessionStore(urls[1]) as there:
            record = await there.load(changed["key"])
            assert record is not None
            assert record.revision == 1
            assert await there.load(used["key"]) is not None
            assert await there.load(left["key"]) is not None
            assert await there.find(ended["key"]) is not None
            assert await there.load(ended["key"]) is None
            assert await there.load(expired["key"]) is None
            # A server that runs there learns of both.
            found = {change.key for change in (await there.changes(datetime.now(UTC) - HOUR)).changes}
            assert {changed["key"], ended["key"]} <= found

    asyncio.run(look())


def test_one_namespace_is_copied_where_it_is_named(invoke: InvokeFunction, urls: tuple[str, str]) -> None:
    rows = seed(urls[0])
    assert copied(invoke, urls, "--namespace", "other")["copied"] == 1
    assert rows_of(urls[1]).keys() == {rows[1]["key"]}


def test_sequences_go_on_and_a_client_that_resumes_finds_what_it_finds_after_a_trim(
    invoke: InvokeFunction, urls: tuple[str, str]
) -> None:
    session = session_row()
    asyncio.run(insert_rows(urls[0], [session]))
    key = session["key"]

    def event(number: int) -> NewEvent:
        return NewEvent(stream="s", position=number, kind=EventKind.NOTIFICATION, message="{}")

    async def append(url: str, number: int) -> int:
        async with SqlSessionStore(url) as store, SqlEventLog(store) as log:
            stored = await log.append(key, [event(number)])
            assert stored is not None
            return stored

    for number in range(1, 4):
        asyncio.run(append(urls[0], number))
    copied(invoke, urls)
    place = rows_of(urls[1], logs_table())[key]
    assert place[2] == rows_of(urls[0], logs_table())[key][2] == 3
    assert asyncio.run(append(urls[1], 4)) == 4

    async def read(after: int) -> tuple[list[int], int]:
        async with SqlSessionStore(urls[1]) as store, SqlEventLog(store) as log:
            page = await log.read(key, "s", after=after)
            assert page is not None
            return [found.sequence for found in page.events], page.first

    # That the oldest event is the fourth says to a reader that knows the first one only that there is a gap.
    assert asyncio.run(read(1)) == ([4], 4)
    assert asyncio.run(read(3)) == ([4], 4)
    # A log that has gone on is left alone.
    asyncio.run(append(urls[0], 4))
    asyncio.run(append(urls[0], 5))
    copied(invoke, urls)
    assert rows_of(urls[1], logs_table())[key][2] == 4


def test_a_copy_that_was_killed_goes_on(
    invoke: InvokeFunction, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [on_the_millisecond(session_row()) for _ in range(50)]
    asyncio.run(insert_rows(urls[0], rows))
    monkeypatch.setattr(copying, "PAGE", 20)
    pages = itertools.count(1)

    @contextlib.asynccontextmanager
    async def killed(*arguments: Any) -> AsyncIterator[None]:
        async with transaction(*arguments):
            yield
            if next(pages) == 2:
                raise ZeroDivisionError

    monkeypatch.setattr(copying, "transaction", killed)

    async def copy() -> None:
        async with SessionCopy(*urls) as copy:
            await copy.run()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(copy())
    monkeypatch.setattr(copying, "transaction", transaction)
    assert len(rows_of(urls[1])) == 20
    done = copied(invoke, urls)
    assert (done["unchanged"], done["copied"]) == (20, 30)
    assert rows_of(urls[1]) == rows_of(urls[0])


def test_unreadable_sessions_are_left_out_and_named(invoke: InvokeFunction, sqlite_url: str, tmp_path: Path) -> None:
    good, bad = session_row(), session_row(namespace="n")
    asyncio.run(insert_rows(sqlite_url, [good, bad]))
    asyncio.run(execute(sqlite_url, f"UPDATE mcp_session SET expires_at = 9e300 WHERE key = '{bad['key'].hex}'"))
    there = f"sqlite:///{tmp_path / 'there.db'}"
    asyncio.run(insert_rows(sqlite_url, [session_row(restores=2**31)]))
    assert "1 would be copied" in invoke("copy", "--dry-run", "--from", sqlite_url, "--to", there).output
    assert not (tmp_path / "there.db").exists()
    done = invoke("copy", "--from", sqlite_url, "--to", there)
    assert "1 copied" in done.output
    assert "2 sessions cannot be read and were left out" in done.output
    assert rows_of(there).keys() == {good["key"]}


def test_instances_that_run_on_the_source_are_told_of(invoke: InvokeFunction, sqlite_url: str, tmp_path: Path) -> None:
    async def beat() -> None:
        async with SqlMailbox(sqlite_url) as mailbox:
            await mailbox.beat(new_presence())

    asyncio.run(beat())
    done = invoke("copy", "--from", sqlite_url, "--to", f"sqlite:///{tmp_path / 'there.db'}")
    assert "1 instance ran on the source; when it has stopped, copy again" in done.output


def test_what_cannot_be_copied_is_refused(invoke: InvokeFunction, urls: tuple[str, str], tmp_path: Path) -> None:
    source, there = urls
    same = invoke("copy", "--from", source, "--to", source)
    assert (same.exit_code, "are the same" in same.output) == (2, True)
    absent = invoke("copy", "--from", f"sqlite:///{tmp_path / 'no.db'}", "--to", there)
    assert (absent.exit_code, "there is no file" in absent.output) == (2, True)
    for name, url in (("source", source), ("there", there)):
        asyncio.run(execute(url, "UPDATE mcp_session_version SET version_num = '1_9999_later'"))
        newer = invoke("copy", "--from", source, "--to", there)
        assert (newer.exit_code, "would not copy all of it" in newer.output) == (1, True), name
        asyncio.run(execute(url, "UPDATE mcp_session_version SET version_num = '1_0001_sessions'"))
        older = invoke("copy", "--from", source, "--to", there)
        assert (older.exit_code, "mcp-session-store upgrade --url" in older.output) == (1, True), name
        asyncio.run(execute(url, f"UPDATE mcp_session_version SET version_num = '{HEAD}'"))
    asyncio.run(execute(there, "DROP TABLE mcp_session_version"))
    missing = invoke("copy", "--from", source, "--to", there, "--dry-run")
    assert (missing.exit_code, "mcp-session-store upgrade --url" in missing.output) == (1, True)


def test_a_copy_keeps_a_bounded_part_in_memory(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = '{"a": "' + "x" * 10_000 + '"}'
    monkeypatch.setattr(copying, "PAGE", 10)
    there = f"sqlite:///{tmp_path / 'there.db'}"

    async def peak(number: int) -> int:
        rows = [session_row(initialize_params=large, revision=1) for _ in range(number)]
        await insert_rows(sqlite_url, rows)
        calls = [
            {"key": row["key"], "method": "m", "subject": str(n), "params": large, "revision": 1}
            for row in rows
            for n in range(2)
        ]
        await execute(sqlite_url, sa.insert(journal_table()).values(calls))
        del rows, calls
        async with SessionCopy(sqlite_url, there) as copy:
            tracemalloc.start()
            try:
                assert (await copy.run()).copied == number
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    few = asyncio.run(peak(30))
    assert asyncio.run(peak(120)) < 2 * few


def test_values_of_no_session_are_copied_unless_they_were_stored_there_later(
    invoke: InvokeFunction, urls: tuple[str, str]
) -> None:
    now = on_the_millisecond({"at": datetime.now(UTC)})["at"]

    def value(text: str, **changes: Any) -> dict[str, Any]:
        row = {"key": uuid.uuid4(), "namespace": "default", "collection": "c", "bytes": 2, "created_at": now}
        return row | {"expires_at": None, "value": text} | changes

    kept, late, old = value("1"), value("2", expires_at=now + HOUR), value("3", expires_at=now - HOUR)
    table = values_table()
    asyncio.run(execute(urls[0], sa.insert(table).values([kept, late, old])))
    assert copied(invoke, urls, "--dry-run")["values"] == 2
    assert copied(invoke, urls)["values"] == 2
    assert rows_of(urls[1], table) == {key: row for key, row in rows_of(urls[0], table).items() if key != old["key"]}
    for url, row, text in ((urls[0], kept, "4"), (urls[1], late, "5")):
        changed = {"created_at": now + HOUR, "value": text}
        asyncio.run(execute(url, sa.update(table).where(table.c.key == row["key"]).values(changed)))
    assert copied(invoke, urls)["values"] == 1
    assert {row[-1] for row in rows_of(urls[1], table).values()} == {"4", "5"}
    assert copied(invoke, urls)["values"] == 0


@pytest.mark.anyio
async def test_a_client_notices_no_more_than_a_restart(urls: tuple[str, str]) -> None:
    def app_on(url: str) -> Starlette:
        server = MCPServer("moved", log_level="WARNING")

        @server.tool()
        def level() -> str:
            return "answer"

        return durable_app(server, url, events=True)

    source = app_on(urls[0])
    async with anyio.create_task_group() as tasks:
        async with source.router.lifespan_context(source):
            client = Client(source, tasks)
            session_id = await client.begin()
            await client.request("logging/setLevel", {"level": "debug"})
            call = client.open_call("level")
            await call.answer()
            first, *_, last = [event.id for event in call.events if event.id]
            seen = await client.open_stream(last).answer()

            async def is_announced() -> bool:
                return bool(await execute(urls[0], "SELECT 1 FROM mcp_session_instance"))

            await until(is_announced, "the instance has said that it runs")
            async with SessionCopy(*urls) as copy:
                assert (await copy.run()).running == 1
        async with SessionCopy(*urls) as copy:
            report = await copy.run()
            assert (report.updated + report.unchanged, report.running) == (1, 0)
        moved = app_on(urls[1])
        async with moved.router.lifespan_context(moved):
            client = Client(moved, tasks, session_id=session_id)
            assert (await client.call("level")).status == 200
            # A client that has not received the answer gets an error for it, and one that has it what it got before.
            answer = await client.open_stream(first).answer()
            assert [message["error"]["data"] for message in answer.messages] == [{"reason": "trimmed"}]
            assert (await client.open_stream(last).answer()).status == seen.status
            standalone = await client.get_stream()
            assert standalone.status == 200
            standalone.disconnect()
