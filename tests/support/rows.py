"""Rows of sessions and events of any age, expired or ended at any time, as no store would write them."""

from __future__ import annotations

import base64
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.sql.engine import checked_url, make_migration_engine
from mcp_session_store.sql.schema import migrate
from mcp_session_store.sql.schema.tables import events_table, instances_table, journal_table, logs_table, sessions_table
from tests.support.databases import migrated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mcp_session_store.records import Principal

ROWS_PER_STATEMENT = 1000


def session_row(
    *,
    opened: timedelta = timedelta(minutes=5),
    expires: timedelta | None = timedelta(days=1),
    ended: timedelta | None = None,
    principal: Principal | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A row of the table of sessions.

    Args:
        opened: How long ago.
        expires: How soon; negative for an expiry that has passed; `None` for never.
        ended: How long ago, if it has.
        principal: Owner of the session.
        **changes: Values of other columns.
    """
    now = datetime.now(UTC)
    row = {
        "key": uuid.UUID(int=(uuid.uuid4().int & ~(0xF << 76)) | 8 << 76),
        "namespace": "default",
        "initialize_params": "" if ended else '{"capabilities": {}}',
        "protocol_version": "2025-11-25",
        "client_name": "client",
        "client_version": "1.0",
        "principal_digest": None if principal is None else principal.digest.hex(),
        "principal_display": None if principal is None else principal.display,
        "instance_hint": "instance-a",
        "created_at": now - opened,
        "last_seen_at": now - opened,
        "expires_at": None if expires is None else now + expires,
        "ended_at": None if ended is None else now - ended,
        "end_reason": None if ended is None else "client",
        "restores": 0,
        "revision": 0,
    }
    return row | changes


def log_rows(
    ages: Sequence[timedelta],
    *,
    key: uuid.UUID | None = None,
    namespace: str = "default",
    trimmed: int = 0,
    message: str | None = "{}",
    **changes: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a session's log, and those of its events.

    Args:
        ages: How long ago each was stored, the oldest first.
        key: The session.
        namespace: Namespace of the session.
        trimmed: How many events there were before, each with a message of ten bytes.
        message: That of each event.
        **changes: Values of other columns of each event.
    """
    now = datetime.now(UTC)
    key = key or session_row()["key"]
    size = 0 if message is None else len(message.encode())
    events = [
        {
            "key": key,
            "sequence": trimmed + number,
            "stream": "instance.1",
            "position": number,
            "previous": number - 1,
            "kind": "notification",
            "message": message,
            "total_bytes": 10 * trimmed + size * number,
            "created_at": now - age,
        }
        | changes
        for number, age in enumerate(ages, 1)
    ]
    log = {
        "key": key,
        "namespace": namespace,
        "sequence": trimmed + len(ages),
        "total_bytes": 10 * trimmed + size * len(ages),
        "trimmed": trimmed,
        "trimmed_bytes": 10 * trimmed,
        "oldest_at": now - ages[0] if ages else None,
    }
    return log, events


async def insert_events(
    url: str,
    logs: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]],
    *,
    beats: Mapping[str, timedelta] | None = None,
    analyze: bool = False,
) -> None:
    """Migrate a database, and put logs into it.

    Args:
        url: The database.
        logs: As `log_rows` makes them.
        beats: The instances that run, with how long ago they were last heard of.
        analyze: Whether the planner is to know of them.
    """
    now = datetime.now(UTC)
    await migrated(url)
    instances = [
        {
            "name": instance.rpartition(":")[2],
            "instance": instance,
            "started_at": now - timedelta(days=1),
            "beat_at": now - ago,
        }
        for instance, ago in (beats or {}).items()
    ]
    of_tables = (
        (logs_table(), [log for log, _ in logs]),
        (events_table(), [event for _, events in logs for event in events]),
        (instances_table(), instances),
    )
    engine = make_migration_engine(*checked_url(url))
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("BEGIN")
            for table, rows in of_tables:
                for start in range(0, len(rows), ROWS_PER_STATEMENT):
                    await connection.execute(sa.insert(table), rows[start : start + ROWS_PER_STATEMENT])
            await connection.exec_driver_sql("COMMIT")
            if analyze:
                await connection.exec_driver_sql("ANALYZE")
    finally:
        await engine.dispose()


async def insert_rows(
    url: str,
    rows: Sequence[dict[str, Any]],
    journal: Sequence[dict[str, Any]] = (),
    *,
    analyze: bool = False,
    revision: str = "head",
) -> None:
    """Migrate a database, and put rows into its tables."""
    if revision == "head":
        await migrated(url)
    else:
        await migrate.upgrade(url, revision=revision)
    engine = make_migration_engine(*checked_url(url))
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("BEGIN")
            for start in range(0, len(rows), ROWS_PER_STATEMENT):
                await connection.execute(sa.insert(sessions_table()), rows[start : start + ROWS_PER_STATEMENT])
            if journal:
                await connection.execute(sa.insert(journal_table()), journal)
            await connection.exec_driver_sql("COMMIT")
            if analyze:
                await connection.exec_driver_sql("ANALYZE")
    finally:
        await engine.dispose()


def cursor_of(text: str) -> str:
    """Return a cursor with this text, as no list returns one."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
