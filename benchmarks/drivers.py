"""Rows that the drivers alone insert into the simplest table, those that wait in one commit: about a log's limit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.sql.dialects.private_names import call_in_thread

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Sequence

    import aiosqlite

__all__ = ["Batches", "insert_on_postgres", "insert_on_sqlite"]

_ON_SQLITE: Final = "INSERT INTO event (stream, message, created_at) VALUES (?, ?, julianday('now'))"


class Batches:
    """Rows that arrive while others are inserted, and are inserted next, together.

    Args:
        insert: Inserts pairs of stream and message in one commit, and returns their ids.
    """

    def __init__(self, insert: Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[int]]]) -> None:
        self._insert = insert
        self._waiting: dict[asyncio.Future[int], tuple[str, str]] = {}
        self._task: asyncio.Task[None] | None = None

    async def store(self, stream: str, message: str) -> int:
        """Insert a row, and return its id."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[future] = stream, message
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            for future, stored in zip(batch, await self._insert(list(batch.values())), strict=True):
                future.set_result(stored)
            # Let those who were answered bring their next row.
            await asyncio.sleep(0)
        self._task = None


def insert_on_postgres(connection: Any, table: str) -> Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[int]]]:
    """Return the insertion of rows by one statement of asyncpg."""
    insertion = f"INSERT INTO {table} (stream, message) SELECT * FROM unnest($1::text[], $2::text[]) RETURNING id"

    async def insert(rows: Sequence[tuple[str, str]]) -> list[int]:
        streams, messages = zip(*rows, strict=True)
        return [stored for (stored,) in await connection.fetch(insertion, streams, messages)]

    return insert


def insert_on_sqlite(
    connection: aiosqlite.Connection,
) -> Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[int]]]:
    """Return the insertion of rows in one visit to the thread of a connection of aiosqlite in autocommit."""

    def insert_there(driver: sqlite3.Connection, rows: Sequence[tuple[str, str]]) -> range:
        driver.execute("BEGIN IMMEDIATE")
        driver.executemany(_ON_SQLITE, rows)
        ((last,),) = driver.execute("SELECT last_insert_rowid()").fetchall()
        driver.execute("COMMIT")
        return range(last - len(rows) + 1, last + 1)

    async def insert(rows: Sequence[tuple[str, str]]) -> Sequence[int]:
        return await call_in_thread(connection, insert_there, rows)

    return insert
