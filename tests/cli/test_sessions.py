"""sessions list, show, end, stats: on a terminal and in a pipe, on both databases, and when they are used wrongly."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store.records import EndReason, Principal, session_key
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.testing import new_session, new_state
from tests.support.commands import CONTROL, UNREACHABLE
from tests.support.rows import insert_rows, session_row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.commands import CommandFunction, InvokeFunction, TerminalFunction


HOUR = timedelta(hours=1)
SOMEBODY = Principal.of(client_id="client-id", issuer="https://issuer.example", subject="somebody")
NAME = "[red]a client with a name that is long[/red]"


def _seed(url: str, rows: Sequence[dict[str, Any]], journal: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """The environment for commands on a database with these rows."""
    asyncio.run(insert_rows(url, rows, journal))
    return {"MCP_SESSION_STORE_URL": url}


def _rows() -> list[dict[str, Any]]:
    return [
        session_row(opened=timedelta(minutes=3, seconds=5), client_name=NAME, principal=SOMEBODY),
        session_row(opened=5 * HOUR, instance_hint="web-1.example.org-1234-0a1b2c", expires=None),
        session_row(opened=9 * HOUR, expires=-HOUR),
        session_row(opened=9 * HOUR, ended=2 * HOUR),
    ]


def test_a_pipe_gets_plain_aligned_text_with_nothing_cut(command: CommandFunction, database_url: str) -> None:
    rows = _rows()
    done = command("sessions", "list", environment=_seed(database_url, rows))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["KEY", "CLIENT", "PRINCIPAL", "INSTANCE", "OPENED", "SEEN", "EXPIRES"]
    assert [line.split()[0] for line in lines] == [str(rows[0]["key"]), str(rows[1]["key"])]
    assert NAME in lines[0]
    assert SOMEBODY.display in lines[0]
    assert "3 min ago" in lines[0]
    assert "web-1.example.org-1234-0a1b2c" in lines[1]
    assert lines[1].endswith("5 h ago     5 h ago     never")
    assert {line.index(str(row["instance_hint"])) for line, row in zip(lines, rows, strict=False)} == {
        header.index("INSTANCE")
    }
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize(("width", "shown"), [(80, 4), (100, 6), (140, 7)])
def test_a_terminal_gets_a_table_as_wide_as_it_is(
    terminal: TerminalFunction, database_url: str, width: int, shown: int
) -> None:
    rows = _rows()
    code, output = terminal("sessions", "list", environment=_seed(database_url, rows), width=width)
    assert code == 0, output
    assert "\x1b[1m" in output
    header, *lines = CONTROL.sub("", output).splitlines()
    assert len(header.split()) == shown
    assert [line.split()[0] for line in lines] == [str(rows[0]["key"]), str(rows[1]["key"])]
    assert max(map(len, [header, *lines])) <= width
    assert lines[0].split()[1].startswith("[red]")


@pytest.mark.parametrize(("state", "position", "column"), [("expired", 2, "EXPIRED"), ("ended", 3, "ENDED")])
def test_sessions_that_are_live_no_more_are_listed_when_asked_for(
    command: CommandFunction, database_url: str, state: str, position: int, column: str
) -> None:
    rows = _rows()
    done = command("sessions", "list", "--state", state, environment=_seed(database_url, rows))
    header, line = done.stdout.splitlines()
    assert column in header
    assert line.startswith(str(rows[position]["key"]))
    assert ("client" in line.split()[-1]) == (state == "ended")


def test_pages_lead_to_one_another(command: CommandFunction, database_url: str) -> None:
    rows = [session_row(opened=n * HOUR) for n in range(5)]
    environment = _seed(database_url, rows)
    keys = []
    more: list[str] = []
    for _ in range(3):
        done = command("sessions", "list", "--limit", "2", *more, environment=environment)
        keys += [line.split()[0] for line in done.stdout.splitlines()[1:]]
        more = done.stderr.strip().removeprefix("there are more: ").split()
    assert keys == [str(row["key"]) for row in rows]
    assert more == []


def test_all_pages_come_one_after_the_other_in_one_table(command: CommandFunction, database_url: str) -> None:
    rows = [session_row(opened=n * HOUR) for n in range(5)]
    done = command("sessions", "list", "--all", "--limit", "2", environment=_seed(database_url, rows))
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["KEY", *(str(row["key"]) for row in rows)]
    assert len({line.index("instance-a") for line in lines[1:]}) == 1
    assert done.stderr == ""


def test_json_is_one_document_for_a_page_and_a_line_for_each_session_of_all(
    command: CommandFunction, database_url: str
) -> None:
    environment = _seed(database_url, rows := _rows())
    page = json.loads(command("sessions", "list", "--json", "--limit", "1", environment=environment).stdout)
    (session,) = page["sessions"]
    assert session["key"] == str(rows[0]["key"])
    assert session["client_name"] == NAME
    assert session["principal"] == {"digest": SOMEBODY.digest.hex(), "display": SOMEBODY.display}
    assert session["created_at"].endswith("+00:00")
    rest = command("sessions", "list", "--json", "--after", page["next"], environment=environment)
    assert [one["key"] for one in json.loads(rest.stdout)["sessions"]] == [str(rows[1]["key"])]
    assert json.loads(rest.stdout)["next"] is None
    lines = command("sessions", "list", "--json", "--all", environment=environment).stdout.splitlines()
    assert [json.loads(line)["key"] for line in lines] == [str(row["key"]) for row in rows[:2]]


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        (["--client", NAME], [0]),
        (["--principal", "client-id", "--issuer", "https://issuer.example", "--subject", "somebody"], [0]),
        (["--principal", SOMEBODY.digest.hex()], [0]),
        (["--principal", "client-id"], []),
        (["--no-principal"], [1]),
        (["--instance", "instance-a"], [0]),
        (["--older-than", "2h"], [1]),
        (["--newer-than", "2h"], [0]),
        (["--namespace", "other"], []),
    ],
)
def test_filters_choose_sessions(
    invoke: InvokeFunction, database_url: str, options: list[str], positions: list[int]
) -> None:
    rows = _rows()
    done = invoke("sessions", "list", "--json", *options, environment=_seed(database_url, rows))
    assert done.exit_code == 0, done.stderr
    listed = [session["key"] for session in json.loads(done.stdout)["sessions"]]
    assert listed == [str(rows[position]["key"]) for position in positions]


def test_a_list_of_nothing_says_so_beside_the_output(invoke: InvokeFunction, database_url: str) -> None:
    done = invoke("sessions", "list", "--client", "nobody", environment=_seed(database_url, []))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no live sessions" in done.stderr


def test_a_session_is_shown_by_its_key_and_by_its_id_which_is_not_repeated(
    command: CommandFunction, database_url: str
) -> None:
    session_id = uuid.uuid4().hex
    row = session_row(
        key=session_key(session_id),
        principal=SOMEBODY,
        initialize_params='{"secret": "\x9b31m é"}',
        stream_holder=7,
        stream_term=1,
        stream_opened_at=datetime.now(UTC) - 2 * HOUR,
    )
    journal = [
        {"key": row["key"], "method": "logging/setLevel", "subject": "", "params": '{"level": "debug"}', "revision": 1},
        {
            "key": row["key"],
            "method": "resources/subscribe",
            "subject": "file:///\x1b[31mred",
            "params": "{}",
            "revision": 2,
        },
    ]
    environment = _seed(database_url, [row], journal)
    by_key = command("sessions", "show", str(row["key"]), environment=environment)
    by_id = command("sessions", "show", session_id, environment=environment)
    by_stdin = command("sessions", "show", "-", environment=environment, stdin=f"{session_id}\n")
    for done in (by_key, by_id, by_stdin):
        assert done.returncode == 0, done.stderr
        assert session_id not in done.stdout + done.stderr
        assert str(row["key"]) in done.stdout
        assert SOMEBODY.digest.hex() in done.stdout
        assert re.search(r"stream +opened last on instance number 7, (2 h|120 min) ago", done.stdout)
        assert "logging/setLevel" in done.stdout
        assert "resources/subscribe file:///[31mred" in done.stdout
        assert "secret" not in done.stdout
        assert "level" not in done.stdout.replace("setLevel", "")
        assert "\x1b" not in done.stdout
    shown = command("sessions", "show", str(row["key"]), "--params", environment=environment).stdout
    assert '{"secret": "31m é"}' in shown
    assert '{"level": "debug"}' in shown
    assert "\x9b" not in shown
    document = json.loads(command("sessions", "show", session_id, "--json", environment=environment).stdout)
    assert "secret" not in str(document)
    assert document["stream_holder"] == 7
    assert [entry["method"] for entry in document["journal"]] == ["logging/setLevel", "resources/subscribe"]
    assert document["initialize_params_bytes"] == len(row["initialize_params"].encode())
    document = json.loads(command("sessions", "show", session_id, "--json", "--params", environment=environment).stdout)
    assert document["initialize_params"] == row["initialize_params"]


def test_the_state_of_a_session_is_shown_by_names_and_sizes(invoke: InvokeFunction, database_url: str) -> None:
    session = new_session(
        key=session_key("id"), state=(new_state("cart", '{"secret": 1}'), new_state("step", "2", ttl=3600.0))
    )

    async def create() -> None:
        async with SqlSessionStore(database_url) as store:
            await store.create(session)

    environment = _seed(database_url, [])
    asyncio.run(create())
    shown = invoke("sessions", "show", str(session.key), environment=environment).stdout
    assert re.search(r"values +2 of its state\n +cart 13 bytes\n +step 1 bytes, expires in 59 min", shown), shown
    assert "secret" not in shown
    shown = invoke("sessions", "show", str(session.key), "--values", environment=environment).stdout
    assert 'cart {"secret": 1}' in shown
    document = json.loads(invoke("sessions", "show", str(session.key), "--json", environment=environment).stdout)
    assert [(state["name"], state["value_bytes"]) for state in document["state"]] == [("cart", 13), ("step", 1)]
    assert "secret" not in str(document)
    assert "value" not in document["state"][0]
    statistics = json.loads(invoke("sessions", "stats", "--json", environment=environment).stdout)
    assert (statistics["state_values"], statistics["state_bytes"]) == (2, 22)
    stated = invoke("sessions", "stats", environment=environment).stdout
    assert "the state of live sessions has 2 values of 22 bytes in all" in stated


def test_a_terminal_shows_a_session_without_cutting_anything(terminal: TerminalFunction, database_url: str) -> None:
    row = session_row(client_name=NAME, principal=SOMEBODY, ended=HOUR)
    code, output = terminal("sessions", "show", str(row["key"]), environment=_seed(database_url, [row]), width=60)
    assert code == 0
    joined = CONTROL.sub("", output).replace("\n", "")
    for text in (str(row["key"]), NAME, SOMEBODY.display, SOMEBODY.digest.hex(), "1 h ago, by client"):
        assert text in joined


def test_a_session_that_is_not_there_is_a_failure_that_names_its_key(invoke: InvokeFunction, database_url: str) -> None:
    environment = _seed(database_url, [stranger := session_row(namespace="other")])
    session_id = uuid.uuid4().hex
    for name, key in ((session_id, session_key(session_id)), (str(stranger["key"]), stranger["key"])):
        done = invoke("sessions", "show", name, environment=environment)
        assert done.exit_code == 1
        assert str(key) in done.stderr
        assert session_id not in done.output


@pytest.mark.parametrize("write", [lambda key: key.hex, lambda key: f"{{{key}}}", lambda key: str(uuid.uuid4())])
def test_what_is_no_key_is_taken_for_a_session_id_and_finds_nothing(
    invoke: InvokeFunction, sqlite_url: str, write: Any
) -> None:
    row = session_row()
    name = write(row["key"])
    done = invoke("sessions", "show", name, environment=_seed(sqlite_url, [row]))
    assert done.exit_code == 1
    assert str(session_key(name)) in done.stderr


def test_a_shortened_key_stands_for_the_one_key_that_begins_with_it(invoke: InvokeFunction, database_url: str) -> None:
    like = "6f1e2d3c-0000-8000-8000-00000000000"
    rows = [session_row(key=uuid.UUID(f"{like}{digit}")) for digit in range(2)]
    rows += [session_row(key=uuid.UUID("7f1e2d3c-aaaa-8000-8000-000000000000"), ended=HOUR)]
    rows += [session_row(key=uuid.UUID("8f1e2d3c-aaaa-8000-8000-000000000000"), namespace="other")]
    environment = _seed(database_url, rows)
    for name in (
        "7f1e2d3c",
        "7f1e2d3c-",
        "7F1E2D3C-AAAA-8",
        "7f1e2d3caaaa",
        "7f1e2d3c…",
        "7f1e2d3c-aaaa-8000-8000-0000000",
    ):
        done = invoke("sessions", "show", name, environment=environment)
        assert done.exit_code == 0, done.stderr
        assert str(rows[2]["key"]) in done.stdout
    for command in (("show", "6f1e2d3c"), ("end", "7f1e2d3c", "6f1e"), ("end", "--dry-run", like)):
        done = invoke("sessions", *command, environment=environment)
        assert done.exit_code == 1
        assert f"keys {like}0, {like}1; write more of one" in done.stderr
    for name in ("8f1e2d3c", "0123456789abcdef0123456789abcde"):
        done = invoke("sessions", "show", name, environment=environment)
        assert done.exit_code == 1
        assert f"begins with {name[:8]};" in done.stderr
        assert str(session_key(name)) not in done.output
        assert name[9:] == "" or name[9:] not in done.output
    done = invoke("sessions", "end", f"{like}0", "6f1e2d3c-0000-8000-8000-00000000000-1", environment=environment)
    assert done.stdout == "1 session ended\n"
    done = invoke("events", "show", "7f1e2d3c", environment=environment)
    assert f"no events are stored for the key {rows[2]['key']}" in done.stderr


def test_sessions_that_are_named_end_for_the_reason_operator(command: CommandFunction, database_url: str) -> None:
    session_id = uuid.uuid4().hex
    rows = [session_row(key=session_key(session_id)), session_row(), session_row(expires=-HOUR)]
    environment = _seed(database_url, rows)
    dry = command("sessions", "end", "-", "--dry-run", environment=environment, stdin=session_id)
    assert (dry.returncode, dry.stdout) == (0, "1 session would end\n")
    keys = [str(row["key"]) for row in rows]
    done = command("sessions", "end", session_id, *keys[1:], environment=environment)
    assert done.returncode == 1
    assert done.stdout == "2 sessions ended\n"
    assert done.stderr == f"not live: {keys[2]}\n"
    again = command("sessions", "end", *keys, "--json", environment=environment)
    assert again.returncode == 1
    assert json.loads(again.stdout) == {"dry_run": False, "ended": 0, "not_live": keys}
    document = json.loads(command("sessions", "show", keys[0], "--json", environment=environment).stdout)
    assert document["end_reason"] == EndReason.OPERATOR
    assert document["initialize_params_bytes"] == 0
    assert session_id not in "".join(run.stdout + run.stderr for run in (dry, done, again))


def test_an_end_by_filter_ends_all_pages_of_it_and_nothing_else(command: CommandFunction, database_url: str) -> None:
    rows = [session_row(client_name="rogue") for _ in range(1203)] + [session_row() for _ in range(3)]
    environment = _seed(database_url, rows)
    arguments = ["sessions", "end", "--client", "rogue"]
    unasked = command(*arguments, environment=environment)
    assert unasked.returncode == 2
    assert "1 203 sessions" in unasked.stderr
    assert "--yes" in unasked.stderr
    assert command(*arguments, "--dry-run", environment=environment).stdout == "1 203 sessions would end\n"
    done = command(*arguments, "--yes", "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ended"] == 1203
    left = json.loads(command("sessions", "list", "--json", environment=environment).stdout)["sessions"]
    assert {session["key"] for session in left} == {str(row["key"]) for row in rows[-3:]}
    none = command(*arguments, "--yes", environment=environment)
    assert (none.returncode, none.stdout) == (0, "0 sessions ended\n")


@pytest.mark.parametrize(("typed", "code", "left"), [("n\n", 1, 2), ("y\n", 0, 0)])
def test_a_terminal_is_asked_before_many_end(
    terminal: TerminalFunction, command: CommandFunction, database_url: str, typed: str, code: int, left: int
) -> None:
    environment = _seed(database_url, [session_row(), session_row()])
    found, output = terminal("sessions", "end", "--all", environment=environment, typed=typed)
    assert found == code, output
    assert "End 2 live sessions in namespace default?" in output
    listed = json.loads(command("sessions", "list", "--json", environment=environment).stdout)
    assert len(listed["sessions"]) == left


@pytest.mark.anyio
async def test_a_store_learns_of_what_an_operator_ended(command: CommandFunction, database_url: str) -> None:
    row = session_row()
    await insert_rows(database_url, [row])
    async with SqlSessionStore(database_url) as store:
        since = (await store.changes(None)).until
        done = await asyncio.to_thread(command, "sessions", "end", str(row["key"]), "--url", database_url)
        assert done.returncode == 0, done.stderr
        changes = (await store.changes(since)).changes
        assert [(change.key, change.ended) for change in changes] == [(row["key"], EndReason.OPERATOR)]


def test_statistics_are_drawn_for_people_and_written_for_programs(
    command: CommandFunction, terminal: TerminalFunction, database_url: str
) -> None:
    environment = _seed(database_url, _rows())
    plain = command("sessions", "stats", environment=environment)
    assert plain.returncode == 0, plain.stderr
    assert "\x1b" not in plain.stdout
    lines = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in plain.stdout.splitlines() if line}
    assert (lines["live"], lines["expired, not yet swept"], lines["ended, still kept"]) == ("2", "1", "1")
    assert any(line.startswith("less than 10 min") and line.endswith("#" * 30) for line in plain.stdout.splitlines())
    assert NAME in plain.stdout
    assert "the next sweep would end 1 expired session, and remove 0" in plain.stdout
    document = json.loads(
        command("sessions", "stats", "--json", "--tombstone", "1h", "--top", "1", environment=environment).stdout
    )
    assert (document["live"], document["expired"], document["ended"]) == (2, 1, 1)
    assert document["next_sweep"] == {"expired": 1, "purged": 1}
    assert len(document["clients"]) == 1
    assert document["table_bytes"] > 0
    code, output = terminal("sessions", "stats", environment=environment, width=60)
    assert code == 0
    assert max(map(len, CONTROL.sub("", output).splitlines()[:20])) <= 60


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["list", "--state", "dead"], "'dead'"),
        (["list", "--after", "nonsense"], "not a cursor"),
        (["list", "--older-than", "2 moons"], "--older-than"),
        (["list", "--older-than", "none"], "--older-than"),
        (["list", "--older-than", "99999999999999999d"], "--older-than"),
        (["list", "--older-than", "2h", "--newer-than", "1h"], "exchange the two"),
        (["list", "--limit", "0"], "--limit"),
        (["list", "--timeout", "0"], "--timeout"),
        (["list", "--namespace", ""], "namespace"),
        (["list", "--subject", "x"], "--principal"),
        (["list", "--principal", "ab" * 32, "--subject", "x"], "--subject"),
        (["list", "--principal", "x", "--no-principal"], "--no-principal"),
        (["list", "--url", "mysql://host/sessions"], "mysql"),
        (["list", "--url", "sqlite:///{tmp_path}/typo.db"], "mcp-session-store upgrade"),
        (["list", "--url", "sqlite:///file:{tmp_path}/typo.db?uri=true"], "mcp-session-store upgrade"),
        (["show"], "ID_OR_KEY"),
        (["show", "a", "b"], "one session"),
        (["show", "x" * 129], "neither a key nor a session id"),
        (["show", "naïve"], "neither a key nor a session id"),
        (["end"], "--all"),
        (["end", "abc", "--all"], "one of the three"),
        (["end", "abc", "--client", "x"], "one of the three"),
        (["end", "--all", "--client", "x"], "one of the three"),
        (["stats", "--idle", "-1h"], "--idle"),
        (["stats", "--top", "0"], "--top"),
    ],
)
def test_wrong_usage_is_told_by_name_with_the_remedy(
    invoke: InvokeFunction, sqlite_url: str, tmp_path: Path, arguments: list[str], named: str
) -> None:
    environment = _seed(sqlite_url, [])
    given = [argument.replace("{tmp_path}", str(tmp_path)) for argument in arguments]
    done = invoke("sessions", *given, environment=environment)
    assert done.exit_code == 2, done.output
    assert named in done.stderr
    assert not (tmp_path / "typo.db").exists()


@pytest.mark.parametrize("arguments", [["list"], ["show", "abc"], ["end", "abc"], ["end", "--all"], ["stats"]])
def test_a_database_that_cannot_be_reached_is_a_failure_that_does_not_tell_the_password(
    invoke: InvokeFunction, arguments: list[str]
) -> None:
    done = invoke("sessions", *arguments, "--url", UNREACHABLE)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "s3cret" not in done.output


def test_a_database_that_was_not_migrated_names_the_command(invoke: InvokeFunction, postgres_url: str) -> None:
    done = invoke("sessions", "list", "--url", postgres_url)
    assert done.exit_code == 1
    assert "mcp-session-store upgrade" in done.stderr
