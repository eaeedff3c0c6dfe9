"""Commands that messages print do, as they stand there, what the message says: for the same database and no other."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store import SqlSessionStore, migrations
from mcp_session_store.errors import ConfigurationError, SchemaAhead, SchemaBehind, SchemaMissing
from mcp_session_store.sql.engine import checked_url, shown_command
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from tests.support import postgres
from tests.support.commands import run_printed
from tests.support.databases import execute

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.commands import InvokeFunction

SCHEMA = "It's mine"


def _odd_file(folder: Path) -> str:
    folder = folder / 'it\'s "mine" & $HOME'
    folder.mkdir()
    return f"sqlite:///{folder}/s d.db"


def test_the_command_for_a_schema_that_is_missing_or_behind(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing on the way says more than the message.
    monkeypatch.delenv("PGPASSWORD", raising=False)
    url = f"{postgres_url.replace('+asyncpg', '')}?application_name=a+b%26c&options=-cwork_mem%3D5MB&pgbouncer=false"
    password = make_url(url).password

    async def open_store() -> None:
        store = SqlSessionStore(url, schema=SCHEMA)
        try:
            await store.open()
        finally:
            await store.aclose()

    with pytest.raises(SchemaMissing) as missing:
        asyncio.run(open_store())
    done = run_printed(str(missing.value), password=password)
    assert (done.returncode, done.stdout) == (0, f"the schema is at {HEAD}\n"), done.stderr
    asyncio.run(open_store())
    asyncio.run(migrate.downgrade(url, schema=SCHEMA, revision="1_0005_event_compression"))
    with pytest.raises(SchemaBehind) as behind:
        asyncio.run(migrations.check(url, schema=SCHEMA))
    assert run_printed(str(behind.value), password=password).returncode == 0
    asyncio.run(migrations.check(url, schema=SCHEMA))
    with pytest.raises(SchemaMissing):
        asyncio.run(migrations.check(url))


def test_the_command_for_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: InvokeFunction
) -> None:
    url = _odd_file(tmp_path)
    done = invoke("sessions", "list", "--url", url)
    assert done.exit_code == 2
    assert run_printed(done.stderr).returncode == 0
    assert invoke("check", "--url", url).exit_code == 0
    # A relative path, from another folder than that of the message.
    monkeypatch.chdir(tmp_path)
    done = invoke("current", "--url", "sqlite:///relative.db")
    monkeypatch.undo()
    assert run_printed(done.stderr).returncode == 0
    assert (tmp_path / "relative.db").exists()


def test_the_command_for_a_revision_that_is_not_known(sqlite_url: str) -> None:
    asyncio.run(migrations.upgrade(sqlite_url))
    with pytest.raises(ConfigurationError) as unknown:
        asyncio.run(migrate.upgrade(sqlite_url, revision="1_9999_none"))
    assert run_printed(str(unknown.value)).stdout == f"{HEAD}\n"
    asyncio.run(execute(sqlite_url, "UPDATE mcp_session_version SET version_num = '2_0001_new'"))
    with pytest.raises(SchemaAhead) as ahead:
        asyncio.run(migrations.check(sqlite_url))
    # With this version it says why it cannot; with the newer one it would go back.
    done = run_printed(str(ahead.value))
    assert done.returncode == 2
    assert "2_0001_new" in done.stderr


def test_the_commands_for_partitions(postgres_url: str, invoke: InvokeFunction) -> None:
    password = make_url(postgres_url).password
    options = ("--url", postgres_url, "--schema", SCHEMA)
    assert invoke("upgrade", *options).exit_code == 0
    done = invoke("events", "maintain", *options)
    assert run_printed(done.stderr, password=password).stdout == "the events are partitioned\n"
    for arguments in (
        ("events", "partition", "--every", "30m"),
        ("downgrade", "base", "--yes"),
    ):
        done = invoke(*arguments, *options)
        assert done.exit_code == 2
        assert run_printed(done.stderr, password=password).stdout == "the events are one table again\n"
        assert invoke("events", "partition", "--every", "1h", *options).exit_code == 0


@pytest.mark.parametrize("name", ["a/b #c?d%e 100%25 'f'", "app:5432", "x@y", "ä,ö;=&+"])
def test_the_command_for_a_database_with_an_odd_name(postgres_url: str, name: str, invoke: InvokeFunction) -> None:
    name = f"{secrets.token_hex(4)}{name}"
    quoted = '"' + name + '"'
    postgres.execute(postgres_url, f"CREATE DATABASE {quoted} TEMPLATE template0")
    try:
        # As a provider's console gives it.
        url = f"{postgres_url.rpartition('/')[0]}/{quote(name, safe='')}"
        missing = invoke("check", "--url", url)
        assert missing.exit_code == 1
        done = run_printed(missing.stderr, password=make_url(postgres_url).password)
        assert done.returncode == 0, done.stderr
        assert invoke("check", "--url", url).stdout == "the schema fits\n"
    finally:
        postgres.execute(postgres_url, f"DROP DATABASE {quoted} WITH (FORCE)")


def test_a_role_that_may_not_upgrade_gets_the_command_for_one_that_may(
    postgres_url: str, invoke: InvokeFunction
) -> None:
    owner, role = (f"{name}_{secrets.token_hex(6)}" for name in ("owner", "role"))
    place = make_url(postgres_url)
    for name in (owner, role):
        postgres.execute(postgres_url, f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    postgres.execute(postgres_url, f"GRANT CREATE ON DATABASE {place.database} TO {owner}")
    postgres.execute(postgres_url, f"CREATE SCHEMA app AUTHORIZATION {owner}; GRANT USAGE ON SCHEMA app TO {role}")
    url = place.set(username=role, password="secret").render_as_string(hide_password=False)
    commands = (("check",), ("sweep",), ("namespaces",), ("sessions", "list"), ("doctor",))

    def answers(*options: str) -> list[str]:
        texts = []
        for command in commands:
            done = invoke(*command, "--url", url, *options)
            assert done.exit_code == 1
            lines = [line for line in done.output.splitlines() if "run: mcp-session-store upgrade" in line]
            assert len(lines) == 1, done.output
            texts += lines
        return texts

    for schema, grant in (("app", "USAGE, CREATE ON SCHEMA app"), ("other", f"CREATE ON DATABASE {place.database}")):
        barred = invoke("upgrade", "--url", url, "--schema", schema)
        assert barred.exit_code == 1
        assert "cannot be upgraded: the role may " in barred.stderr
        assert barred.stderr.endswith(f"; take another role, or GRANT {grant} TO {role}\n")
    for text in answers("--schema", "app"):
        assert "the role may make no tables in the schema app; take another role, or " in text
        assert f"GRANT USAGE, CREATE ON SCHEMA app TO {role}" in text
    done = run_printed(text, password="secret", user=owner)
    assert done.returncode == 0, done.stderr
    postgres.execute(postgres_url, f"GRANT SELECT ON ALL TABLES IN SCHEMA app TO {role}")
    postgres.execute(postgres_url, "UPDATE app.mcp_session_version SET version_num = '1_0005_event_compression'")
    for text in answers("--schema", "app"):
        assert f"to upgrade is up to {owner}, the owner of the tables; take the role {owner}: with" in text
    assert f"; take the role {owner}\n" in invoke("upgrade", "--url", url, "--schema", "app").stderr
    for text in answers("--schema", "other"):
        assert "the role may not make the schema other; take another role, or GRANT CREATE ON DATABASE" in text
    postgres.execute(postgres_url, f"ALTER ROLE {role} SET search_path = nowhere, nothere")
    for command in commands:
        hidden = invoke(*command, "--url", url)
        assert hidden.exit_code == 1
        assert "no schema of the role's search path exists" in hidden.output
        assert "run: mcp-session-store upgrade" not in hidden.output


def test_what_the_environment_has_to_give_is_said() -> None:
    url, _ = checked_url("postgresql://app%3Ax:secret@h:5433/d")
    assert shown_command("sweep", url, "s", namespace="a b") == (
        "with the user in PGUSER and the password in PGPASSWORD, run: mcp-session-store sweep --namespace 'a b' "
        "--url postgresql://h:5433/d --schema s"
    )
    url, _ = checked_url("postgresql://app@h/d")
    assert shown_command("sweep", url, None) == "run: mcp-session-store sweep --url postgresql://app@h/d"
