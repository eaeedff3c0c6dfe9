"""A look at a database by the doctor: what it says of a good one, and of each thing that is not right."""

from __future__ import annotations

import os
import uuid
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.errors import ConfigurationError, StoreUnavailable
from mcp_session_store.mailbox import Presence
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.admin.doctor import Finding, Verdict, examine
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from mcp_session_store.testing import new_event, new_session
from tests.support.databases import execute, migrated, sql_store
from tests.support.faults import FaultProxy
from tests.support.roles import limited
from tests.support.rows import insert_rows, session_row

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
POSTGRES = "connection url driver server notifications pooler clock connections schema grants"
SQLITE = "connection url driver file journal schema"
TABLES = "sessions events rows instances"


async def looked(url: str, **options: object) -> dict[str, Finding]:
    findings = [finding async for finding in examine(url, **options)]  # type: ignore[arg-type]
    by_check = {finding.check: finding for finding in findings}
    assert len(by_check) == len(findings)
    return by_check


def verdicts(findings: dict[str, Finding], verdict: Verdict) -> set[str]:
    return {check for check, finding in findings.items() if finding.verdict is verdict}


async def test_a_good_database_has_no_failure(database_url: str) -> None:
    async with sql_store(database_url) as store, SqlEventLog(store) as log, SqlMailbox(store) as mailbox:
        session = new_session()
        await store.create(session)
        assert await log.append(session.key, [new_event(0)]) is not None
        await mailbox.beat(Presence(instance="host:1:alive"))
        await mailbox.beat(Presence(instance="host:1:dead"))
        an_hour = "3600000" if database_url.startswith("sqlite") else "INTERVAL '1 hour'"
        await execute(store, f"UPDATE mcp_session_instance SET beat_at = started_at - {an_hour} WHERE name = 'dead'")
        found = await looked(database_url)
    kind = SQLITE if database_url.startswith("sqlite") else POSTGRES
    assert list(found) == f"{kind} {TABLES}".split()
    assert not verdicts(found, Verdict.FAIL) | verdicts(found, Verdict.SKIPPED)
    assert found["schema"].values == {"revision": HEAD, "needed": HEAD}
    assert found["sessions"].values["live"] == 1
    assert found["events"].values["events"] == 1
    alive = {one["instance"]: one["alive"] for one in found["instances"].values["instances"]}
    assert alive == {"host:1:alive": True, "host:1:dead": False}


