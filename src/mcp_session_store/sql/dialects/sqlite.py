"""SQLite, with the driver aiosqlite."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError
from typing_extensions import override

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.dialects.compiled import Statement
from mcp_session_store.sql.dialects.functions import EPOCH, StoreClock
from mcp_session_store.sql.dialects.json_batch import JsonBatch
from mcp_session_store.sql.dialects.lock_files import FileLocks
from mcp_session_store.sql.dialects.private_names import call_in_thread, check_aiosqlite, check_compiler
from mcp_session_store.sql.dialects.sqlite_engines import in_autocommit, joining
from mcp_session_store.sql.dialects.sqlite_failures import (
    file_of,
    is_busy,
    is_uri,
    kind_of_failure,
    misconfiguration,
    unusable_file,
)
from mcp_session_store.sql.dialects.watched_file import check_file_behind

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Awaitable, Mapping, MutableMapping, Sequence
    from contextlib import AbstractContextManager

    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.sql.dialects.compiled import Rows, Steps
    from mcp_session_store.sql.dialects.dialect import Batch, FailureKind

__all__ = ["Sqlite"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


_STEPS_BETWEEN_CHECKS: Final = 10_000

_URI: Final = "uri"
_OPTIONS: Final[Mapping[str, tuple[str, ...] | None]] = {
    _URI: ("true", "false"),
    "check_same_thread": ("true", "false"),
    "cached_statements": None,
}
"""Options of a URL for Python's driver, and the values that each may have; `None`: a number."""
_URI_OPTIONS: Final[Mapping[str, tuple[str, ...] | None]] = {
    "mode": ("rw", "rwc"),
    "cache": ("private", "shared"),
    "psow": ("0", "1"),
    "nolock": ("0", "1"),
    "vfs": (),
}
"""Options for SQLite itself, in a database name that is a URI ("Uniform Resource Identifiers" in its manual)."""


def _check_option(name: str, value: Any, *, is_uri: bool) -> None:
    if name == "timeout":
        raise ConfigurationError(
            "the database URL has the option timeout, which cannot be used; give the store a timeout in seconds, by "
            "timeout= or --timeout"
        )
    if name in _URI_OPTIONS and not is_uri:
        raise ConfigurationError(
            f"the database URL has the option {name}, which SQLite takes from a URI only; write "
            "sqlite:///file:path?uri=true, and the option after it"
        )
    known = {**_OPTIONS, **_URI_OPTIONS}
    if name not in known:
        raise ConfigurationError(
            f"the database URL has the option {name}, which cannot be used; remove it, or give an AsyncEngine that was "
            "made with connect_args"
        )
    values = known[name]
    if values is None and not (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10):
        raise ConfigurationError(f"{name}={value!r} in the database URL cannot be used; write a whole number")
    if values and value not in values:
        raise ConfigurationError(f"{name}={value!r} in the database URL cannot be used; write {' or '.join(values)}")


def _in_transaction(connection: sqlite3.Connection, steps: Steps[_T], *, info: MutableMapping[Any, Any]) -> _T:
    """Run steps that write in one transaction, in the thread in which the connection is used."""
    connection.execute(Sqlite.begin)
    try:
        result = _one_after_the_other(connection, steps)
        check_file_behind(info)
        connection.execute("COMMIT")
        return result
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _in_snapshot(connection: sqlite3.Connection, steps: Steps[_T]) -> _T:
    """Run steps that read in one transaction, so that all of them see the same state."""
    if connection.in_transaction:
        return _one_after_the_other(connection, steps)
    connection.execute("BEGIN")
    try:
        return _one_after_the_other(connection, steps)
    finally:
        connection.execute("ROLLBACK")


def _one_after_the_other(connection: sqlite3.Connection, steps: Steps[_T]) -> _T:
    # Set each time, because the connection may be of an engine that was given.
    text_factory, connection.text_factory = connection.text_factory, _decode
    try:
        statement, parameters = next(steps)
        while True:
            if isinstance(parameters, dict):
                rows: Rows = connection.execute(statement.text, statement.arguments(parameters)).fetchall()
            else:
                connection.executemany(statement.text, parameters)
                rows = ()
            statement, parameters = steps.send(rows)
    except StopIteration as done:
        result: _T = done.value
        return result
    finally:
        connection.text_factory = text_factory


_decode: Final = partial(str, encoding="utf-8", errors="surrogateescape")
"""Decodes a text that is not UTF-8, too, into one with lone surrogates, so that its row alone is refused.

`sqlite3` itself refuses all rows of the statement, and its message holds the text.
"""


