"""namespaces: which there are, with the numbers of their sessions."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING

from tests.support.rows import insert_rows, session_row

if TYPE_CHECKING:
    from tests.support.commands import InvokeFunction

HOUR = timedelta(hours=1)


def test_each_namespace_has_a_line_with_its_numbers(invoke: InvokeFunction, database_url: str) -> None:
    rows = [session_row(namespace="one") for _ in range(3)]
    rows += [session_row(namespace="one", expires=None), session_row(namespace="one", expires=-HOUR)]
    rows += [session_row(namespace="two\x1b[31m", opened=5 * HOUR, ended=HOUR)]
    asyncio.run(insert_rows(database_url, rows))
    environment = {"MCP_SESSION_STORE_URL": database_url}
    done = invoke("namespaces", environment=environment)
    assert done.exit_code == 0, done.stderr
    header, one, two = done.stdout.splitlines()
    assert header.split() == ["NAMESPACE", "LIVE", "EXPIRED", "ENDED", "LAST", "SEEN"]
    assert one.split()[:4] == ["one", "4", "1", "0"]
    assert two.split()[:4] == ["two[31m", "0", "0", "1"]
    assert two.endswith(" ago")
    document = json.loads(invoke("namespaces", "--json", environment=environment).stdout)
    assert [(row["namespace"], row["live"], row["ended"]) for row in document["namespaces"]] == [
        ("one", 4, 0),
        ("two\x1b[31m", 0, 1),
    ]
    assert document["as_of"] >= document["namespaces"][1]["last_seen_at"]


def test_a_database_without_sessions_has_no_namespaces(invoke: InvokeFunction, sqlite_url: str) -> None:
    invoke("upgrade", "--url", sqlite_url)
    done = invoke("namespaces", "--url", sqlite_url)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no namespace has sessions\n")
