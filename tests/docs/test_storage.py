"""The table in docs/security.md of what clients can store: its numbers are those of the code."""

from __future__ import annotations

from datetime import timedelta

from mcp_session_store import EventPolicy, InstanceSettings, RetentionPolicy
from mcp_session_store.adapter.relay.outbox import MAX_POSTED_BYTES, WINDOW
from mcp_session_store.adapter.replay.journal import MAX_PARAMS, MAX_SUBJECT
from mcp_session_store.mailbox import SILENT_AFTER
from mcp_session_store.records import DISPLAY_LENGTH
from mcp_session_store.store import MAX_JOURNAL_ENTRIES
from tests.support.pages import section_of

TABLE = section_of("security.md", "## What clients can store")
KIB = 1024
ROW = 3 * KIB


def test_the_page_says_what_clients_can_store() -> None:
    policy, events, settings = RetentionPolicy(), EventPolicy(), InstanceSettings()
    rows = dict(line.strip("| ").split(" | ", 1) for line in TABLE.splitlines() if line.startswith("| "))
    # A character takes four bytes at most; the rest are the columns of fixed size, and the names of instances.
    assert 3 * 4 * DISPLAY_LENGTH < ROW - 0.6 * KIB
    assert f"of {DISPLAY_LENGTH} characters" in rows["a row of a session, live or ended"]
    params = settings.max_initialize_params
    assert rows["`initialize` params of a live session"].endswith(f"{params // KIB} KiB")
    journal = MAX_JOURNAL_ENTRIES * (MAX_PARAMS + MAX_SUBJECT)
    assert rows["journal of a live session"] == (
        f"{MAX_JOURNAL_ENTRIES:,} calls, each with {MAX_PARAMS // KIB} KiB of params and {MAX_SUBJECT / KIB:.1f} KiB "
        f"of subject | {journal / KIB**2:.1f} MiB; as a rule nothing"
    )
    of_events = rows["events of a live session, with `events`"]
    assert of_events.endswith(f"{events.max_bytes_per_session // KIB**2} MiB")
    messages = rows["messages of a live session that wait for another process"]
    assert messages.startswith(f"{MAX_POSTED_BYTES // KIB**2} MiB in a minute by way of each process")
    assert WINDOW == 60
    assert timedelta(minutes=5) == SILENT_AFTER
    assert policy.anonymous is not None
    strangers = policy.anonymous * (ROW + params)
    assert rows["all sessions without a principal"].endswith(
        f"{strangers / 1e9:.0f} GB; {policy.anonymous * params / 1e9:.0f} GB of it params"
    )
    assert policy.per_principal is None
