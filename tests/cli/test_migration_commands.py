"""upgrade, downgrade, current, check: outputs and exit codes, on both databases."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.version import HEAD
from tests.support.commands import UNREACHABLE, run_printed
from tests.support.postgres import execute
from tests.support.rows import insert_rows, session_row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.commands import CommandFunction, InvokeFunction, TerminalFunction
    from tests.support.postgres import PostgresServer


def test_a_database_goes_up_is_checked_and_goes_down_again(command: CommandFunction, database_url: str) -> None:
    def run(*arguments: str) -> str:
        done = command(*arguments, "--url", database_url)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    upgraded = run("upgrade")
    assert upgraded == f"the schema is at {run('current')}"
    assert run("check") == "the schema fits"
    asyncio.run(insert_rows(database_url, [session_row(), session_row(namespace="one")]))
    asked = command("downgrade", "base", "--url", database_url)
    assert asked.returncode == 2
    assert "mcp_session, mcp_session_journal, mcp_session_state, mcp_session_log" in asked.stderr
    assert "would be removed, with 2 sessions; the table mcp_session_version, and the " in asked.stderr
    assert "--yes" in asked.stderr
    assert run("check") == "the schema fits"
    assert run("downgrade", "1_0002_retention", "--yes") == "the schema is at 1_0002_retention"
    assert run("downgrade", "base", "--yes") == "the schema is removed"
    assert run("current") == "none"
    assert run("downgrade", "base") == "the schema is removed"


@pytest.mark.parametrize(("typed", "code", "revision"), [("n\n", 1, HEAD), ("y\n", 0, "none")])
def test_a_terminal_is_asked_before_tables_are_removed(
    terminal: TerminalFunction, invoke: InvokeFunction, sqlite_url: str, typed: str, code: int, revision: str
) -> None:
    invoke("upgrade", "--url", sqlite_url)
    found, output = terminal("downgrade", "base", "--url", sqlite_url, typed=typed)
    assert found == code, output
    assert "the table mcp_session_version, and the file, would stay" in output
    assert "Remove them for good?" in output
    assert invoke("current", "--url", sqlite_url).stdout == f"{revision}\n"


def test_a_check_of_an_empty_database_fails_and_names_the_command(command: CommandFunction, postgres_url: str) -> None:
    done = command("check", "--url", postgres_url)
    assert done.returncode == 1
    assert "mcp-session-store upgrade" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_option_can_come_from_the_environment(invoke: InvokeFunction, postgres_url: str) -> None:
    execute(postgres_url, "CREATE SCHEMA tenant")
    environment = {"MCP_SESSION_STORE_URL": postgres_url, "MCP_SESSION_STORE_SCHEMA": "tenant"}
    assert invoke("upgrade", environment=environment).exit_code == 0
    assert invoke("check", environment=environment).exit_code == 0
    assert invoke("current", "--url", postgres_url).stdout.strip() == "none"


def test_upgrade_sql_prints_what_would_run_and_touches_no_database(invoke: InvokeFunction) -> None:
    done = invoke("upgrade", "--sql", "--url", UNREACHABLE)
    assert done.exit_code == 0, done.stderr
    assert "CREATE TABLE" in done.stdout
    assert "mcp_session" in done.stdout


@pytest.mark.parametrize("arguments", [["upgrade"], ["downgrade", "base"], ["current"], ["check"]])
def test_a_database_that_cannot_be_reached_is_a_failure_that_does_not_tell_the_password(
    invoke: InvokeFunction, arguments: list[str]
) -> None:
    done = invoke(*arguments, "--url", UNREACHABLE)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "s3cret" not in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check"], "MCP_SESSION_STORE_URL"),
        (["check", "--url", "no url at all"], "postgresql://"),
        (["upgrade", "--url", "mysql://host/sessions"], "mysql"),
        (["upgrade", "--url", "sqlite:///unused.db", "--from", "base"], "--sql"),
        (["upgrade", "no-such-revision", "--url", "sqlite:///{tmp_path}/x.db"], "no-such-revision"),
        (["downgrade", "--url", "sqlite:///unused.db"], "REVISION"),
    ],
)
def test_wrong_usage_is_told_from_failure_by_its_exit_code(
    invoke: InvokeFunction, tmp_path: Path, arguments: list[str], named: str
) -> None:
    done = invoke(*(argument.replace("{tmp_path}", str(tmp_path)) for argument in arguments))
    assert done.exit_code == 2, done.stderr
    assert named in done.stderr


def test_the_help_tells_the_exit_codes_and_the_environment_variables(invoke: InvokeFunction) -> None:
    assert "Exit codes" in invoke("--help").stdout
    assert "MCP_SESSION_STORE_URL" in invoke("upgrade", "--help").stdout


def test_a_check_waits_for_the_database_and_for_its_migration(
    invoke: InvokeFunction, stoppable_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stoppable_postgres.database() as url:
        stoppable_postgres.stop()
        steps = iter([stoppable_postgres.start, lambda: asyncio.run(migrate.upgrade(url)), lambda: None])

        async def next_step(_seconds: float) -> None:
            await asyncio.to_thread(next(steps))

        monkeypatch.setattr("asyncio.sleep", next_step)
        result = invoke("check", "--wait", "60", "--url", url)
        assert result.exit_code == 0
        assert result.stdout == "the schema fits\n"
        away, missing = result.stderr.splitlines()
        assert away.startswith("waiting: the database postgresql://")
        assert "Connect call failed" in away
        assert missing.startswith("waiting: the database holds no tables")
        wrong = make_url(url).set(password="wrong").render_as_string(hide_password=False)
        result = invoke("check", "--wait", "1m", "--url", wrong)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch("Error: .*refuses the user or the password.*\n", result.stderr)


def test_a_check_waits_for_a_file_that_is_not_there_yet(
    invoke: InvokeFunction, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = iter([(tmp_path / "sessions.db").touch, lambda: asyncio.run(migrate.upgrade(sqlite_url))])

    async def next_step(_seconds: float) -> None:
        await asyncio.to_thread(next(steps))

    monkeypatch.setattr("asyncio.sleep", next_step)
    result = invoke("check", "--wait", "60", "--url", sqlite_url)
    assert (result.exit_code, result.stdout) == (0, "the schema fits\n")
    absent, missing = result.stderr.splitlines()
    assert absent.startswith("waiting: there is no file '/")
    assert missing.startswith("waiting: the database holds no tables")
    # Waiting helps neither where the folder is missing nor where an option forbids to write.
    for wrong in (f"sqlite:///{tmp_path}/missing/s.db", "sqlite:///s.db?mode=ro"):
        result = invoke("check", "--wait", "60", "--url", wrong)
        assert result.exit_code in (1, 2)
        assert result.stderr.startswith("Error: ")


def test_a_check_that_waits_in_vain_says_what_for(invoke: InvokeFunction) -> None:
    result = invoke("check", "--wait", "3", "--url", UNREACHABLE)
    assert result.exit_code == 1
    waiting, error = result.stderr.splitlines()
    assert waiting.removeprefix("waiting: ") == error.removeprefix("Error: ")
    assert invoke("check", "--wait", "soon", "--url", UNREACHABLE).exit_code == 2


def test_a_check_of_the_rows_finds_those_that_cannot_be_read(command: CommandFunction, database_url: str) -> None:
    good, bad = session_row(), session_row(initialize_params='["s3cret"]', namespace="one")
    asyncio.run(insert_rows(database_url, [good, bad, session_row(ended=timedelta(hours=1))]))
    done = command("check", "--rows", "--url", database_url)
    assert done.returncode == 1
    header, line = done.stdout.splitlines()
    assert header.split()[:4] == ["TABLE", "KEY", "NAMESPACE", "STATE"]
    assert line.split() == ["mcp_session", str(bad["key"]), "one", "live", "initialize_params"]
    assert f"run: mcp-session-store sessions end {bad['key']} --namespace one --url" in done.stderr
    as_json = command("check", "--rows", "--json", "--url", database_url)
    assert as_json.returncode == 1
    (row,) = json.loads(as_json.stdout)["unreadable"]
    assert (row["key"], row["columns"]) == (str(bad["key"]), ["initialize_params"])
    assert "s3cret" not in done.stdout + done.stderr + as_json.stdout + as_json.stderr
    # What it says to do helps.
    ended = run_printed(done.stderr, password=make_url(database_url).password)
    assert ended.returncode == 0, ended.stderr
    done = command("check", "--rows", "--url", database_url)
    assert (done.returncode, done.stdout) == (0, "the schema fits, and all rows can be read\n")


def test_a_timeout_that_cannot_be_is_refused_by_name(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="timeout='5'"):
        asyncio.run(migrate.check(sqlite_url, timeout="5"))  # type: ignore[arg-type]


def test_a_silent_host_is_reported_within_the_timeout(invoke: InvokeFunction) -> None:
    # The kernel takes connections, and nothing answers: as behind a firewall that drops what comes.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/database"
        began = time.monotonic()
        done = invoke("check", "--timeout", "0.5", "--url", url)
        took = time.monotonic() - began
    assert done.exit_code == 1
    assert "/database cannot serve now: TimeoutError: it did not answer in time" in done.output
    assert took < 30
