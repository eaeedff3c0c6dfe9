"""Postgres, with the driver asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import AdaptedConnection
from typing_extensions import override

from mcp_session_store.sql.dialects.advisory_locks import locks_seen, release_lock, take_lock
from mcp_session_store.sql.dialects.compiled import Statement
from mcp_session_store.sql.dialects.dialect import Batch, Dialect, FailureKind
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.dialects.partitions import TablePartitions, regclass
from mcp_session_store.sql.dialects.postgres_failures import (
    POOLED_STATEMENT,
    advice_on_settings,
    kind_of_failure,
    misconfiguration,
)
from mcp_session_store.sql.dialects.postgres_migrations import exclude_migrations, joining, make_schema, preamble
from mcp_session_store.sql.dialects.postgres_options import (
    BEHIND_PGBOUNCER,
    PUBLIC_OPTIONS,
    checked_options,
    connect_arguments,
    driver_arguments,
    pool_size,
)
from mcp_session_store.sql.dialects.private_names import CREATOR, check_compiler, check_creator
from mcp_session_store.sql.dialects.privileges import barred_from_upgrade, missing_privileges
from mcp_session_store.sql.dialects.strangers import refuse_stranger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime, timedelta

    import asyncpg
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.base import ReadOnlyColumnCollection
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.sql.dialects.barred import Barred
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import LocksSeen

__all__ = ["Postgres"]

_T = TypeVar("_T")


class _ArrayBatch(Batch):
    """One array for each column, unnested side by side."""

    def __init__(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> None:
        self._names = [f"{name}_{column}" for column in columns]
        # Subqueries, because Postgres knows the length of an array itself while it plans for a single execution, finds
        # that plan for few rows cheaper than one for any number, and so plans anew each time.
        arrays = [
            sa.select(sa.bindparam(parameter, type_=postgresql.ARRAY(type_))).scalar_subquery()
            for parameter, type_ in zip(self._names, columns.values(), strict=True)
        ]
        self._arrays = dict(zip(columns, arrays, strict=True))
        self._columns = columns
        self.rows = self._unnested(name)

    def _unnested(self, name: str | None) -> sa.FromClause:
        typed = [sa.column(column, type_) for column, type_ in self._columns.items()]
        return sa.func.unnest(*self._arrays.values()).table_valued(*typed, name=name).render_derived()

    @override
    def in_batch(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        array = self._arrays[column.name]
        # The cast makes ANY take the subquery's value for an array, and not its rows for the elements.
        return column == sa.any_(sa.cast(array, array.type))

    @override
    def joined_on(self, column: sa.Column[Any], rows: sa.FromClause | None = None) -> sa.ColumnElement[bool]:
        columns = self.c if rows is None else rows.c
        # A planner that has no statistics of the table takes an index for the second condition, and reads all of the
        # table for the first alone.
        return sa.and_(column == columns[column.name], self.in_batch(column))

    @override
    def matching(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        rows = self._unnested(None)
        return sa.select(*rows.c).join_from(rows, look_up(rows.c).lateral(), sa.true())

    @override
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        columns: Iterable[list[object]] = map(list, zip(*rows, strict=True)) if rows else ([] for _ in self._names)
        return dict(zip(self._names, columns, strict=True))


_connecting: Final[set[asyncio.Task[asyncpg.Connection]]] = set()


async def _connect(*arguments: Any, **options: Any) -> asyncpg.Connection:
    """Connect in a task that goes on when the caller is cancelled, and then closes the connection.

    asyncpg that is cancelled while it connects leaves an exception that is never retrieved, and asyncio logs it.
    """
    import asyncpg  # imported here, because users of SQLite do without it

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(*arguments, **driver_arguments(options))
        except (ConnectionError, asyncpg.PostgresConnectionError) as error:
            await refuse_stranger(error, options.get("host"), options.get("port", 5432))
            raise

    task = asyncio.get_running_loop().create_task(connect())
    _connecting.add(task)
    task.add_done_callback(_connecting.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_close)
        raise


def _close(task: asyncio.Task[asyncpg.Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


async def _learn_array_types(connection: asyncpg.Connection) -> None:
    """Make asyncpg look up the types of batches in a transaction; it looks them up once for each connection.

    It turns `jit` off for the look-up. Outside of a transaction, behind PgBouncer, that would reach one server
    connection, and the statement that turns it on again another.
    """
    try:
        async with connection.transaction():
            await connection.prepare(_ARRAYS, name="")
    except BaseException:
        # SQLAlchemy before 2.1 does not close a connection whose set-up failed.
        connection.terminate()
        raise


_ARRAYS: Final = "SELECT $1::uuid[], $2::text[], $3::float8[], $4::int4[], $5::int8[]"
"""Statement with a parameter of each type that a column of a batch may have."""


DROPPED_WITHIN: Final = 3.0
"""Multiple of `max_age` at which a sweep removes the rows of a partition that should have been dropped."""


def _sqlalchemy_dialect() -> sa.Dialect:
    dialect: Any = postgresql.asyncpg.dialect
    made: sa.Dialect = dialect()
    return made


class Postgres(Dialect):
    name = "postgresql"
    driver = "asyncpg"
    has_addresses = True
    has_schemas = True
    single_writer = False
    interruptible = True
    migrates_when_empty = False
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
    has_notifications = True
    changes_in_with = True
    has_partitions = True
    public_options = PUBLIC_OPTIONS

    @override
    def check_libraries(self) -> None:
        check_compiler(_sqlalchemy_dialect())
        check_creator()

    @override
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        return _ArrayBatch(name, columns)

    @override
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        return postgresql.insert(table).from_select(columns, rows).on_conflict_do_nothing()

    @override
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        # An array, because a semijoin may read all of the table, or select the values more than once.
        return column == sa.any_(sa.func.array(selected.scalar_subquery(), type_=postgresql.ARRAY(column.type)))

    @override
    def delete_joined(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        return sa.delete(table).where(*conditions)

    @override
    def unlocked(
        self,
        table: sa.Table,
        *conditions: sa.ColumnElement[bool],
        each: Batch | None = None,
        limit: sa.ColumnElement[int] | None = None,
    ) -> sa.ColumnElement[bool]:
        # By their places, which takes no second look into an index, and leaves the planner no other way.
        place: sa.ColumnClause[Any] = sa.column("ctid")
        those = sa.select(place).select_from(table).where(*conditions).limit(limit)
        those = those.correlate_except(table).with_for_update(skip_locked=True, of=table)
        if each is not None:
            found = those.lateral("found")
            those = sa.select(found.c.ctid).select_from(each.rows.join(found, sa.true()))
        places = sa.func.array(those.scalar_subquery(), type_=postgresql.ARRAY(place.type))
        return place == sa.any_(places)

    @override
    def lock_numbers(self, numbers: Batch) -> sa.Select[Any] | None:
        return sa.select(sa.func.pg_advisory_xact_lock(numbers.c.number)).select_from(numbers.rows)

    @override
    def checked_url(self, url: URL) -> URL:
        return checked_options(url)

    @override
    def connect_arguments(self, url: URL, *, timeout: float, command_timeout: float | None) -> dict[str, Any]:
        connect = connect_arguments(url, timeout=timeout) | {CREATOR: _connect}
        if command_timeout is not None:
            connect["command_timeout"] = command_timeout
        return connect

    @override
    def pool_size(self, url: URL) -> int | None:
        return pool_size(url)

    @override
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        # At a higher isolation level the snapshot would be from before the wait for the lock.
        connection.exec_driver_sql(self.begin)
        exclude_migrations(connection)
        make_schema(connection, schema)

    @override
    def joining(self, connection: sa.Connection, schema: str | None) -> AbstractContextManager[None]:
        return joining(connection, schema)

    @override
    def lock_migrations(self, connection: sa.Connection) -> None:
        exclude_migrations(connection)

    @override
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        return preamble(schema)

    @override
    def refuse_volatile(self, url: URL) -> None:
        return

    @override
    def supports_listen(self, url: URL) -> bool:
        # A pooler runs LISTEN on a server connection that it lends for one transaction.
        return url.query.get(BEHIND_PGBOUNCER) != "true"

    @override
    async def lock_on_connection(self, connection: AsyncConnection, name: str) -> bool:
        return await take_lock(connection, name)

    @override
    async def unlock_on_connection(self, connection: AsyncConnection, name: str) -> None:
        await release_lock(connection, name)

    @override
    async def locks_seen(self, connection: AsyncConnection, names: Collection[str]) -> LocksSeen:
        return await locks_seen(connection, names)

    @override
    def is_absent(self, url: URL) -> bool:
        return False

    @override
    def failure_kind(self, error: BaseException) -> FailureKind | None:
        return kind_of_failure(error)

    @override
    def misconfiguration(self, error: BaseException, url: URL) -> str | None:
        return misconfiguration(error)

    @override
    def unusable(self, url: URL, *, writes: bool) -> str | None:
        return None

    @override
    def barred_from_upgrade(
        self, connection: sa.Connection, schema: str | None, names: Collection[str]
    ) -> Barred | None:
        return barred_from_upgrade(connection, schema, names)

    @override
    async def missing_privileges(self, connection: AsyncConnection, needed: Mapping[sa.Table, str]) -> Sequence[str]:
        return await missing_privileges(connection, needed)

    @override
    def advice_on(self, error: BaseException) -> str | None:
        if getattr(error, "sqlstate", None) in POOLED_STATEMENT:
            return "behind PgBouncer in transaction mode, add ?pgbouncer=true to the database URL"
        if (advice := advice_on_settings(error)) is not None:
            return advice
        if self.failure_kind(error) is FailureKind.NO_ROOM:
            return "allow more connections there, or run fewer processes, or give each a smaller pool_size"
        return None

    @override
    def precompiled(self, statement: sa.Executable) -> Statement:
        return Statement(statement, _sqlalchemy_dialect())

    @override
    def driver_key(self, key: UUID) -> object:
        return key

    @override
    def key(self, value: object) -> UUID | None:
        return value if isinstance(value, UUID) else None

    @override
    def driver_moment(self, moment: datetime) -> object:
        return moment

    @override
    def moments(self, values: Sequence[Any]) -> Sequence[Any]:
        for value in values:
            if value is not None and value.tzinfo is None:
                raise OverflowError  # asyncpg's infinity, which cannot be compared with any other moment
        return values

    @override
    async def run(self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool, atomic: bool = False) -> _T:
        pooled: Any = connection.sync_connection
        driver: asyncpg.Connection = pooled.connection.driver_connection
        if not atomic:
            return await _one_after_the_other(driver, steps)
        await driver.execute(self.begin)
        try:
            result = await _one_after_the_other(driver, steps)
        except Exception:
            # Where this fails the connection is broken, which rolls back too.
            with contextlib.suppress(Exception):
                await driver.execute("ROLLBACK")
            raise
        await driver.execute("COMMIT")
        return result

    @override
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        if url.query.get(BEHIND_PGBOUNCER) == "true":
            assert isinstance(connection, AdaptedConnection)
            connection.run_async(_learn_array_types)

    @override
    async def prepare(self, connection: AsyncConnection) -> None:
        return

    @override
    @contextlib.asynccontextmanager
    async def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AsyncIterator[None]:
        await connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        # The driver's own timeout abandons a statement, but the server goes on with it.
        await connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, int(timeout * 1000))}")
        yield
        await connection.exec_driver_sql("COMMIT")

    @override
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        selects = []
        for table in tables:
            # A partitioned table takes no space itself.
            partitions = TablePartitions(table)
            selects.append(sa.select(*_sizes(regclass(table))))
            selects.append(sa.select(*_sizes(partitions.oid)).select_from(partitions.rows).where(partitions.of_table))
        each = sa.union_all(*selects).subquery()
        rows, indexes = each.c
        return sa.select(sa.func.sum(rows).cast(sa.BigInteger), sa.func.sum(indexes).cast(sa.BigInteger))

    @override
    def sweep_cutoff(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:
        """See `Dialect.sweep_cutoff`. Rows in a partition are left to be dropped with it, but not for ever."""
        partitions = TablePartitions(table)
        seconds = max_age.total_seconds()
        ever = sa.cast(sa.literal("-infinity", sa.Text), postgresql.TIMESTAMP(timezone=True))
        oldest = sa.func.min(sa.func.coalesce(partitions.since, ever))
        # A table without partitions has no oldest partition: NULL, which both functions ignore.
        kept = sa.func.greatest(StoreClock(-DROPPED_WITHIN * seconds), sa.func.least(StoreClock(-seconds), oldest))
        rows = sa.select(kept).select_from(partitions.rows).where(partitions.of_table, sa.not_(partitions.is_default))
        return rows.scalar_subquery()

    @override
    def unlikely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return condition  # its statistics say so


async def _one_after_the_other(driver: asyncpg.Connection, steps: Steps[_T]) -> _T:
    try:
        statement, parameters = next(steps)
        while True:
            assert isinstance(parameters, dict)
            rows = await driver.fetch(statement.text, *statement.arguments(parameters))
            statement, parameters = steps.send(rows)
    except StopIteration as done:
        result: _T = done.value
        return result


def _sizes(oid: sa.ColumnElement[Any]) -> tuple[sa.ColumnElement[int], sa.ColumnElement[int]]:
    return sa.func.pg_table_size(oid).label("rows"), sa.func.pg_indexes_size(oid).label("indexes")
