"""sweep: to the end, to a signal, or only to tell; on a terminal and in a pipe, on both databases."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.sql.admin.sessions import SessionDirectory, SessionFilter, SessionState
from mcp_session_store.testing import new_session
from tests.support.commands import COMMAND, CONTROL
from tests.support.databases import age_instance, migrated
from tests.support.rows import insert_events, insert_rows, log_rows, session_row
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.commands import CommandFunction, InvokeFunction, TerminalFunction

HOUR = timedelta(hours=1)


def _seed(url: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    asyncio.run(insert_rows(url, rows))
    return {"MCP_SESSION_STORE_URL": url}


def _rows() -> list[dict[str, Any]]:
    return [
        *(session_row() for _ in range(3)),
        *(session_row(expires=-HOUR) for _ in range(25)),
        *(session_row(ended=48 * HOUR) for _ in range(12)),
        *(session_row(ended=HOUR) for _ in range(2)),
    ]


async def _count(url: str, state: SessionState) -> int:
    async with SessionDirectory(url) as directory:
        return await directory.count(SessionFilter(state=state))


def _counts(url: str) -> list[int]:
    return [asyncio.run(_count(url, state)) for state in SessionState]


def test_a_sweep_goes_on_until_there_is_no_more_and_reports_what_went(
    command: CommandFunction, database_url: str
) -> None:
    environment = _seed(database_url, _rows())
    dry = command("sweep", "--dry-run", environment=environment)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout == "25 expired sessions would end, 12 that ended long ago would be removed for good\n"
    assert _counts(database_url) == [3, 25, 14]
    done = command("sweep", "--limit-per-step", "10", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "25 expired sessions ended, 12 that ended long ago were removed for good\n"
    assert _counts(database_url) == [3, 0, 27]
    again = command("sweep", "--json", environment=environment)
    nothing = {"dry_run": False, "expired": 0, "purged": 0, "events": 0, "messages": 0, "values": 0}
    nothing |= {"state": 0, "more": False}
    assert json.loads(again.stdout) == nothing


def test_messages_to_instances_that_are_gone_are_swept(invoke: InvokeFunction, database_url: str) -> None:
    async def leave() -> None:
        await migrated(database_url)
        async with SqlSessionStore(database_url) as store, SqlMailbox(store) as mailbox:
            await mailbox.beat(Presence(instance="host:1:00000001", number=7))
            key = (await store.create(new_session())).key
            await mailbox.post(
                [
                    NewMessage(recipient=7, sender=8, sequence=1, key=key, kind=MessageKind.ANSWER, body="{}"),
                    NewMessage(recipient=7, sender=8, sequence=2, key=key, kind=MessageKind.ANSWER, body="{}"),
                ]
            )
            await age_instance(mailbox, "host:1:00000001", timedelta(days=2))

    asyncio.run(leave())
    environment = {"MCP_SESSION_STORE_URL": database_url}
    done = invoke("sweep", environment=environment)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["2 messages to instances that do not read were removed"]
    assert json.loads(invoke("sweep", "--json", environment=environment).stdout)["messages"] == 0


def test_a_terminal_gets_a_bar_where_there_is_work(terminal: TerminalFunction, database_url: str) -> None:
    code, output = terminal("sweep", "--limit-per-step", "5", environment=_seed(database_url, _rows()))
    assert code == 0, output
    plain = CONTROL.sub("", output)
    assert "sweeping" in plain
    assert "#" * 30 in plain
    assert "37/37" in plain
    assert "25 expired sessions ended, 12 that ended long ago were removed for good" in plain
    code, output = terminal("sweep", environment={"MCP_SESSION_STORE_URL": database_url})
    assert (code, output) == (0, "0 expired sessions ended, 0 that ended long ago were removed for good\n")


@pytest.mark.parametrize("how", ["options", "environment"])
def test_the_policy_comes_from_options_and_from_the_environment(
    command: CommandFunction, database_url: str, how: str
) -> None:
    rows = [session_row(opened=2 * HOUR, expires=None), session_row(opened=HOUR / 4, expires=None)]
    rows += [session_row(ended=48 * HOUR)]
    environment = _seed(database_url, rows)
    options = ["--absolute", "1h", "--tombstone", "7d"]
    if how == "environment":
        environment |= {"MCP_SESSION_STORE_ABSOLUTE": "1h", "MCP_SESSION_STORE_TOMBSTONE": "7d"}
        options = []
    done = command("sweep", "--json", *options, environment=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["expired"], report["purged"]) == (1, 0)


@pytest.mark.parametrize("how", ["nothing", "options", "environment"])
def test_events_that_are_too_old_are_swept_by_the_policy(command: CommandFunction, database_url: str, how: str) -> None:
    asyncio.run(insert_events(database_url, [log_rows([7 * HOUR, 5 * HOUR, HOUR / 4]) for _ in range(120)]))
    environment = {"MCP_SESSION_STORE_URL": database_url}
    options = ["--events-max-age", "6h"] if how == "options" else []
    if how == "environment":
        environment["MCP_SESSION_STORE_EVENTS_MAX_AGE"] = "6h"
    removed = 240 if how == "nothing" else 120
    dry = command("sweep", "--dry-run", *options, environment=environment)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.splitlines()[1:] == [f"{removed} old events would be removed"]
    done = command("sweep", *options, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [f"{removed} old events were removed"]
    again = command("sweep", "--json", *options, environment=environment)
    assert json.loads(again.stdout)["events"] == 0
    stats = json.loads(command("events", "stats", "--json", environment=environment).stdout)
    assert (stats["sessions"], stats["events"]) == (120, 360 - removed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_sweep_between_two_steps_and_what_was_done_is_reported(
    database_url: str, number: signal.Signals, code: int
) -> None:
    rows = 5000
    environment = _seed(database_url, [session_row(expires=-HOUR) for _ in range(rows)])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MCP_SESSION_STORE_")}
    process = subprocess.Popen(
        [*COMMAND, "sweep", "--limit-per-step", "1", "--json"],
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while asyncio.run(_count(database_url, SessionState.ENDED)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    report = json.loads(output)
    assert report["more"] is True
    assert 3 <= report["expired"] < rows
    assert _counts(database_url) == [0, rows - report["expired"], report["expired"]]


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--idle", "5"], {}, "--idle (MCP_SESSION_STORE_IDLE)"),
        ([], {"MCP_SESSION_STORE_ABSOLUTE": "soon"}, "--absolute (MCP_SESSION_STORE_ABSOLUTE)"),
        (["--tombstone", "-1h"], {}, "--tombstone"),
        (["--idle", "9999999999999999999w"], {}, "--idle"),
        (["--per-principal", "0"], {}, "--per-principal (MCP_SESSION_STORE_PER_PRINCIPAL)"),
        (["--per-principal", "1", "--per-principal-excess", "explode"], {}, "--per-principal-excess"),
        (["--per-principal-excess", "refuse"], {}, "--per-principal (MCP_SESSION_STORE_PER_PRINCIPAL)"),
        (["--anonymous", "many"], {}, "--anonymous"),
        (["--events-max-age", "5"], {}, "--events-max-age (MCP_SESSION_STORE_EVENTS_MAX_AGE)"),
        ([], {"MCP_SESSION_STORE_EVENTS_MAX_EVENTS_PER_SESSION": "many"}, "--events-max-events-per-session"),
        (["--events-max-bytes-per-session", "1"], {}, "--events-max-bytes-per-session"),
        (["--limit-per-step", "0"], {}, "--limit-per-step"),
        (["--url", "sqlite:///no-such-file.db"], {}, "no file"),
    ],
)
def test_nonsense_is_refused_by_name(
    invoke: InvokeFunction, sqlite_url: str, arguments: list[str], environment: dict[str, str], named: str
) -> None:
    done = invoke("sweep", *arguments, environment=_seed(sqlite_url, []) | environment)
    assert done.exit_code == 2, done.output
    assert named in done.stderr


def test_a_folder_that_is_missing_is_a_failure(invoke: InvokeFunction) -> None:
    done = invoke("sweep", "--url", "sqlite:///no/such/file.db")
    assert done.exit_code == 1
    assert "there is no folder" in done.stderr


def test_a_database_that_cannot_be_reached_is_a_failure(invoke: InvokeFunction) -> None:
    done = invoke("sweep", "--url", "postgresql://somebody:s3cret@127.0.0.1:1/sessions")
    assert done.exit_code == 1
    assert "s3cret" not in done.output
