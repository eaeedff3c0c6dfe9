"""Statements that are compiled once, and then run by the driver itself."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from mcp_session_store.sql.dialects.private_names import parameter_names

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["Rows", "Statement", "Steps"]

_T = TypeVar("_T")


class Statement:
    """A statement that runs very often, precompiled for the driver.

    The driver runs it itself, because SQLAlchemy's part would take longer than the database's.

    Args:
        expression: The statement.
        dialect: SQLAlchemy's dialect with the driver.
    """

    def __init__(self, expression: sa.Executable, dialect: sa.Dialect) -> None:
        compilable: Any = expression
        compiled = compilable.compile(dialect=dialect)
        self.text: Final = str(compiled)
        self._names: Final = parameter_names(compiled)
        self._constants: Final[dict[str, object]] = {
            name: value for name, value in compiled.params.items() if value is not None
        }

    def arguments(self, parameters: dict[str, object]) -> list[object]:
        """Return the driver's positional arguments for named parameters."""
        given = self._constants | parameters if self._constants else parameters
        return [given[name] for name in self._names]


Rows: TypeAlias = Sequence[Sequence[Any]]
Steps: TypeAlias = Generator[tuple[Statement, dict[str, object] | Sequence[tuple[object, ...]]], Rows, _T]
"""Statements to run one after the other: each is yielded with its parameters, and its rows are sent back.

A statement with a list of tuples runs for each of them, with its values in the order of the statement's parameters, and
no rows are sent back. Only SQLite's driver does that well.
"""
