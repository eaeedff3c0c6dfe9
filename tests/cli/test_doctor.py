"""`doctor`: a line for each look, what to do, and an exit code for scripts."""

from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING

from tests.support.commands import UNREACHABLE

if TYPE_CHECKING:
    import pytest

    from tests.support.commands import InvokeFunction


def test_a_database_that_is_well(database_url: str, invoke: InvokeFunction) -> None:
    environment = {"MCP_SESSION_STORE_URL": database_url, "MCP_SESSION_STORE_IDLE": "8h"}
    invoke("upgrade", environment=environment)
    result = invoke("doctor", environment=environment)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert lines[0].split()[:2] == ["ok", "connection"]
    assert "idle 8h" in lines[-1]

    document = json.loads(invoke("doctor", "--json", environment=environment).stdout)
    findings = {finding["check"]: finding for finding in document["findings"]}
    assert [line.split()[1] for line in lines] == list(findings)
    assert findings["schema"]["verdict"] == "ok"
    assert findings["sessions"]["values"]["live"] == 0
    assert findings["retention"]["values"]["idle"] == "8h"


def test_a_database_that_cannot_be_reached(invoke: InvokeFunction) -> None:
    for arguments in ((), ("--json",)):
        result = invoke("doctor", *arguments, "--url", UNREACHABLE)
        assert result.exit_code == 1
        assert "1 look" in result.stderr
        assert "s3cret" not in result.output
        if arguments:
            assert json.loads(result.stdout)["findings"][0]["verdict"] == "fail"
        else:
            first, *others = result.stdout.splitlines()
            assert first.startswith("fail    connection")
            assert sum("not looked at" in line for line in others) > 5


def test_what_to_do_stands_behind_what_is_there(sqlite_url: str, invoke: InvokeFunction) -> None:
    result = invoke("doctor", "--url", sqlite_url)
    assert result.exit_code == 1
    assert "To do: to make it, run: mcp-session-store upgrade --url sqlite:////" in result.stdout.splitlines()[0]


def test_an_argument_that_cannot_work_is_wrong_usage(invoke: InvokeFunction) -> None:
    result = invoke("doctor", "--url", "mongodb://host/db")
    assert result.exit_code == 2
    assert not result.stdout


def test_drivers_of_a_frozen_application_have_no_known_version(
    sqlite_url: str, invoke: InvokeFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", version)
    result = invoke("doctor", "--url", sqlite_url)
    assert "aiosqlite (version unknown), sqlalchemy (version unknown)" in result.stdout
