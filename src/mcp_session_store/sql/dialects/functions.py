"""SQL that Postgres and SQLite write differently: clocks, times, lengths and objects of texts, hints to planners."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from typing_extensions import override

if TYPE_CHECKING:
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.sql.type_api import TypeEngine

__all__ = [
    "EPOCH",
    "MOMENT",
    "ONE",
    "After",
    "ArrivalClock",
    "Bounded",
    "ByteLength",
    "TextsByName",
    "StoreClock",
    "Unindexed",
    "driver_value",
]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class _Milliseconds(sa.types.TypeDecorator[datetime]):
    """A moment as whole milliseconds since 1970, for a database without a type for moments."""

    impl = sa.BigInteger
    cache_ok = True

    @override
    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else (value - EPOCH) // timedelta(milliseconds=1)

    @override
    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        try:
            return None if value is None else EPOCH + timedelta(milliseconds=value)
        except (TypeError, OverflowError):
            return None  # one row that cannot be read must not keep all others out of the operators' lists


MOMENT: Final[TypeEngine[datetime]] = _Milliseconds().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
"""Type of a moment on the database's clock; an aware `datetime` in Python."""


def driver_value(column: sa.Column[Any] | sa.Label[Any]) -> sa.Label[Any]:
    """Return a column whose values are left as the driver returns them, because they may not be of its type."""
    return sa.type_coerce(column, sa.types.NullType()).label(column.name)


class StoreClock(FunctionElement[datetime]):
    """The present moment on the database's clock, plus a number of seconds."""

    type = MOMENT
    inherit_cache = True

    def __init__(self, plus: sa.ColumnElement[float] | float | None = None) -> None:
        if isinstance(plus, float):
            plus = sa.literal(plus, sa.Double)
        super().__init__(*(() if plus is None else (plus,)))


@compiles(StoreClock, "postgresql")
def _postgres_clock(element: StoreClock, compiler: SQLCompiler, **options: Any) -> str:
    # Not now(), which is the moment at which the transaction began.
    if not element.clauses.clauses:
        return "clock_timestamp()"
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(StoreClock, "sqlite")
def _sqlite_clock(element: StoreClock, compiler: SQLCompiler, **options: Any) -> str:
    # unixepoch('subsec') needs SQLite 3.42. 2440587.5 is the Julian day of 1970-01-01.
    clock = "(julianday('now') - 2440587.5) * 86400000.0 + 0.5"
    if element.clauses.clauses:
        clock = f"{clock} + 1000.0 * {compiler.process(element.clauses, **options)}"
    return f"CAST({clock} AS INTEGER)"


class ArrivalClock(StoreClock):
    """The moment at which the statement arrived, however long it has waited for locks since."""

    inherit_cache = True


@compiles(ArrivalClock, "postgresql")
def _postgres_arrival(element: ArrivalClock, compiler: SQLCompiler, **options: Any) -> str:
    return _postgres_clock(element, compiler, **options).replace("clock_timestamp()", "statement_timestamp()", 1)


class Unindexed(FunctionElement[Any]):
    """A column that must not be looked up in an index, because another column has found the row.

    Planners have no statistics of a new table, and on SQLite of no table, and then take one index for another.
    """

    inherit_cache = True

    def __init__(self, column: sa.Column[Any]) -> None:
        super().__init__(column)
        self.type = column.type


@compiles(Unindexed, "postgresql")
def _postgres_unindexed(element: Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    # Equal to the column, but the planner does not see that.
    column = compiler.process(element.clauses, **options)
    return f"greatest({column}, {column})"


@compiles(Unindexed, "sqlite")
def _sqlite_unindexed(element: Unindexed, compiler: SQLCompiler, **options: Any) -> str:
    # "The SQLite Query Optimizer Overview", 6.2: a unary plus takes a term away from the indexes.
    return f"+{compiler.process(element.clauses, **options)}"


ONE: Final = sa.literal_column("1", sa.Integer)
"""Limit of a query to its first row; not a parameter, whose value a planner does not know."""


class ByteLength(FunctionElement[int]):
    """The number of bytes of a text, encoded and not compressed."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(ByteLength, "postgresql")
def _postgres_byte_length(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(ByteLength, "sqlite")
def _sqlite_byte_length(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    # octet_length() needs SQLite 3.43.
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


class TextsByName(FunctionElement[str]):
    """One JSON object with texts by name, over the selected rows; NULL or an empty object without any."""

    type = sa.Text()
    inherit_cache = True

    def __init__(self, name: sa.Column[str], text: sa.Column[str]) -> None:
        super().__init__(name, text)


@compiles(TextsByName, "postgresql")
def _postgres_texts(element: TextsByName, compiler: SQLCompiler, **options: Any) -> str:
    return f"CAST(json_object_agg({compiler.process(element.clauses, **options)}) AS TEXT)"


@compiles(TextsByName, "sqlite")
def _sqlite_texts(element: TextsByName, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_group_object({compiler.process(element.clauses, **options)})"


class Bounded(FunctionElement[datetime]):
    """A stored moment; the first or the last one that Python has for an earlier or a later one, such as infinity."""

    type = MOMENT
    inherit_cache = True

    def __init__(self, column: sa.Column[Any]) -> None:
        super().__init__(column)


@compiles(Bounded, "postgresql")
def _postgres_bounded(element: Bounded, compiler: SQLCompiler, **options: Any) -> str:
    column = compiler.process(element.clauses, **options)
    # A day less, because a moment is shown in other time zones. Both functions ignore NULL.
    first, last = "TIMESTAMPTZ '0001-01-02 00:00+00'", "TIMESTAMPTZ '9999-12-30 00:00+00'"
    return f"CASE WHEN {column} IS NOT NULL THEN least(greatest({column}, {first}), {last}) END"


@compiles(Bounded, "sqlite")
def _sqlite_bounded(element: Bounded, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))  # each value is read by itself


class After(FunctionElement[datetime]):
    """A moment, plus a number of seconds."""

    type = MOMENT
    inherit_cache = True

    def __init__(self, moment: sa.ColumnElement[datetime], seconds: float) -> None:
        super().__init__(moment, sa.literal(seconds, sa.Double))


@compiles(After, "postgresql")
def _postgres_after(element: After, compiler: SQLCompiler, **options: Any) -> str:
    moment, seconds = (compiler.process(part, **options) for part in element.clauses)
    return f"({moment} + make_interval(secs => {seconds}))"


@compiles(After, "sqlite")
def _sqlite_after(element: After, compiler: SQLCompiler, **options: Any) -> str:
    moment, seconds = (compiler.process(part, **options) for part in element.clauses)
    return f"({moment} + CAST(1000.0 * {seconds} AS INTEGER))"