async def test_nothing_is_written_beside_or_into_a_sqlite_file(sqlite_url: str, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    absent = await looked(sqlite_url)
    assert next(iter(absent)) == "connection"
    assert absent["connection"].verdict is Verdict.FAIL
    assert "upgrade" in f"{absent['connection'].remedy}"
    assert not contents()

    await migrated(sqlite_url)
    before = contents()
    assert not verdicts(await looked(sqlite_url), Verdict.FAIL)
    assert contents() == before

    async with SqlSessionStore(sqlite_url) as store:
        await store.create(new_session())
        before = {name: content for name, content in contents().items() if not name.endswith("-shm")}
        # What stands in the write-ahead log alone is found.
        found = await looked(sqlite_url)
        assert found["sessions"].values["live"] == 1
        assert found["journal"].values == {"mode": "wal"}
        assert {name: content for name, content in contents().items() if not name.endswith("-shm")} == before


async def test_a_file_that_others_may_read_is_worth_a_word(sqlite_url: str, tmp_path: Path) -> None:
    await migrated(sqlite_url)
    path = tmp_path / "sessions.db"
    path.chmod(0o644)
    found = (await looked(sqlite_url))["file"]
    assert found.verdict is Verdict.WARN
    assert found.values["mode"] == "0644"
    assert str(path) in found.found
    path.chmod(0o600)
    assert (await looked(sqlite_url))["file"].verdict is Verdict.OK


async def test_a_relative_path_is_shown_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await migrate.upgrade("sqlite:///a%b.db")
    found = await looked("sqlite:///a%b.db")
    assert found["file"].values["path"] == str(tmp_path / "a%b.db")
    assert found["schema"].verdict is Verdict.OK
    by_uri = await looked(f"sqlite:///file:{tmp_path}/a%25b.db?uri=true&mode=rw")
    assert by_uri["file"].values["path"] == str(tmp_path / "a%b.db")


async def test_a_file_that_is_no_database_is_said_first(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"no database at all" * 100)
    findings = [finding async for finding in examine(sqlite_url)]
    assert findings[0].check == "connection"
    assert findings[0].verdict is Verdict.FAIL
    assert "no SQLite database" in findings[0].found
    assert "sqlite:////" in findings[0].found


@pytest.mark.parametrize("state", ["missing", "behind", "ahead", "newer"])
async def test_a_schema_that_does_not_fit(database_url: str, state: str) -> None:
    await migrated(database_url)
    if state == "missing":
        await migrate.downgrade(database_url, revision="base")
    else:
        revision = {"behind": "1_0001_sessions", "ahead": "9_0001_far", "newer": "1_0999_later"}[state]
        await execute(database_url, f"UPDATE mcp_session_version SET version_num = '{revision}'")
    found = await looked(database_url)
    if state == "newer":
        assert not verdicts(found, Verdict.FAIL) | verdicts(found, Verdict.SKIPPED)
        assert found["schema"].verdict is Verdict.WARN
        return
    assert verdicts(found, Verdict.FAIL) == {"schema"}
    assert "mcp-session-store" in f"{found['schema'].remedy}"
    assert set(TABLES.split()) <= verdicts(found, Verdict.SKIPPED)


async def test_a_table_that_is_missing_although_the_revision_fits(database_url: str) -> None:
    await migrated(database_url)
    await execute(database_url, "ALTER TABLE mcp_session RENAME TO mcp_session_kept")
    found = await looked(database_url)
    assert found["schema"].verdict is Verdict.OK
    assert verdicts(found, Verdict.FAIL) >= {"sessions", "rows"}
    assert "its revision fits, but not what is there" in found["sessions"].found
    assert "put back what was removed or renamed" in f"{found['sessions'].remedy}"


async def test_without_a_connection_the_first_line_says_why_and_the_rest_is_not_looked_at() -> None:
    url = "postgresql://app:s3cret@127.0.0.1:1/db?sslmode=disable&keepalives=1&sslpassword=hidden"
    findings = [finding async for finding in examine(url)]
    assert [finding.check for finding in findings] == f"{POSTGRES} {TABLES}".split()
    assert findings[0].verdict is Verdict.FAIL
    assert "check the host and the port" in f"{findings[0].remedy}"
    assert "refused" in findings[0].found.lower()
    assert all(finding.verdict is Verdict.SKIPPED for finding in findings[3:])
    assert "s3cret" not in repr(findings)
    assert "hidden" not in repr(findings)
    options = findings[1].values["options"]
    assert options["sslmode=disable"] == "for the driver"
    assert options["keepalives=1"].startswith("left out")


async def test_a_wrong_url_is_a_wrong_argument() -> None:
    with pytest.raises(ConfigurationError):
        await looked("mongodb://host/db")


@pytest.mark.parametrize("hangs_after", [0, 1, 6])
async def test_it_ends_although_the_database_hangs(postgres_url: str, hangs_after: int) -> None:
    await migrated(postgres_url)
    target = make_url(postgres_url)
    async with FaultProxy(f"{target.host}", target.port or 0) as proxy:
        there = target.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        findings: list[Finding] = []
        async with aclosing(examine(there, timeout=0.3 if hangs_after == 0 else 2.0)) as looks:
            if not hangs_after:
                proxy.hang()
            async for finding in looks:
                findings.append(finding)
                if len(findings) == hangs_after:
                    proxy.hang()
    assert [finding.check for finding in findings] == f"{POSTGRES} {TABLES}".split()
    if hangs_after:
        assert findings[0].verdict is Verdict.OK
        assert findings[-1].verdict is Verdict.SKIPPED
        assert "answer" in findings[-1].found
    else:
        assert findings[0].verdict is Verdict.FAIL


async def test_rows_are_counted_by_state_and_namespace(database_url: str) -> None:
    rows = [
        *(session_row() for _ in range(3)),
        session_row(opened=9 * HOUR, expires=-timedelta(minutes=1)),
        session_row(opened=9 * HOUR, expires=-HOUR),
        session_row(ended=HOUR),
        session_row(namespace="other"),
    ]
    await insert_rows(database_url, rows)
    found = (await looked(database_url))["sessions"]
    expected = {"live": 3, "expired": 2, "ended": 1, "unswept": 1, "other_namespaces": {"other": 1}}
    assert found.values == expected
    assert found.verdict is Verdict.WARN
    assert "sweep" in f"{found.remedy}"
    elsewhere = (await looked(database_url, namespace="third"))["sessions"]
    assert elsewhere.verdict is Verdict.WARN
    assert "--namespace" in f"{elsewhere.remedy}"


async def test_rows_that_cannot_be_read_are_counted(database_url: str) -> None:
    await insert_rows(database_url, [session_row(), session_row(initialize_params="no JSON")])
    found = (await looked(database_url))["rows"]
    assert found.verdict is Verdict.WARN
    assert len(found.values["unreadable"]) == 1
    assert "check --rows" in f"{found.remedy}"


async def test_the_privileges_that_a_server_needs(postgres_url: str) -> None:
    await migrated(postgres_url, schema="sessions")
    role = f"doctor_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password'")
    url = make_url(postgres_url).set(username=role, password="password").render_as_string(hide_password=False)

    async def granted(*grants: str) -> dict[str, Finding]:
        for grant in grants:
            await execute(postgres_url, f"GRANT {grant} TO {role}")
        return await looked(url, schema="sessions")

    found = await granted()
    assert found["grants"].verdict is Verdict.FAIL
    assert f"GRANT USAGE ON SCHEMA sessions TO {role}" in f"{found['grants'].remedy}"

    found = await granted("USAGE ON SCHEMA sessions", "SELECT ON ALL TABLES IN SCHEMA sessions")
    # A role that only reads was meant for this.
    assert not verdicts(found, Verdict.FAIL) | verdicts(found, Verdict.SKIPPED)
    assert found["grants"].verdict is Verdict.WARN
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON" in f"{found['grants'].remedy}"

    found = await granted("INSERT, UPDATE, DELETE ON sessions.mcp_session")
    assert found["grants"].verdict is Verdict.FAIL
    assert "mcp_session" not in found["grants"].values["missing"]
    assert found["grants"].values["missing"]["mcp_session_event"] == ["INSERT", "UPDATE", "DELETE"]

    found = await granted("INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA sessions")
    assert found["grants"].verdict is Verdict.OK
    assert found["grants"].values["may_upgrade"] is False

    by_owner = await looked(postgres_url, schema="sessions")
    assert by_owner["grants"].values["may_upgrade"] is True


