"""events list, show, stats, and the layout in partitions: on a terminal, in a pipe, and when they are used wrongly."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.records import session_key
from tests.support.commands import CONTROL, UNREACHABLE
from tests.support.rows import insert_events, log_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.support.commands import CommandFunction, InvokeFunction, TerminalFunction

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)

MESSAGES = [
    None,
    '{"jsonrpc":"2.0","method":"notifications/\\u001b[31mprogress","params":{"secret":"\x9b31mé"}}',
    '{"jsonrpc":"2.0","id":7,"method":"roots/list"}',
    '{"jsonrpc":"2.0","id":"x","result":{}}',
    '["no message"]',
    '{"id": {}, "method": 5}',
]


def _seed(
    url: str,
    logs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]],
    *,
    beats: Mapping[str, timedelta] | None = None,
) -> dict[str, str]:
    """The environment for commands on a database with these logs."""
    asyncio.run(insert_events(url, logs, beats=beats))
    return {"MCP_SESSION_STORE_URL": url}


def _log_of_many_kinds(**options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    log, events = log_rows([3 * MINUTE] * len(MESSAGES), **options)
    for event, message in zip(events, MESSAGES, strict=True):
        event["message"] = message
    events[0]["kind"] = "priming"
    events[2]["kind"] = "request"
    events[3]["kind"] = "response"
    events[3]["stream"] = "[red]a stream\x1b[31m with a name that is long[/red]"
    return log, events


def test_a_pipe_gets_the_list_as_plain_aligned_text(command: CommandFunction, database_url: str) -> None:
    logs = [log_rows([5 * HOUR, HOUR], trimmed=3), log_rows([3 * MINUTE] * 1200, message='"' + "x" * 998 + '"')]
    done = command("events", "list", environment=_seed(database_url, [*logs, log_rows([HOUR], namespace="other")]))
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["KEY", "EVENTS", "BYTES", "FIRST", "LAST", "OLDEST"]
    assert [line.split(maxsplit=1) for line in lines] == [
        [str(logs[0][0]["key"]), lines[0].split(maxsplit=1)[1]],
        [str(logs[1][0]["key"]), lines[1].split(maxsplit=1)[1]],
    ]
    assert lines[0].split()[1:] == ["2", "4", "bytes", "4", "5", "5", "h", "ago"]
    assert lines[1].split()[1:] == ["1", "200", "1.2", "MB", "1", "1200", "3", "min", "ago"]
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize(("width", "shown"), [(60, 3), (80, 4), (120, 6)])
def test_a_terminal_gets_a_list_as_wide_as_it_is(
    terminal: TerminalFunction, database_url: str, width: int, shown: int
) -> None:
    environment = _seed(database_url, [log_rows([HOUR])])
    code, output = terminal("events", "list", environment=environment, width=width)
    assert code == 0, output
    header, *lines = CONTROL.sub("", output).splitlines()
    assert len(header.split()) == shown
    assert len(lines) == 1
    assert max(map(len, [header, *lines])) <= width


def test_pages_of_the_list_lead_to_one_another(command: CommandFunction, database_url: str) -> None:
    logs = [log_rows([n * HOUR]) for n in range(5, 0, -1)]
    environment = _seed(database_url, logs)
    expected = [str(log["key"]) for log, _ in logs]
    keys: list[str] = []
    more: list[str] = []
    for _ in range(3):
        done = command("events", "list", "--limit", "2", *more, environment=environment)
        keys += [line.split()[0] for line in done.stdout.splitlines()[1:]]
        more = done.stderr.strip().removeprefix("there are more: ").split()
    assert keys == expected
    assert more == []
    done = command("events", "list", "--all", "--limit", "2", environment=environment)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["KEY", *expected]
    done = command("events", "list", "--all", "--json", environment=environment)
    assert [json.loads(line)["key"] for line in done.stdout.splitlines()] == expected
    page = json.loads(command("events", "list", "--json", "--limit", "4", environment=environment).stdout)
    assert page["logs"][0] == {
        "key": expected[0],
        "namespace": "default",
        "events": 1,
        "bytes": 2,
        "first": 1,
        "last": 1,
        "oldest_at": page["logs"][0]["oldest_at"],
    }
    rest = command("events", "list", "--json", "--after", page["next"], environment=environment)
    assert [log["key"] for log in json.loads(rest.stdout)["logs"]] == expected[4:]


def test_a_list_of_nothing_says_so_beside_the_output(invoke: InvokeFunction, database_url: str) -> None:
    done = invoke("events", "list", environment=_seed(database_url, [log_rows([], trimmed=3)]))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no session in namespace default has events" in done.stderr


def test_the_events_of_a_session_are_shown_without_what_they_say(command: CommandFunction, database_url: str) -> None:
    session_id = uuid.uuid4().hex
    log, events = _log_of_many_kinds(key=session_key(session_id), trimmed=10)
    environment = _seed(database_url, [(log, events), log_rows([HOUR])])
    by_key = command("events", "show", str(log["key"]), environment=environment)
    by_id = command("events", "show", session_id, environment=environment)
    by_stdin = command("events", "show", "-", environment=environment, stdin=f"{session_id}\n")
    for done in (by_key, by_id, by_stdin):
        assert done.returncode == 0, done.stderr
        assert session_id not in done.stdout + done.stderr
        assert "\x1b" not in done.stdout
        assert "secret" not in done.stdout
        header, *lines = done.stdout.splitlines()
        assert header.split() == ["SEQUENCE", "STREAM", "POSITION", "KIND", "STORED", "BYTES", "ABOUT"]
        assert [line.split()[0] for line in lines] == [str(number) for number in range(11, 17)]
        assert lines[0].endswith("3 min ago     0 bytes")
        assert lines[1].endswith("notifications/[31mprogress")
        assert lines[2].endswith("roots/list id 7")
        assert lines[3].endswith("id x")
        assert "[red]a stream[31m with a name that is long[/red]" in lines[3]
        assert lines[4].endswith("14 bytes")
    document = json.loads(command("events", "show", session_id, "--json", environment=environment).stdout)
    assert "secret" not in str(document)
    assert document["log"]["events"] == 6
    assert document["next"] is None
    assert document["events"][2] == {
        "sequence": 13,
        "stream": "instance.1",
        "position": 3,
        "kind": "request",
        "created_at": document["events"][2]["created_at"],
        "bytes": len(MESSAGES[2] or ""),
        "method": "roots/list",
        "request_id": 7,
    }


def test_payloads_are_shown_when_asked_for_without_what_controls_a_terminal(
    command: CommandFunction, terminal: TerminalFunction, database_url: str
) -> None:
    log, events = _log_of_many_kinds()
    environment = _seed(database_url, [(log, events)])
    arguments = ("events", "show", str(log["key"]), "--payloads")
    shown = command(*arguments, environment=environment).stdout
    lines = shown.splitlines()
    assert len(lines) == 2 * len(events) - 1
    assert lines[0].startswith("1  stream instance.1, position 1, priming")
    assert '{"secret":"31mé"}' in shown
    assert "\x9b" not in shown
    assert "\x1b" not in shown
    code, output = terminal(*arguments, environment=environment, width=60)
    assert code == 0
    assert "\x1b[31m" not in output
    assert '"secret":"31mé"' in CONTROL.sub("", output).replace("\n", "")
    done = command(*arguments, "--json", "--all", environment=environment)
    assert done.stdout.isascii()
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == MESSAGES


def test_pages_of_events_lead_to_one_another(command: CommandFunction, database_url: str) -> None:
    log, events = log_rows([MINUTE] * 7, trimmed=5)
    for event in events[::3]:
        event["stream"] = "*"
    environment = _seed(database_url, [(log, events)])
    key = str(log["key"])
    found: list[str] = []
    more: list[str] = []
    for _ in range(3):
        done = command("events", "show", key, "--limit", "3", *more, environment=environment)
        found += [line.split()[0] for line in done.stdout.splitlines()[1:]]
        more = done.stderr.strip().removeprefix("there are more: ").split()
    assert found == [str(number) for number in range(6, 13)]
    done = command("events", "show", key, "--all", "--limit", "3", environment=environment)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["SEQUENCE", *found]
    page = json.loads(
        command("events", "show", key, "--stream", "*", "--json", "--limit", "2", environment=environment).stdout
    )
    assert [event["sequence"] for event in page["events"]] == [6, 9]
    assert page["next"] == 9
    done = command("events", "show", key, "--stream", "none", environment=environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no events like those" in done.stderr


def test_a_session_without_events_is_a_failure_that_names_its_key(invoke: InvokeFunction, database_url: str) -> None:
    environment = _seed(database_url, [stranger := log_rows([HOUR], namespace="other")])
    session_id = uuid.uuid4().hex
    for name, key in ((session_id, session_key(session_id)), (str(stranger[0]["key"]), stranger[0]["key"])):
        done = invoke("events", "show", name, environment=environment)
        assert done.exit_code == 1
        assert str(key) in done.stderr
        assert session_id not in done.output


def test_statistics_are_written_for_people_and_for_programs(
    command: CommandFunction, terminal: TerminalFunction, database_url: str
) -> None:
    logs = [log_rows([5 * HOUR] * 1200), log_rows([HOUR])]
    environment = _seed(database_url, logs, beats={"[b]host[/b]:12:abc": 3 * MINUTE})
    plain = command("events", "stats", environment=environment)
    assert plain.returncode == 0, plain.stderr
    assert "1 201 events of 2 sessions, 2.4 kB of messages, the oldest from 5 h ago" in plain.stdout
    assert "[b]host[/b]:12:abc" in plain.stdout
    assert "3 min ago" in plain.stdout
    assert "PARTITION" not in plain.stdout
    document = json.loads(command("events", "stats", "--json", environment=environment).stdout)
    assert (document["sessions"], document["events"], document["bytes"]) == (2, 1201, 2402)
    assert [one["instance"] for one in document["instances"]] == ["[b]host[/b]:12:abc"]
    assert document["partitions"] == []
    assert document["table_bytes"] > 0
    code, output = terminal("events", "stats", environment=environment, width=60)
    assert code == 0
    assert "LAST BEAT" in CONTROL.sub("", output)


def test_statistics_of_nothing_are_told(command: CommandFunction, database_url: str) -> None:
    done = command("events", "stats", environment=_seed(database_url, []))
    assert done.stdout.startswith("0 events of 0 sessions, 0 bytes of messages\n")


# In partitions


def test_events_are_partitioned_maintained_and_put_together_again(command: CommandFunction, postgres_url: str) -> None:
    log, events = log_rows([2 * HOUR, MINUTE])
    environment = _seed(postgres_url, [(log, events)])
    done = command("events", "partition", "--every", "30m", "--ahead", "1", environment=environment)
    assert (done.returncode, done.stdout) == (0, "the events are partitioned\n"), done.stderr
    again = command("events", "partition", "--every", "30m", environment=environment)
    assert (again.returncode, again.stdout) == (0, "the events were partitioned like that before\n")
    other = command("events", "partition", "--every", "1h", environment=environment)
    assert other.returncode == 2
    assert "mcp-session-store events unpartition" in other.stderr
    # Whatever the time is, between the two partitions may have begun the next.
    made = command("events", "maintain", environment=environment)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("made mcp_session_event_2")
    assert made.stderr == ""
    document = json.loads(command("events", "maintain", "--ahead", "5", "--json", environment=environment).stdout)
    assert len(document["created"]) >= 2
    assert (document["dropped"], document["astray"]) == ([], False)
    stats = command("events", "stats", environment=environment).stdout
    assert "mcp_session_event_first" in stats
    assert "mcp_session_event_default" in stats
    document = json.loads(command("events", "stats", "--json", environment=environment).stdout)
    assert document["partitions"][0]["name"] == "mcp_session_event_first"
    assert document["partitions"][0]["since"] is None
    shown = command("events", "show", str(log["key"]), environment=environment).stdout
    assert len(shown.splitlines()) == 3
    done = command("events", "unpartition", environment=environment)
    assert (done.returncode, done.stdout) == (0, "the events are one table again\n")
    assert command("events", "show", str(log["key"]), environment=environment).stdout == shown
    done = command("events", "unpartition", environment=environment)
    assert (done.returncode, done.stdout) == (0, "the events were not partitioned\n")
    done = command("events", "maintain", environment=environment)
    assert done.returncode == 2
    assert "mcp-session-store events partition" in done.stderr


def test_a_partitioned_database_names_the_command_to_run_before_a_downgrade(
    command: CommandFunction, postgres_url: str
) -> None:
    environment = _seed(postgres_url, [])
    assert command("events", "partition", "--every", "1h", environment=environment).returncode == 0
    refused = command("downgrade", "base", "--yes", environment=environment)
    assert refused.returncode == 2
    assert "mcp-session-store events unpartition" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments", [["partition", "--every", "1h"], ["maintain"], ["unpartition"]])
def test_partitions_are_refused_on_sqlite_with_the_reason(
    invoke: InvokeFunction, sqlite_url: str, tmp_path: Path, arguments: list[str]
) -> None:
    done = invoke("events", *arguments, "--url", sqlite_url)
    assert done.exit_code == 2
    assert "sqlite has no partitions" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["list", "--after", "nonsense"], "not a cursor"),
        (["list", "--limit", "0"], "--limit"),
        (["list", "--url", "sqlite:///{tmp_path}/typo.db"], "mcp-session-store upgrade"),
        (["show"], "ID_OR_KEY"),
        (["show", "a", "b"], "one session"),
        (["show", "naïve"], "neither a key nor a session id"),
        (["show", "a", "--after", "nonsense"], "--after"),
        (["show", "a", "--after", "-1"], "--after"),
        (["show", "a", "--after", "9" * 30], "--after"),
        (["stats", "--top", "0"], "--top"),
        (["partition"], "--every"),
        (["partition", "--every", "soon"], "--every"),
        (["maintain", "--ahead", "0"], "--ahead"),
    ],
)
def test_wrong_usage_is_told_by_name_with_the_remedy(
    invoke: InvokeFunction, sqlite_url: str, tmp_path: Path, arguments: list[str], named: str
) -> None:
    environment = _seed(sqlite_url, [])
    given = [argument.replace("{tmp_path}", str(tmp_path)) for argument in arguments]
    done = invoke("events", *given, environment=environment)
    assert done.exit_code == 2, done.output
    assert named in done.stderr
    assert not (tmp_path / "typo.db").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["partition", "--every", "1s"], "--every"),
        (["partition", "--every", "2h"], "--events-max-age"),
        (["partition", "--every", "1h", "--events-max-age", "none"], "--events-max-age"),
        (
            ["partition", "--every", "1h", "--events-max-age", "5"],
            "--events-max-age (MCP_SESSION_STORE_EVENTS_MAX_AGE)",
        ),
        (["maintain", "--events-max-age", "never"], "--events-max-age (MCP_SESSION_STORE_EVENTS_MAX_AGE)"),
    ],
)
def test_a_layout_that_cannot_be_is_told_by_the_names_of_the_options(
    invoke: InvokeFunction, arguments: list[str], named: str
) -> None:
    done = invoke("events", *arguments, "--url", UNREACHABLE)
    assert done.exit_code == 2, done.output
    assert named in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "abc"], ["stats"], ["partition", "--every", "1h"], ["maintain"], ["unpartition"]],
)
def test_a_database_that_cannot_be_reached_is_a_failure_that_does_not_tell_the_password(
    invoke: InvokeFunction, arguments: list[str]
) -> None:
    done = invoke("events", *arguments, "--url", UNREACHABLE)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "s3cret" not in done.output


@pytest.mark.parametrize("arguments", [["list"], ["stats"], ["partition", "--every", "1h"], ["maintain"]])
def test_a_database_that_was_not_migrated_names_the_command(
    invoke: InvokeFunction, postgres_url: str, arguments: list[str]
) -> None:
    done = invoke("events", *arguments, "--url", postgres_url)
    assert done.exit_code == 1
    assert "mcp-session-store upgrade" in done.stderr
