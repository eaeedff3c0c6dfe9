"""A search for stored rows that cannot be read, which requests, sweeps and lists pass over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.admin.reader import Reader
from mcp_session_store.sql.admin.session_list import readable
from mcp_session_store.sql.dialects.functions import MOMENT, Bounded, driver_value
from mcp_session_store.sql.schema.tables import instances_table, journal_table, logs_table, sessions_table
from mcp_session_store.sql.sessions.decoding import unreadable_columns
from mcp_session_store.store import read_params

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["RowCheck", "UnreadableRow"]

_ROWS: Final = 500
"""Rows that are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnreadableRow:
    """A row that cannot be read; what it holds is not told."""

    table: str
    key: UUID | None
    """Key of the session; `None` where the row has none that can be read."""
    namespace: str | None
    """Namespace of the session, if the row has one that can be read."""
    columns: Sequence[str]
    """Columns that cannot be read."""
    live: bool
    """Whether it is a session that has not ended."""


class RowCheck(Reader):
    """Search through the rows of all namespaces, but for the events, whose readers see a gap. See `Reader`."""

    def __init__(
        self, url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, timeout: float = OPERATOR_TIMEOUT
    ) -> None:
        super().__init__(url_or_engine, schema=schema, timeout=timeout)

    async def unreadable(self) -> list[UnreadableRow]:
        """Return the rows that cannot be read."""
        schema = self.database.schema
        tables = [table(schema) for table in (sessions_table, journal_table, logs_table, instances_table)]

        async def read(connection: AsyncConnection, now: datetime) -> list[UnreadableRow]:  # noqa: ARG001
            return [row for table in tables async for row in self._unreadable(connection, table)]

        return await self.read(read)

    async def _unreadable(self, connection: AsyncConnection, table: sa.Table) -> AsyncIterator[UnreadableRow]:
        dialect = self.database.dialect
        columns = list(table.columns)
        moments = [column for column in columns if column.type is MOMENT]
        within = [sa.or_(column.is_(None), column == Bounded(column)) for column in moments]
        shown = [
            driver_value(Bounded(column).label(column.name) if column in moments else column) for column in columns
        ]
        async with connection.stream(sa.select(*shown, *within)) as rows:
            async for part in rows.partitions(_ROWS):
                for values in part:
                    row = dict(zip(table.columns.keys(), values, strict=False))
                    unreadable = unreadable_columns(dialect, columns, values[: len(columns)])
                    are_within = zip(moments, values[len(columns) :], strict=True)
                    unreadable += [column.name for column, is_within in are_within if not is_within]
                    if (params := _params_column(row)) is not None and params not in unreadable:
                        unreadable += _unless_params(params, row[params], optional=params == "params")
                    if unreadable:
                        yield UnreadableRow(
                            table=table.name,
                            key=dialect.key(row.get("key")),
                            namespace=readable(row.get("namespace")) or None,
                            columns=unreadable,
                            live="initialize_params" in row and row["ended_at"] is None,
                        )


def _params_column(row: dict[str, Any]) -> str | None:
    """Return the column with the JSON that a restore replays; `None` for a row without one, as a tombstone."""
    if "initialize_params" in row:
        return "initialize_params" if row["ended_at"] is None else None
    return "params" if "params" in row else None


def _unless_params(name: str, text: object, *, optional: bool) -> list[str]:
    try:
        params = read_params(text)
    except ValueError:
        return [name]
    return [] if params is not None or optional else [name]