async def test_a_role_that_may_not_upgrade_where_there_are_no_tables(postgres_url: str) -> None:
    role = f"doctor_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password'")
    await execute(postgres_url, "REVOKE ALL ON SCHEMA public FROM public")
    url = make_url(postgres_url).set(username=role, password="password").render_as_string(hide_password=False)
    # The tables are there, and this role does not see them.
    await migrated(postgres_url)
    found = await looked(url)
    assert verdicts(found, Verdict.FAIL) == {"schema", "grants"}
    assert "no schema of its search path" in found["schema"].found
    assert "GRANT USAGE" in f"{found['schema'].remedy}"
    assert set(TABLES.split()) - {"schema", "grants"} <= verdicts(found, Verdict.SKIPPED)
    assert (await looked(url, schema="elsewhere"))["grants"].found == "the role may not make the schema elsewhere"

    await migrate.downgrade(postgres_url, revision="base")
    await execute(postgres_url, "DROP TABLE IF EXISTS mcp_session_version")
    await execute(postgres_url, f"GRANT USAGE ON SCHEMA public TO {role}")
    found = await looked(url)
    assert found["grants"].found == "the role may make no tables in the schema public"
    assert found["grants"].values["may_upgrade"] is False
    await execute(postgres_url, f"GRANT CREATE ON SCHEMA public TO {role}")
    assert (await looked(url))["grants"].values["may_upgrade"] is True


