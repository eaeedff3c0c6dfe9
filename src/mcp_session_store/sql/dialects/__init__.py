"""The one place where Postgres and SQLite differ: clock, times, batches, inserts, transactions, hints, settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from typing_extensions import override

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    import asyncpg
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.base import ReadOnlyColumnCollection
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.sql.dml import ReturningUpdate
    from sqlalchemy.sql.type_api import TypeEngine

__all__ = [
    "DIALECTS",
    "ArrivalClock",
    "MOMENT",
    "After",
    "Batch",
    "ByteLength",
    "Dialect",
    "HintChannel",
    "NotLookedUp",
    "ONE",
    "Statement",
    "Steps",
    "StoreClock",
    "TablePartitions",
    "dialect_named",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class _Milliseconds(sa.types.TypeDecorator[datetime]):
    """A time as whole milliseconds since 1970, where the database has no type of its own for times."""

    impl = sa.BigInteger
    cache_ok = True

    @override
    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else (value - _EPOCH) // timedelta(milliseconds=1)

    @override
    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(milliseconds=value)


MOMENT: Final[TypeEngine[datetime]] = _Milliseconds().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
"""A point in time on the database's clock; an aware `datetime` in Python."""


class StoreClock(FunctionElement[datetime]):
    """What the database's clock shows, plus a number of seconds."""

    type = MOMENT
    inherit_cache = True

    def __init__(self, plus: sa.ColumnElement[float] | float | None = None) -> None:
        if isinstance(plus, float):
            plus = sa.literal(plus, sa.Double)
        super().__init__(*(() if plus is None else (plus,)))


@compiles(StoreClock, "postgresql")
def _postgres_clock(element: StoreClock, compiler: SQLCompiler, **options: Any) -> str:
    # Not now(), which is the start of the transaction.
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
    """What the clock showed when the statement arrived, whatever lock it has waited for since."""

    inherit_cache = True


@compiles(ArrivalClock, "postgresql")
def _postgres_arrival(element: ArrivalClock, compiler: SQLCompiler, **options: Any) -> str:
    return _postgres_clock(element, compiler, **options).replace("clock_timestamp()", "statement_timestamp()", 1)


class NotLookedUp(FunctionElement[Any]):
    """A column that no index is to be used for: it only confirms what another column has found.

    Planners know nothing of a table that is new, and on SQLite nothing of any, and then take one index for another.
    """

    inherit_cache = True

    def __init__(self, column: sa.Column[Any]) -> None:
        super().__init__(column)
        self.type = column.type


@compiles(NotLookedUp, "postgresql")
def _postgres_not_looked_up(element: NotLookedUp, compiler: SQLCompiler, **options: Any) -> str:
    # The column itself to everybody but the planner, which does not see through this.
    column = compiler.process(element.clauses, **options)
    return f"greatest({column}, {column})"


@compiles(NotLookedUp, "sqlite")
def _sqlite_not_looked_up(element: NotLookedUp, compiler: SQLCompiler, **options: Any) -> str:
    # "The SQLite Query Optimizer Overview", 6.2: a unary plus takes a term away from the indexes.
    return f"+{compiler.process(element.clauses, **options)}"


ONE: Final = sa.literal_column("1", sa.Integer)
"""To limit a query to its first row. Of a parameter a planner does not know that it is so small."""


