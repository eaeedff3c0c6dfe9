"""instances: which are alive, and what each says of itself."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.records import session_key
from mcp_session_store.sql import SqlMailbox, SqlSessionStore
from mcp_session_store.testing import new_session
from tests.support.databases import age_instance, migrated

if TYPE_CHECKING:
    from tests.support.commands import InvokeFunction

BUSY = Presence(
    instance="host:1:00000001", number=7, server="ledger\x1b[31m", version="1.2.3", residents=1200, streams=3
)


async def fill(url: str) -> None:
    """Two instances of one namespace, one of which is silent, and one of another."""
    await migrated(url)
    async with SqlSessionStore(url) as store, SqlMailbox(store) as mailbox, SqlMailbox(url, namespace="other") as other:
        await mailbox.beat(Presence(instance="host:2:00000002", number=8, version="1.2.3"))
        await age_instance(mailbox, "host:2:00000002", timedelta(minutes=5))
        await mailbox.beat(BUSY)
        await other.beat(Presence(instance="host:3:00000003", version="1.2.3"))
        await store.create(new_session(key=session_key("session")))
        message = NewMessage(
            recipient=7, sender=8, sequence=1, key=session_key("session"), kind=MessageKind.ANSWER, body="{}"
        )
        await mailbox.post([message])


def test_each_instance_has_a_line_with_what_it_says(invoke: InvokeFunction, database_url: str) -> None:
    asyncio.run(fill(database_url))
    environment = {"MCP_SESSION_STORE_URL": database_url}
    done = invoke("instances", environment=environment)
    assert done.exit_code == 0, done.stderr
    header, silent, alive = done.stdout.splitlines()
    assert header.split()[:2] == ["INSTANCE", "STATE"]
    assert silent.split()[:5] == ["host:2:00000002", "silent", "5", "min", "ago"]
    words = alive.split()
    assert words[:2] == ["host:1:00000001", "alive"]
    assert words[4] == "ago"
    assert words[7:] == ["ledger[31m", "1.2.3", "7", "1", "200", "3", "1"]
    document = json.loads(invoke("instances", "--json", environment=environment).stdout)
    assert document["namespace"] == "default"
    one, two = document["instances"]
    assert (one["instance"], one["state"], one["sessions"]) == ("host:2:00000002", "silent", 0)
    assert one["heard_of_ago"] >= 300
    started_at = datetime.fromisoformat(two.pop("started_at"))
    assert abs(datetime.now(UTC) - started_at) < timedelta(minutes=2)
    assert two.pop("heard_of_ago") < 60
    assert two == {
        "instance": "host:1:00000001",
        "state": "alive",
        "server": "ledger\x1b[31m",
        "version": "1.2.3",
        "number": 7,
        "sessions": 1200,
        "streams": 3,
        "waiting": 1,
    }
    # An instance is silent after the time after which the servers take it for dead.
    environment["MCP_SESSION_STORE_INSTANCE_TIMEOUT"] = "3600"
    assert "silent" not in invoke("instances", environment=environment).stdout
    elsewhere = invoke("instances", "--namespace", "other", environment=environment)
    assert elsewhere.stdout.splitlines()[1].split()[0] == "host:3:00000003"


def test_a_namespace_without_servers_has_no_instances(invoke: InvokeFunction, sqlite_url: str) -> None:
    invoke("upgrade", "--url", sqlite_url)
    done = invoke("instances", "--url", sqlite_url)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "no instance serves the namespace 'default'\n"
