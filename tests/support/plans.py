"""The statements that a store sends, and how the database runs them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement, Executable

from tests.support.databases import engine_of, settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from sqlalchemy.sql.compiler import SQLCompiler

    from mcp_session_store.sql import SqlSessionStore
    from mcp_session_store.sql.dialects.compiled import Steps


async def plan_of(store: SqlSessionStore, statement: str, parameters: Sequence[Any]) -> str:
    """Return the plan of a statement: on Postgres both for its parameters and the generic one."""
    async with engine_of(store).connect() as connection:
        if connection.dialect.name == "sqlite":
            rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple(parameters))
            return "\n".join(row.detail for row in rows)
        rows = await connection.exec_driver_sql(f"EXPLAIN {statement}", tuple(parameters))
        plan = [row[0] for row in rows]
        if parameters:
            await connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
            await connection.exec_driver_sql(f"PREPARE explained AS {statement}")
            nulls = ", ".join("NULL" for _ in parameters)
            plan += [row[0] for row in await connection.exec_driver_sql(f"EXPLAIN EXECUTE explained({nulls})")]
            await connection.exec_driver_sql("DEALLOCATE explained")
            await connection.exec_driver_sql("RESET plan_cache_mode")
        return "\n".join(plan)


async def loops_of(store: SqlSessionStore, statement: str, parameters: Sequence[Any]) -> list[list[str]]:
    """Return the loops of a statement on SQLite: of each query of it those that are nested, the outermost first."""
    async with engine_of(store).connect() as connection:
        rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple(parameters))
        nested: dict[int, list[str]] = {}
        for row in rows:
            if row.detail.startswith(("SCAN", "SEARCH")):
                nested.setdefault(row.parent, []).append(row.detail)
        return list(nested.values())


async def statements_of(
    store: SqlSessionStore, use: Callable[[SqlSessionStore], Awaitable[None]]
) -> dict[str, Sequence[Any]]:
    """Return the statements that a store and the log on it send when they are used, with their parameters."""
    seen: dict[str, Sequence[Any]] = {}

    def remember(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "mcp_session" in statement:
            seen[statement] = parameters

    sync_engine = engine_of(store).sync_engine
    sa.event.listen(sync_engine, "before_cursor_execute", remember)
    with given_to_driver(store) as given:
        await use(store)
    sa.event.remove(sync_engine, "before_cursor_execute", remember)
    await settled(store)
    return seen | {text: parameters for text, parameters in given if "mcp_session" in text}


@contextmanager
def given_to_driver(store: SqlSessionStore) -> Iterator[list[tuple[str, Sequence[Any]]]]:
    """Note the statements that go to the driver without SQLAlchemy, with their parameters, those of the first row."""
    given: list[tuple[str, Sequence[Any]]] = []
    dialect = type(store.database.dialect)
    run = dialect.run

    def noting(steps: Steps[Any]) -> Steps[Any]:
        rows: Any = None
        while True:
            try:
                statement, parameters = steps.send(rows)
            except StopIteration as done:
                return done.value
            first = statement.arguments(parameters) if isinstance(parameters, dict) else parameters[0]
            given.append((statement.text, first))
            rows = yield statement, parameters

    def run_noting(self: Any, connection: Any, steps: Steps[Any], **options: bool) -> Awaitable[Any]:
        return run(self, connection, noting(steps), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialect, "run", run_noting)
        yield given


class Explain(Executable, ClauseElement):
    """A statement after the word that makes the database explain it."""

    inherit_cache = False

    def __init__(self, word: str, statement: sa.Select[Any]) -> None:
        self.word = word
        self.statement = statement


@compiles(Explain)
def _compile_explain(element: Explain, compiler: SQLCompiler, **options: Any) -> str:
    return f"{element.word} {compiler.process(element.statement, **options)}"