class ByteLength(FunctionElement[int]):
    """How many bytes a text takes, encoded and not compressed."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(ByteLength, "postgresql")
def _postgres_byte_length(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(ByteLength, "sqlite")
def _sqlite_byte_length(element: ByteLength, compiler: SQLCompiler, **options: Any) -> str:
    # octet_length() needs SQLite 3.43.
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


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


# What asyncpg.connect() and SQLAlchemy's dialect for it take from a URL's query. An unknown one would make
# every attempt to connect fail, and that looks like a database that is down.
_POSTGRES_OPTIONS: Final = frozenset(
    {
        "host",
        "port",
        "passfile",
        "ssl",
        "direct_tls",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "statement_cache_size",
        "max_cached_statement_lifetime",
        "max_cacheable_statement_size",
        "prepared_statement_cache_size",
        "application_name",
    }
)
_INTEGER_OPTIONS: Final = frozenset(name for name in _POSTGRES_OPTIONS if name.endswith(("_size", "_lifetime")))
# How libpq, and so most providers of databases, spell what asyncpg.connect() takes under another name.
_LIBPQ_OPTIONS: Final = {"sslmode": "ssl"}
# Ours, by the name that other libraries have given it: whether a pooler is between us and the database that gives a
# server connection to a client for one transaction only.
_BEHIND_PGBOUNCER: Final = "pgbouncer"


class Batch(ABC):
    """Rows that travel to the database as parameters, in a statement whose text never varies.

    Drivers and SQLAlchemy then prepare and compile the statement once, however many rows it is for.
    """

    rows: sa.FromClause
    """What a statement selects from: a table with the batch's columns."""

    @property
    def c(self) -> ReadOnlyColumnCollection[str, Any]:
        return self.rows.c

    @abstractmethod
    def among(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """That a column has one of the values of the batch's column of the same name.

        Said beside a join with the batch, too: a planner that knows nothing of the table yet takes an
        index for this, where for the join alone it reads all of the table.
        """

    @abstractmethod
    def looked_up(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """That a column has the value of the batch's column of the same name, in a join that reads the batch first."""

    @abstractmethod
    def found(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        """The rows of the batch for which there is a row elsewhere, which is locked where the query for it says so.

        One is looked up after the other, in the order of the batch. For a join a planner that does not know how many
        there are may compare each with each.

        Args:
            look_up: Selects that row, by columns of the batch.
        """

    @abstractmethod
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        """The statement's parameters for these rows, each with its values in the order of the columns."""


class HintChannel:
    """How clients of a database tell each other at once that something changed: LISTEN and NOTIFY of Postgres.

    All of a database share it, whatever their namespace and schema.

    Args:
        name: The channel's.
    """

    _MAX_KEYS: Final = 200
    """Keys that one notification tells of: a payload may have 8000 bytes ("NOTIFY" in the manual)."""
    ANY: Final = "*"
    """The payload that stands for more keys than one has room for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.send: Final = sa.select(sa.func.pg_notify(name, sa.bindparam("payload", type_=sa.Text)))
        """Sends a payload."""

    def notification(self, key: sa.ColumnElement[UUID]) -> sa.Select[Any]:
        """Tells, with the commit, of the keys that the caller selects; of none, nothing is told.

        One notification at most: each takes a lock on the whole server.
        """
        keys = sa.func.string_agg(sa.cast(key, sa.Text), ",")
        payload = sa.case((sa.func.count() <= self._MAX_KEYS, keys), else_=self.ANY)
        return sa.select(sa.func.pg_notify(self._name, payload).label("sent")).having(sa.func.count() > 0)

    def sent_with(self, change: ReturningUpdate[Any]) -> sa.Select[Any]:
        """A statement that makes a change, tells of its keys with the commit, and returns what the change returns."""
        changed = change.cte("changed")
        sent = self.notification(changed.c.key).select_from(changed).cte("sent")
        # Joined, because a SELECT in WITH that nobody reads does not run.
        return sa.select(*changed.c).select_from(changed.join(sent, sa.true()))

    async def subscribe(
        self, connection: AsyncConnection, *, on_payload: Callable[[str], None], on_loss: Callable[[], None]
    ) -> None:
        """Receive what is sent, on a connection that does nothing else, until it is closed.

        Args:
            connection: To a database of this kind.
            on_payload: Called with each payload that arrives.
            on_loss: Called when the connection is lost or closed.
        """
        pooled: Any = await connection.get_raw_connection()
        driver = pooled.dbapi_connection.driver_connection
        driver.add_termination_listener(lambda _: on_loss())
        # asyncpg prepares the statement first: within a transaction a pooler keeps both on one server connection.
        async with driver.transaction():
            await driver.add_listener(self._name, lambda _connection, _pid, _channel, payload: on_payload(payload))


class Statement:
    """A statement that runs very often: it is compiled once, and given to the driver itself.

    SQLAlchemy's part would take longer than the database's.

    Args:
        expression: The statement.
        dialect: SQLAlchemy's, for the driver.
    """

    def __init__(self, expression: sa.Executable, dialect: sa.Dialect) -> None:
        compilable: Any = expression
        compiled = compilable.compile(dialect=dialect)
        self.text: Final = str(compiled)
        self._names: list[str] = compiled.positiontup
        self._constants: dict[str, object] = {
            name: value for name, value in compiled.construct_params(_check=False).items() if value is not None
        }

    def arguments(self, parameters: dict[str, object]) -> list[object]:
        """What the driver is given for the parameters."""
        given = self._constants | parameters if self._constants else parameters
        return [given[name] for name in self._names]


_Rows: TypeAlias = Sequence[Sequence[Any]]
Steps: TypeAlias = Generator[tuple[Statement, dict[str, object] | list[dict[str, object]]], _Rows, _T]
"""Statements that are run one after the other: each is yielded with its parameters, and its rows are sent back.

With a list of parameters it is run for each of them, which only SQLite's driver does well, and its rows are not told.
"""


class Dialect(ABC):
    """What the rest of the package does not want to know about a kind of database."""

    name: str
    """SQLAlchemy's name of the database."""
    driver: str
    """The driver that this package uses for it."""
    has_schemas: bool
    """Whether tables may live in a named schema."""
    single_writer: bool
    """Whether writers exclude one another, so that one connection of a process writes at a time."""
    interruptible: bool
    """Whether a statement that runs can be given up, so that its connection and its locks are gone."""
    migrates_when_empty: bool
    """Whether an empty database is migrated on first contact."""
    begin: str
    """Begins a transaction that changes something, in which each statement sees what is committed by then."""
    channel: HintChannel | None
    """How changes are told to others at once; `None`: they are not."""
    event_channel: HintChannel | None
    """How events are, likewise."""
    changes_in_with: bool
    """Whether a statement may make several changes, each after the other in its WITH clause."""
    has_partitions: bool
    """Whether a table can be made of partitions, which are dropped as a whole."""

    @abstractmethod
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        """A batch with these columns, for one statement."""

    @abstractmethod
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        """Insert what is selected, without the rows whose primary key is there already."""

    @abstractmethod
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        """That a column has one of the values that are selected, once and first, so that an index is used."""

    @abstractmethod
    def delete_beside(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        """Delete the rows of a table that fulfil conditions with a row of a batch."""

    @abstractmethod
    def exclude_others(self, numbers: Batch) -> sa.Select[Any] | None:
        """Wait for the locks with the numbers of a batch, in its order, and hold them to the end of the transaction.

        `None` where a transaction that was begun with `begin` excludes all others.
        """

    @abstractmethod
    def checked_url(self, url: URL) -> URL:
        """The URL as the driver understands it.

        Raises:
            ConfigurationError: It cannot work.
        """

    @abstractmethod
    def refuse_volatile(self, url: URL) -> None:
        """Refuse a database that does not outlive the process.

        Raises:
            ConfigurationError: It is one.
        """

    @abstractmethod
    def often(self, statement: sa.Executable) -> Statement:
        """A statement that runs very often, with values and rows as the driver has them."""

    @abstractmethod
    def driver_key(self, key: UUID) -> object:
        """A session's key as the driver takes and returns it."""

    @abstractmethod
    async def run(self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool) -> _T:
        """Run statements on a connection in autocommit; what the steps return.

        Where writers exclude one another, those that write are a transaction, and otherwise each statement is one:
        whoever gives the steps must be right with both.
        """

    def hears(self, url: URL) -> bool:  # noqa: ARG002 - for what overrides it
        """Whether hints may arrive on connections that are made with this URL."""
        return True

    @abstractmethod
    def refuse_absent(self, url: URL) -> None:
        """Refuse a database that connecting to would create.

        Raises:
            ConfigurationError: It does not exist yet.
        """

    @abstractmethod
    def engine_arguments(
        self, url: URL, *, timeout: float, command_timeout: float | None
    ) -> tuple[URL, dict[str, Any]]:
        """What an engine of ours is made with: the URL, and arguments of `create_async_engine`.

        Args:
            url: A URL that was checked.
            timeout: Seconds to connect, and to wait for a lock on the whole database.
            command_timeout: Seconds for a statement; `None` for as long as it takes.
        """

    @abstractmethod
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        """Set what belongs to each new connection of an engine of ours, which was made from a URL."""

    @abstractmethod
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        """Begin a transaction on a connection in autocommit that no other migration runs beside.

        The revision must be read after it: whoever waited here finds what the other has done.
        """

    def lock_migrations(self, connection: sa.Connection) -> None:  # noqa: B027 - where one writer excludes others
        """Keep migrations, and others who do this, out until the end of the transaction that runs."""

    @abstractmethod
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        """What a migration that is printed as SQL does before anything else, within its transaction."""

    @abstractmethod
    async def prepare(self, connection: AsyncConnection) -> None:
        """Set, on first contact with an engine of ours, what belongs to the database as a whole."""

    @abstractmethod
    def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AbstractAsyncContextManager[None]:
        """A transaction that only reads, of what was committed when it began, on a connection in autocommit.

        When it fails, the connection is of no use any more.

        Args:
            connection: Where it begins.
            timeout: Seconds after which the database gives up a statement in it.
        """

    @abstractmethod
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        """How many bytes tables take: their rows, and their indexes where these can be told apart."""

    def kept_since(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:  # noqa: ARG002
        """The moment from before which a sweep removes rows, row by row.

        A subquery: Postgres compares an index with no function that may change within the statement, as a clock.

        Args:
            table: What is swept; it may be made of partitions.
            max_age: How long a row is to be kept.
        """
        return sa.select(StoreClock(-max_age.total_seconds())).scalar_subquery()

    @abstractmethod
    def rarely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """A condition that few rows fulfil, so that an index for it is the one to take."""


class _ArrayBatch(Batch):
    """One array for each column, unnested side by side."""

    def __init__(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> None:
        self._names = [f"{name}_{column}" for column in columns]
        arrays = [
            sa.bindparam(parameter, type_=postgresql.ARRAY(type_))
            for parameter, type_ in zip(self._names, columns.values(), strict=True)
        ]
        self._arrays = dict(zip(columns, arrays, strict=True))
        self._columns = columns
        self.rows = self._unnested(arrays, name)

    def _unnested(self, arrays: Sequence[sa.ColumnElement[Any]], name: str | None) -> sa.FromClause:
        typed = [sa.column(column, type_) for column, type_ in self._columns.items()]
        return sa.func.unnest(*arrays).table_valued(*typed, name=name).render_derived()

    @override
    def among(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        return column == sa.any_(self._arrays[column.name])

    @override
    def looked_up(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        return sa.and_(column == self.c[column.name], self.among(column))

    @override
    def found(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        # Subqueries: of the arrays themselves Postgres knows the length while it plans for one execution alone, finds
        # that plan cheaper than one for any length, and so plans anew each time.
        rows = self._unnested([sa.select(array).scalar_subquery() for array in self._arrays.values()], None)
        return sa.select(*rows.c).join_from(rows, look_up(rows.c).lateral(), sa.true())

    @override
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        return dict(zip(self._names, map(list, zip(*rows, strict=True)), strict=True))


_connecting: Final[set[asyncio.Task[asyncpg.Connection]]] = set()


async def _connect(*arguments: Any, **options: Any) -> asyncpg.Connection:
    """Connect, in a task that goes on when whoever waits for it is cancelled, and then puts the connection away.

    Cancelled while it connects, asyncpg leaves an exception that nobody asks for, and asyncio's log shows it.
    """
    import asyncpg  # who uses SQLite does without

    task = asyncio.get_running_loop().create_task(asyncpg.connect(*arguments, **options))
    _connecting.add(task)
    task.add_done_callback(_connecting.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_put_away)
        raise


def _put_away(task: asyncio.Task[asyncpg.Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


async def _learn_array_types(connection: asyncpg.Connection) -> None:
    """Make asyncpg ask what the types of our batches are, which it does once for each connection, in a transaction.

    It turns `jit` off while it asks. Behind PgBouncer, and outside of a transaction, that would reach one server
    connection, and what turns it on again another.
    """
    try:
        async with connection.transaction():
            await connection.prepare(_ARRAYS, name="")
    except BaseException:
        # SQLAlchemy before 2.1 leaves a connection open that it has not finished to set up.
        connection.terminate()
        raise


_ARRAYS: Final = "SELECT $1::uuid[], $2::text[], $3::float8[], $4::int4[], $5::int8[]"
"""Has a parameter of each type that a column of a batch may have."""


# Held to the end of the transaction, whichever way it ends. The number is ours by nothing but being odd.
_LOCK_MIGRATIONS: Final = "SELECT pg_advisory_xact_lock(7307198256364015989)"


def _quoted(table: sa.Table) -> str:
    names = (table.name,) if table.schema is None else (table.schema, table.name)
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def _regclass(table: sa.Table) -> sa.ColumnElement[Any]:
    # The text is cast: the driver would send a number for a regclass.
    return sa.cast(sa.literal(_quoted(table), sa.Text), postgresql.REGCLASS)


DROPPED_WITHIN: Final = 3.0
"""How many times as old as they are to become the rows of a partition get, before a sweep no longer waits for
somebody to drop it."""


_ISO_MOMENT: Final = r"\d+-\d\d-\d\d [\d:.]+[+-][\d:]+"


class TablePartitions:
    """The partitions of a table of Postgres by a range of times, as its catalogs tell.

    Times are told where `DateStyle` is ISO, as it is unless set: other ways to write them can be ambiguous.

    Args:
        table: What they are partitions of.
    """

    def __init__(self, table: sa.Table) -> None:
        inherits = sa.table("pg_inherits", sa.column("inhrelid"), sa.column("inhparent"), schema="pg_catalog")
        classes = sa.table(
            "pg_class", sa.column("oid"), sa.column("relname", sa.Text), sa.column("relpartbound"), schema="pg_catalog"
        )
        bound = sa.func.pg_get_expr(classes.c.relpartbound, classes.c.oid, type_=sa.Text)

        def moment(pattern: str) -> sa.ColumnElement[Any]:
            return sa.cast(sa.func.substring(bound, pattern), postgresql.TIMESTAMP(timezone=True))

        self.rows: Final = inherits.join(classes, classes.c.oid == inherits.c.inhrelid)
        """What to select from; see `among`."""
        self.among: Final = inherits.c.inhparent == _regclass(table)
        """Which rows there are the table's."""
        self.oid: Final = classes.c.oid
        self.name: Final = sa.cast(classes.c.relname, sa.Text)
        self.is_default: Final = bound == "DEFAULT"
        """Whether it is the one for whatever belongs to no other."""
        self.since: Final = moment(rf"FROM \('({_ISO_MOMENT})'\)")
        """NULL: since ever; or it is the default one."""
        self.until: Final = moment(rf"TO \('({_ISO_MOMENT})'\)")
        """NULL: it is the default one."""


class _Postgres(Dialect):
    name = "postgresql"
    driver = "asyncpg"
    has_schemas = True
    single_writer = False
    interruptible = True
    migrates_when_empty = False
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
    channel = HintChannel("mcp_session_change")
    event_channel = HintChannel("mcp_session_event")
    changes_in_with = True
    has_partitions = True

    @override
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        return _ArrayBatch(name, columns)

    @override
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        return postgresql.insert(table).from_select(columns, rows).on_conflict_do_nothing()

    @override
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        # An array, because a semijoin may read all of the table, or select more than once.
        return column == sa.any_(sa.func.array(selected.scalar_subquery(), type_=postgresql.ARRAY(column.type)))

    @override
    def delete_beside(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        return sa.delete(table).where(*conditions)

    @override
    def exclude_others(self, numbers: Batch) -> sa.Select[Any] | None:
        return sa.select(sa.func.pg_advisory_xact_lock(numbers.c.number)).select_from(numbers.rows)

    @override
    def checked_url(self, url: URL) -> URL:
        query = {_LIBPQ_OPTIONS.get(name, name): value for name, value in url.query.items()}
        if (behind := query.get(_BEHIND_PGBOUNCER, "false")) not in ("true", "false"):
            raise ConfigurationError(f"{_BEHIND_PGBOUNCER}={behind!r} in the database URL must be true or false")
        if unknown := sorted(query.keys() - _POSTGRES_OPTIONS - {_BEHIND_PGBOUNCER}):
            raise ConfigurationError(
                f"the database URL has the option {', '.join(unknown)}, which asyncpg does not take from a URL; "
                "leave it out, or make an AsyncEngine with connect_args and give that"
            )
        return url.set(query=query)

    @override
    def engine_arguments(
        self, url: URL, *, timeout: float, command_timeout: float | None
    ) -> tuple[URL, dict[str, Any]]:
        query = dict(url.query)
        name = query.pop("application_name", "mcp-session-store")
        connect: dict[str, Any] = {
            "timeout": timeout,
            "server_settings": {"application_name": name},
            "async_creator_fn": _connect,
        }
        if command_timeout is not None:
            connect["command_timeout"] = command_timeout
        connect |= {option: int(str(query.pop(option))) for option in _INTEGER_OPTIONS & query.keys()}
        if query.pop(_BEHIND_PGBOUNCER, None) == "true":
            # Without its cache asyncpg sends an unnamed statement again with the values, in one message: nothing has
            # to be on the server connection from before, and nothing stays on it.
            connect |= {
                "statement_cache_size": 0,
                "prepared_statement_cache_size": 0,
                "prepared_statement_name_func": str,
            }
        return url.set(query=query), {"connect_args": connect}

    @override
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        # At a higher level the snapshot would be as old as the wait for the lock.
        connection.exec_driver_sql(self.begin)
        self.lock_migrations(connection)
        # IF NOT EXISTS asks for the right to create a schema even where there is nothing to create.
        if schema is not None and not sa.inspect(connection).has_schema(schema):
            connection.execute(sa.schema.CreateSchema(schema))

    @override
    def lock_migrations(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(_LOCK_MIGRATIONS)

    @override
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        if schema is None:
            return (_LOCK_MIGRATIONS,)
        return (_LOCK_MIGRATIONS, str(sa.schema.CreateSchema(schema, if_not_exists=True)))

    @override
    def refuse_volatile(self, url: URL) -> None:
        return

    @override
    def hears(self, url: URL) -> bool:
        # A pooler takes LISTEN for the connection that it lends for one transaction.
        return url.query.get(_BEHIND_PGBOUNCER) != "true"

    @override
    def refuse_absent(self, url: URL) -> None:
        return

    @override
    def often(self, statement: sa.Executable) -> Statement:
        dialect: Any = postgresql.asyncpg.dialect
        return Statement(statement, dialect())

    @override
    def driver_key(self, key: UUID) -> object:
        return key

    @override
    async def run(self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool) -> _T:
        pooled: Any = connection.sync_connection
        try:
            driver: asyncpg.Connection = pooled.connection.driver_connection
            statement, parameters = next(steps)
            while True:
                assert isinstance(parameters, dict)
                rows = await driver.fetch(statement.text, *statement.arguments(parameters))
                statement, parameters = steps.send(rows)
        except StopIteration as done:
            result: _T = done.value
            return result

    @override
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        if url.query.get(_BEHIND_PGBOUNCER) == "true":
            assert isinstance(connection, AdaptedConnection)
            connection.run_async(_learn_array_types)

    @override
    async def prepare(self, connection: AsyncConnection) -> None:
        return

    @override
    @contextlib.asynccontextmanager
    async def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AsyncIterator[None]:
        await connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        # The driver's own timeout abandons a statement, and the server would go on with it.
        await connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, int(timeout * 1000))}")
        yield
        await connection.exec_driver_sql("COMMIT")

    @override
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        selects = []
        for table in tables:
            # A table that is made of partitions takes nothing itself.
            partitions = TablePartitions(table)
            selects.append(sa.select(*_sizes(_regclass(table))))
            selects.append(sa.select(*_sizes(partitions.oid)).select_from(partitions.rows).where(partitions.among))
        each = sa.union_all(*selects).subquery()
        rows, indexes = each.c
        return sa.select(sa.func.sum(rows).cast(sa.BigInteger), sa.func.sum(indexes).cast(sa.BigInteger))

    @override
    def kept_since(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:
        """See `Dialect.kept_since`. What lies in a partition is left to be dropped with it; but not for ever."""
        partitions = TablePartitions(table)
        seconds = max_age.total_seconds()
        ever = sa.cast(sa.literal("-infinity", sa.Text), postgresql.TIMESTAMP(timezone=True))
        oldest = sa.func.min(sa.func.coalesce(partitions.since, ever))
        # A table without partitions has no oldest one, and both functions pass over NULL.
        kept = sa.func.greatest(StoreClock(-DROPPED_WITHIN * seconds), sa.func.least(StoreClock(-seconds), oldest))
        rows = sa.select(kept).select_from(partitions.rows).where(partitions.among, sa.not_(partitions.is_default))
        return rows.scalar_subquery()

    @override
    def rarely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return condition  # its statistics tell


class _JsonBatch(Batch):
    """One JSON text: an array with an array for each row."""

    def __init__(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> None:
        self._name = name
        each = sa.func.json_each(sa.bindparam(name, type_=sa.Text)).table_valued("value")
        self.rows = sa.select(
            *(
                sa.type_coerce(sa.func.json_extract(each.c.value, sa.literal_column(f"'$[{position}]'")), type_).label(
                    column
                )
                for position, (column, type_) in enumerate(columns.items())
            )
        ).subquery(name)

    @override
    def among(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        return column.in_(sa.select(self.rows.c[column.name]))

    @override
    def looked_up(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        # With more than that SQLite reads the table first, and all of the batch for each row of it.
        condition: sa.ColumnElement[bool] = column == self.c[column.name]
        return condition

    @override
    def found(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        return sa.select(*self.c).where(look_up(self.c).exists())

    @override
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        # A text ends for SQLite's JSON functions where a NUL stands. Postgres refuses such a text too.
        if any("\0" in value for row in rows for value in row if isinstance(value, str)):
            raise ValueError("a text contains NUL")
        # Not ASCII alone: then a lone surrogate is found here and not in the database.
        return {self._name: json.dumps(rows, ensure_ascii=False, allow_nan=False, default=_json_value)}


def _in_transaction(connection: sqlite3.Connection, steps: Steps[_T]) -> _T:
    """Run steps that write, in the thread in which the connection is used."""
    connection.execute(_Sqlite.begin)
    try:
        result = _one_after_the_other(connection, steps)
        connection.execute("COMMIT")
        return result
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _one_after_the_other(connection: sqlite3.Connection, steps: Steps[_T]) -> _T:
    try:
        statement, parameters = next(steps)
        while True:
            if isinstance(parameters, list):
                connection.executemany(statement.text, map(statement.arguments, parameters))
                rows: _Rows = ()
            else:
                rows = connection.execute(statement.text, statement.arguments(parameters)).fetchall()
            statement, parameters = steps.send(rows)
    except StopIteration as done:
        result: _T = done.value
        return result


def _json_value(value: object) -> str:
    if isinstance(value, UUID):
        return value.hex  # as sa.Uuid stores it where there is no such type
    raise TypeError(f"{type(value).__name__} cannot be part of a batch")


class _Sqlite(Dialect):
    name = "sqlite"
    driver = "aiosqlite"
    has_schemas = False
    single_writer = True
    # A statement runs in a thread. One that is given up goes on there, and when it has a RETURNING clause then
    # holds the lock on the file, because nobody fetches its rows, until the garbage collector finds it.
    interruptible = False
    migrates_when_empty = True
    begin = "BEGIN IMMEDIATE"
    channel = None
    event_channel = None
    changes_in_with = False
    has_partitions = False

    @override
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        return _JsonBatch(name, columns)

    @override
    def often(self, statement: sa.Executable) -> Statement:
        dialect: Any = sqlite.aiosqlite.dialect
        return Statement(statement, dialect())

    @override
    def driver_key(self, key: UUID) -> object:
        return key.hex  # as sa.Uuid stores it where there is no such type

    @override
    async def run(self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool) -> _T:
        pooled: Any = connection.sync_connection
        driver = pooled.connection.driver_connection
        # These two names are not public. The public ones ask the driver's thread for one thing each, and each time the
        # way there and back takes longer than all of the statements; and whoever gives up in between leaves a
        # transaction open until the connection is closed.
        do = _in_transaction if writes else _one_after_the_other
        result: _T = await driver._execute(do, driver._conn, steps)
        return result

    @override
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        # Without a WHERE the parser takes ON CONFLICT for a join condition (sqlite.org/lang_upsert.html, 2.2).
        return sqlite.insert(table).from_select(columns, rows.where(sa.true())).on_conflict_do_nothing()

    @override
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        return column.in_(selected)

    @override
    def delete_beside(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        # It deletes from one table, beside no other.
        key = table.primary_key.columns
        those = sa.select(*key).where(*conditions).correlate(None)
        return sa.delete(table).where(sa.tuple_(*key).in_(those))

    @override
    def exclude_others(self, numbers: Batch) -> sa.Select[Any] | None:
        return None

    @override
    def checked_url(self, url: URL) -> URL:
        self.refuse_volatile(url)
        return url

    @override
    def refuse_volatile(self, url: URL) -> None:
        database = url.database or ""
        if not database or ":memory:" in database or url.query.get("mode") == "memory":
            raise ConfigurationError(
                "a SQLite database in memory ends with the process, and sessions are stored to outlive it; "
                "give a file, as in sqlite:///sessions.db, or use MemorySessionStore in tests"
            )

    @override
    def refuse_absent(self, url: URL) -> None:
        database = url.database or ""
        if not database.startswith("file:") and not Path(database).exists():
            raise ConfigurationError(f"there is no file {database!r}; mcp-session-store upgrade makes it")

    @override
    def engine_arguments(
        self, url: URL, *, timeout: float, command_timeout: float | None
    ) -> tuple[URL, dict[str, Any]]:
        # Becomes SQLite's busy_timeout. Its wait cannot be cancelled: with the wait for our other writers, half of
        # the whole at most, it ends before its caller gives up, so that what was refused is not done afterwards.
        return url, {"connect_args": {"timeout": timeout * 0.4}}

    @override
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        cursor = connection.cursor()
        # A commit is durable when the process dies; when the operating system does, the last may be lost.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @override
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        connection.exec_driver_sql(self.begin)

    @override
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        return ()

    @override
    async def prepare(self, connection: AsyncConnection) -> None:
        """Turn the write-ahead log on where it is not, so that readers and the writer do not wait for each other.

        The file remembers it. Processes that turn it on at once can get "database is locked" whatever
        `busy_timeout` says, because SQLite does not wait where waiting could be a deadlock.
        """
        while True:
            try:
                mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
                if mode != "wal":
                    mode = (await connection.exec_driver_sql("PRAGMA journal_mode=WAL")).scalar_one()
            except OperationalError as error:
                if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF not in _SQLITE_BUSY:
                    raise
                # Without a bound: whoever waits for it does so no longer than he wants to.
                await asyncio.sleep(random.uniform(0.005, 0.05))  # noqa: S311
                continue
            if mode != "wal":
                logger.warning(
                    "SQLite keeps journal mode %s and not wal: readers will wait for writers; "
                    "put the file on a local file system",
                    mode,
                )
            return

    @override
    @contextlib.asynccontextmanager
    async def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AsyncIterator[None]:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        deadline = time.monotonic() + timeout
        # A statement runs in a thread and cannot be given up from outside; it asks now and then.
        await driver.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_QUESTIONS)
        await connection.exec_driver_sql("BEGIN")
        yield
        await connection.exec_driver_sql("COMMIT")
        await driver.set_progress_handler(None, 0)

    @override
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        pages = sa.func.pragma_page_count().table_valued(sa.column("page_count", sa.BigInteger))
        size = sa.func.pragma_page_size().table_valued(sa.column("page_size", sa.BigInteger))
        return sa.select(pages.c.page_count * size.c.page_size, sa.null()).select_from(pages.join(size, sa.true()))

    @override
    def rarely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        # Its statistics tell only how many rows a value has on average, and NULL is a value to them. Not a Boolean:
        # SQLAlchemy would write `= 1` after it, and then there is no range left to see.
        hinted: sa.ColumnElement[Any] = sa.func.likelihood(condition, sa.literal_column("0.000001"), type_=sa.Integer)
        return hinted


def _sizes(oid: sa.ColumnElement[Any]) -> tuple[sa.ColumnElement[int], sa.ColumnElement[int]]:
    return sa.func.pg_table_size(oid).label("rows"), sa.func.pg_indexes_size(oid).label("indexes")


_STEPS_BETWEEN_QUESTIONS: Final = 10_000
_SQLITE_BUSY: Final = frozenset({5, 6})  # SQLITE_BUSY and SQLITE_LOCKED, without their extended bits

DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in (_Postgres(), _Sqlite())}
"""The databases that this package works on, by SQLAlchemy's name."""


def dialect_named(name: str) -> Dialect:
    """The dialect with SQLAlchemy's name for it.

    Raises:
        ConfigurationError: This package does not work on it.
    """
    try:
        return DIALECTS[name]
    except KeyError:
        raise ConfigurationError(
            f"sessions cannot be stored on {name!r}; use a postgresql:// or a sqlite:/// URL"
        ) from None