async def test_a_role_without_room_for_a_connection_is_said_to_have_none(postgres_url: str) -> None:
    role = f"doctor_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password' CONNECTION LIMIT 0")
    url = make_url(postgres_url).set(username=role, password="password").render_as_string(hide_password=False)
    first, *_ = [finding async for finding in examine(url, timeout=3)]
    assert first.verdict is Verdict.FAIL
    assert "too many connections for role" in first.found


async def test_an_empty_sqlite_file_lacks_a_schema_alone(sqlite_url: str) -> None:
    Path(str(make_url(sqlite_url).database)).touch()
    found = await looked(sqlite_url)
    assert verdicts(found, Verdict.FAIL) == {"schema"}
    assert {found[check].found for check in ("sessions", "events", "rows", "instances")} == {
        "not looked at: the schema does not fit"
    }


async def test_a_limit_of_connections_and_an_option_that_is_not_needed(postgres_url: str) -> None:
    await migrated(postgres_url)
    role = f"doctor_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password' CONNECTION LIMIT 4")
    url = make_url(postgres_url).set(username=role, password="password", query={"pgbouncer": "true"})
    found = await looked(url.render_as_string(hide_password=False))
    assert found["connections"].values["of_role"] == 4
    assert found["connections"].values["free"] <= 3
    assert found["connections"].verdict is Verdict.WARN
    assert found["connections"].values["of_a_process"] == 6
    small = await looked(url.render_as_string(hide_password=False), pool_size=1)
    assert small["connections"].verdict is Verdict.OK
    assert found["pooler"].verdict is Verdict.WARN
    assert "remove pgbouncer=true" in f"{found['pooler'].remedy}"
    assert found["notifications"].values == {"arrive": None}


async def test_a_folder_that_is_not_writable_is_a_failure(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrated(sqlite_url)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, _mode, **_: str(path) != str(tmp_path))
    found = await looked(sqlite_url)
    assert found["file"].verdict is Verdict.FAIL
    assert str(tmp_path) in f"{found['file'].remedy}"
    # To look at it, reading is enough.
    assert not verdicts(found, Verdict.SKIPPED)


async def test_a_role_in_read_only_transactions_fails_with_the_setting_to_turn_off(postgres_url: str) -> None:
    async with limited(postgres_url, limit=20) as url:
        role = make_url(url).username
        await execute(postgres_url, f"ALTER ROLE {role} SET default_transaction_read_only = on")
        found = await looked(url)
        assert verdicts(found, Verdict.FAIL) == {"server"}
        assert "turn default_transaction_read_only off" in f"{found['server'].remedy}"
        async with SqlSessionStore(url) as store:
            with pytest.raises(StoreUnavailable, match=r"name the primary, .*turn default_transaction_read_only off"):
                await store.create(new_session())
        await execute(postgres_url, f"ALTER ROLE {role} RESET default_transaction_read_only")
        await execute(postgres_url, f"ALTER ROLE {role} SET statement_timeout = '1ms'")
        first = next(iter((await looked(url)).values()))
        assert "longer statement_timeout, as by options=" in f"{first.remedy}"