def _sqlalchemy_dialect() -> sa.Dialect:
    dialect: Any = sqlite.aiosqlite.dialect
    made: sa.Dialect = dialect()
    return made


class Sqlite(FileLocks):
    name = "sqlite"
    driver = "aiosqlite"
    has_schemas = False
    single_writer = True
    # A statement runs in a thread, and goes on there when its caller gives it up. With a RETURNING clause it then keeps
    # the lock on the file until the garbage collector finds it, because its rows are not fetched.
    interruptible = False
    migrates_when_empty = True
    begin = "BEGIN IMMEDIATE"
    has_notifications = False
    changes_in_with = False
    has_partitions = False
    public_options = frozenset({*_OPTIONS, *_URI_OPTIONS, "immutable"})

    @override
    def check_libraries(self) -> None:
        check_compiler(_sqlalchemy_dialect())
        check_aiosqlite()

    @override
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        return JsonBatch(name, columns)

    @override
    def failure_kind(self, error: BaseException) -> FailureKind | None:
        return kind_of_failure(error)

    @override
    def misconfiguration(self, error: BaseException, url: URL) -> str | None:
        return misconfiguration(error, url)

    @override
    def unusable(self, url: URL, *, writes: bool) -> str | None:
        return unusable_file(url, writes=writes)

    @override
    async def missing_privileges(self, connection: AsyncConnection, needed: Mapping[sa.Table, str]) -> Sequence[str]:
        return ()

    @override
    def advice_on(self, error: BaseException) -> str | None:
        return None

    @override
    def precompiled(self, statement: sa.Executable) -> Statement:
        return Statement(statement, _sqlalchemy_dialect())

    @override
    def driver_key(self, key: UUID) -> object:
        return key.hex  # as sa.Uuid stores it where there is no such type

    @override
    def key(self, value: object) -> UUID | None:
        try:
            return UUID(hex=value) if isinstance(value, str) else None
        except ValueError:
            return None

    @override
    def driver_moment(self, moment: datetime) -> object:
        return (moment - EPOCH) // timedelta(milliseconds=1)

    @override
    def moments(self, values: Sequence[Any]) -> Sequence[Any]:
        return [None if value is None else EPOCH + timedelta(milliseconds=value) for value in values]

    @override
    def run(
        self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool, atomic: bool = False
    ) -> Awaitable[_T]:
        pooled: Any = connection.sync_connection
        if writes:
            in_transaction = partial(_in_transaction, info=pooled.connection.info)
            return call_in_thread(pooled.connection.driver_connection, in_transaction, steps)
        run_steps = _in_snapshot if atomic else _one_after_the_other
        return call_in_thread(pooled.connection.driver_connection, run_steps, steps)

    @override
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        # Without a WHERE the parser takes ON CONFLICT for a join condition (sqlite.org/lang_upsert.html, 2.2).
        return sqlite.insert(table).from_select(columns, rows.where(sa.true())).on_conflict_do_nothing()

    @override
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        return column.in_(selected)

    @override
    def delete_joined(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        # SQLite deletes from one table, without a join.
        key = table.primary_key.columns
        those = sa.select(*key).where(*conditions).correlate(None)
        return sa.delete(table).where(sa.tuple_(*key).in_(those))

    @override
    def unlocked(
        self,
        table: sa.Table,
        *conditions: sa.ColumnElement[bool],
        each: Batch | None = None,
        limit: sa.ColumnElement[int] | None = None,
    ) -> sa.ColumnElement[bool]:
        place = sa.literal_column(f"{table.name}.rowid", sa.BigInteger)
        those = sa.select(place).select_from(table).where(*conditions).limit(limit)
        if each is not None:
            those = those.select_from(each.rows)
        return place.in_(those.correlate(None))

    @override
    def lock_numbers(self, numbers: Batch) -> sa.Select[Any] | None:
        return None

    @override
    def checked_url(self, url: URL) -> URL:
        if url.host is not None or url.username is not None:
            raise ConfigurationError(
                "a SQLite URL has three slashes before a relative path, as in sqlite:///sessions.db, and four before "
                "an absolute one, as in sqlite:////var/lib/sessions.db"
            )
        self.refuse_volatile(url)
        if (url.database or "").startswith("file:") and url.query.get(_URI) != "true":
            raise ConfigurationError(
                "the name of the database begins with file: and is no URI without the option uri; write "
                "sqlite:///file:path?uri=true, or only the path, as in sqlite:///sessions.db"
            )
        for name, value in url.query.items():
            _check_option(name, value, is_uri=url.query.get(_URI) == "true")
        # A program may change its folder, or start processes in another one.
        return url.set(database=self.shown_database(url))

    @override
    def shown_database(self, url: URL) -> str:
        database = url.database or ""
        if is_uri(url) and not database.startswith("file:/"):
            return f"file:{quote(str(Path.cwd()))}/{database.removeprefix('file:')}"
        return database if is_uri(url) else str(Path(database).absolute())

    @override
    def refuse_volatile(self, url: URL) -> None:
        database = url.database or ""
        if not database or ":memory:" in database or url.query.get("mode") == "memory":
            raise ConfigurationError(
                "a SQLite database in memory ends with the process, and its sessions with it; "
                "give a file, as in sqlite:///sessions.db, or use MemorySessionStore in tests"
            )

    @override
    def supports_listen(self, url: URL) -> bool:
        return False

    @override
    def is_absent(self, url: URL) -> bool:
        file = file_of(url)
        return file is not None and "vfs" not in url.query and not os.path.exists(file)

    @override
    def connect_arguments(self, url: URL, *, timeout: float, command_timeout: float | None) -> dict[str, Any]:
        # SQLite's busy_timeout, a wait that cannot be cancelled. Together with the wait for this process's own writers,
        # which is half of the timeout at most, it ends before the caller gives up: a refused call is not done later.
        return {"timeout": timeout * 0.4}

    @override
    def pool_size(self, url: URL) -> int | None:
        return None

    @override
    async def checkpoint(self, connection: AsyncConnection) -> None:
        # PASSIVE waits for no other connection, and leaves what others still read. A failure is ignored, as SQLite
        # does after a commit; the next statement shows what is wrong.
        with contextlib.suppress(OperationalError):
            await connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    @override
    def in_autocommit(self, engine: AsyncEngine) -> AsyncEngine:
        return in_autocommit(engine)

    @override
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        cursor = connection.cursor()
        # Commits survive the death of the process; the last ones may be lost when the operating system dies.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()
        driver: Any = connection
        driver.driver_connection.text_factory = _decode

    @override
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        connection.exec_driver_sql(self.begin)

    @override
    def joining(self, connection: sa.Connection, schema: str | None) -> AbstractContextManager[None]:
        return joining(connection, begin=self.begin)

    @override
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        return ()

    @override
    async def prepare(self, connection: AsyncConnection) -> None:
        """Turn the write-ahead log on where it is off, so that readers and the writer do not wait for each other.

        The file keeps that setting. Processes that turn it on at the same time can get "database is locked" whatever
        the `busy_timeout`, because SQLite does not wait where that could be a deadlock.
        """
        while True:
            try:
                mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
                if mode != "wal":
                    mode = (await connection.exec_driver_sql("PRAGMA journal_mode=WAL")).scalar_one()
            except OperationalError as error:
                if not is_busy(error.orig):
                    raise
                # Without a bound, because each caller bounds its own wait.
                await asyncio.sleep(random.uniform(0.005, 0.05))  # noqa: S311
                continue
            if mode != "wal":
                logger.warning(
                    "SQLite stays in journal mode %s, and readers will wait for writers; for journal mode wal, put the "
                    "file on a local file system",
                    mode,
                )
            return

    @override
    @contextlib.asynccontextmanager
    async def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AsyncIterator[None]:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        deadline = time.monotonic() + timeout
        # A statement runs in a thread and cannot be interrupted from outside; it checks the time now and then.
        await driver.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CHECKS)
        text_factory, driver.text_factory = driver.text_factory, _decode
        await connection.exec_driver_sql("BEGIN")
        yield
        await connection.exec_driver_sql("COMMIT")
        driver.text_factory = text_factory
        await driver.set_progress_handler(None, 0)

    @override
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        pages = sa.func.pragma_page_count().table_valued(sa.column("page_count", sa.BigInteger))
        size = sa.func.pragma_page_size().table_valued(sa.column("page_size", sa.BigInteger))
        return sa.select(pages.c.page_count * size.c.page_size, sa.null()).select_from(pages.join(size, sa.true()))

    @override
    def sweep_cutoff(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:
        return sa.select(StoreClock(-max_age.total_seconds())).scalar_subquery()

    @override
    def unlikely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        # SQLite's statistics hold only the average number of rows of a value, and count NULL as a value. Not a Boolean,
        # because SQLAlchemy would write `= 1` after it, and SQLite would no longer see a range.
        hinted: sa.ColumnElement[Any] = sa.func.likelihood(condition, sa.literal_column("0.000001"), type_=sa.Integer)
        return hinted
