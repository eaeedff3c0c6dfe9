"""Rows that are copied from one database to another: read one by one, and written in chunks of bounded size."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import MOMENT
from mcp_session_store.sql.schema.tables import make_tables, sessions_table
from mcp_session_store.sql.sessions.decoding import unreadable_columns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["belonging_to_sessions", "beyond", "chunks", "decoded", "stored", "streamed"]

_CHUNK_ROWS: Final = 500
_CHUNK_BYTES: Final = 1024**2
"""Rows, and bytes of their texts, that one insertion takes."""
_BUFFERED: Final = 50
"""Rows that are read ahead at most."""


def belonging_to_sessions(schema: str | None) -> Sequence[sa.Table]:
    """Return the tables whose rows live and die with a session: the journal, and its state."""
    sessions = sessions_table(schema)
    tables = make_tables(schema).sorted_tables
    return [table for table in tables if any(fk.column.table is sessions for fk in table.foreign_keys)]


def beyond(key: sa.Column[Any], after: Any) -> sa.ColumnElement[bool]:
    """Return the condition that a key follows another one, as the driver has it: it may be none that can be read."""
    return sa.type_coerce(key, sa.types.NullType()) > sa.literal(after, sa.types.NullType())


def stored(dialect: Dialect, value: Any) -> Any:
    """Return a value as a database has it that it is written to: its times may be coarser."""
    return dialect.moments([dialect.driver_moment(value)])[0] if isinstance(value, datetime) else value


def decoded(dialect: Dialect, table: sa.Table, row: Sequence[Any]) -> dict[str, Any] | None:
    """Return the values of a row by the names of their columns; `None` for a row that cannot be read.

    Args:
        dialect: The database's dialect.
        table: The table.
        row: Its row, as the driver returned it.
    """
    columns = list(table.c)
    pairs = list(zip(columns, row, strict=True))
    if unreadable_columns(dialect, columns, row) or not all(_fits(column, value) for column, value in pairs):
        return None
    return {column.name: _value(dialect, column, value) for column, value in pairs}


def _fits(column: sa.Column[Any], value: Any) -> bool:
    """Return whether each database can hold a value: in Postgres a text has no NUL, and an integer 32 bits."""
    if isinstance(value, str):
        return "\0" not in value
    return type(column.type) is not sa.Integer or value is None or -(2**31) <= value < 2**31


def _value(dialect: Dialect, column: sa.Column[Any], value: Any) -> Any:
    if column.type is MOMENT:
        return dialect.moments([value])[0]
    return dialect.key(value) if isinstance(column.type, sa.Uuid) else value


async def streamed(
    connection: AsyncConnection, statement: sa.Select[Any], table: sa.Table, dialect: Dialect
) -> AsyncIterator[dict[str, Any]]:
    """Yield the rows of a table that a statement selects, but for those that cannot be read.

    Args:
        connection: Connection, within a transaction.
        statement: Selects all columns as the driver returns them.
        table: The table.
        dialect: The database's dialect.
    """
    async with connection.stream(statement.execution_options(max_row_buffer=_BUFFERED)) as rows:
        async for row in rows:
            if (values := decoded(dialect, table, row)) is not None:
                yield values


async def chunks(
    rows: AsyncIterator[dict[str, Any]] | list[dict[str, Any]],
) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
    """Yield rows together, as many as one insertion takes."""
    chunk: list[dict[str, Any]] = []
    size = 0
    async for values in _each(rows):
        chunk.append(values)
        size += sum(len(value) for value in values.values() if isinstance(value, str))
        if len(chunk) == _CHUNK_ROWS or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


async def _each(rows: AsyncIterator[dict[str, Any]] | list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    if isinstance(rows, list):
        for values in rows:
            yield values
    else:
        async for values in rows:
            yield values
