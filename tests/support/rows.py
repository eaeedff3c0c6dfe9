"""Rows of sessions as no store would make them: of any age, expired or ended at any time."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.sql import migrate
from mcp_session_store.sql.engine import checked_url, make_migration_engine
from mcp_session_store.sql.tables import journal_table, sessions_table

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        principal: Whose it is.
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


async def insert_rows(
    url: str, rows: Sequence[dict[str, Any]], journal: Sequence[dict[str, Any]] = (), *, analyze: bool = False
) -> None:
    """Migrate a database, and put rows into its tables."""
    await migrate.upgrade(url)
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
