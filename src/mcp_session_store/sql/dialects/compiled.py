"""Statements that are compiled once, and then run by the driver itself."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from mcp_session_store.sql.dialects.private_names import parameter_names

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["Rows", "Statement", "Steps"]

_T = TypeVar("_T")


class Statement:
    """A statement that runs very often, compiled for the driver when it first runs.

    The driver runs it itself, because SQLAlchemy's part would take longer than the database's. A store has some fifty
    of them; to compile them all takes longer than the rest of its construction, and a command uses two or three.

    Args:
        expression: The statement.
        dialect: SQLAlchemy's dialect with the driver.
    """

    def __init__(self, expression: sa.Executable, dialect: sa.Dialect) -> None:
        self._expression = expression
        self._dialect = dialect

    @cached_property
    def text(self) -> str:
        """The statement in SQL."""
        return str(self._compiled)

    @cached_property
    def _compiled(self) -> sa.Compiled:
        compilable: Any = self._expression
        compiled: sa.Compiled = compilable.compile(dialect=self._dialect)
        return compiled

    @cached_property
    def _names(self) -> Sequence[str]:
        return parameter_names(self._compiled)

    @cached_property
    def _constants(self) -> dict[str, object]:
        return {name: value for name, value in self._compiled.params.items() if value is not None}

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
