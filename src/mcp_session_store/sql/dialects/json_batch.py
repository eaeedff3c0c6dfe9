"""Batches of SQLite: rows that travel as one JSON text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa
from typing_extensions import override

from mcp_session_store.sql.dialects.dialect import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.sql.base import ReadOnlyColumnCollection
    from sqlalchemy.sql.type_api import TypeEngine

__all__ = ["JsonBatch"]


_MAY_BE_NUL: Final = "\\u0000"
"""A NUL in JSON, and part of the JSON of a text that holds JSON with a NUL."""


def _json_value(value: object) -> str:
    if isinstance(value, UUID):
        return value.hex  # as sa.Uuid stores it where there is no such type
    raise TypeError(f"{type(value).__name__} cannot be part of a batch")


_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_json_value).encode


class JsonBatch(Batch):
    """One JSON text: an array with an array for each row."""

    def __init__(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> None:
        self._name = name
        each = sa.func.json_each(sa.bindparam(name, type_=sa.Text)).table_valued("value")
        values = [
            sa.type_coerce(sa.func.json_extract(each.c.value, sa.literal_column(f"'$[{position}]'")), type_).label(
                column
            )
            for position, (column, type_) in enumerate(columns.items())
        ]
        # With a limit, which is none here, SQLite reads the text once and before the table that it is joined with. Else
        # it reads all of the table first where it has statistics from a time when that had few rows.
        self.rows = sa.select(*values).limit(sa.literal_column("-1", sa.Integer)).subquery(name)

    @override
    def in_batch(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        return column.in_(sa.select(self.rows.c[column.name]))

    @override
    def joined_on(self, column: sa.Column[Any], rows: sa.FromClause | None = None) -> sa.ColumnElement[bool]:
        # With `in_batch` beside it SQLite reads the table first, and all of the batch for each row of the table.
        columns = self.c if rows is None else rows.c
        condition: sa.ColumnElement[bool] = column == columns[column.name]
        return condition

    @override
    def matching(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        return sa.select(*self.c).where(look_up(self.c).exists())

    @override
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        # SQLite's JSON functions end a text at a NUL. Postgres refuses such a text.
        # Not escaped to ASCII, so that a lone surrogate is found here, and does not reach the database.
        text = _encode(rows)
        if _MAY_BE_NUL in text and any("\0" in value for row in rows for value in row if isinstance(value, str)):
            raise ValueError("a text holds a NUL character, which cannot be stored")
        return {self._name: text}
