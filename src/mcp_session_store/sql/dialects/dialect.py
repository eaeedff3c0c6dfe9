"""The contract of a dialect: everything that the package asks of a kind of database, without SQL."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeVar

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from datetime import datetime, timedelta
    from uuid import UUID

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.sql.base import ReadOnlyColumnCollection
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.sql.dialects.barred import Barred
    from mcp_session_store.sql.dialects.compiled import Statement, Steps
    from mcp_session_store.sql.dialects.watched_file import OpenFile, WatchedFile

__all__ = ["Batch", "Dialect", "FailureKind", "LocksSeen"]

_T = TypeVar("_T")


class FailureKind(Enum):
    """Classes of driver errors, by what the caller can do."""

    BROKEN = auto()
    """The connection is lost, or what was prepared on it is. Another connection may work at once."""
    UNAVAILABLE = auto()
    """The database cannot serve now."""
    NO_ROOM = auto()
    """The database, or a pooler before it, takes no more connections now."""
    INVALID_VALUE = auto()
    """The database refuses a value. The same statement works without that value."""
    WRONG_SCHEMA = auto()
    """A table or column is missing."""


class Batch(ABC):
    """Rows that travel to the database as parameters, in a statement whose text never varies.

    SQLAlchemy and the driver then compile and prepare the statement once, whatever the number of rows.
    """

    rows: sa.FromClause
    """The batch as a table to select from."""

    @property
    def c(self) -> ReadOnlyColumnCollection[str, Any]:
        """Columns of the batch."""
        return self.rows.c

    @abstractmethod
    def in_batch(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """Return the condition that a column has one of the values of the batch's column of the same name."""

    @abstractmethod
    def joined_on(self, column: sa.Column[Any], rows: sa.FromClause | None = None) -> sa.ColumnElement[bool]:
        """Return the condition of a join with the batch, or with rows of it, by which the batch is read first."""

    @abstractmethod
    def matching(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        """Return the rows of the batch that have a matching row elsewhere.

        They are looked up one after the other, in the order of the batch, because a planner that does not know the
        number of rows may run a join by comparing each with each. A lock that the look-up asks for is taken.

        Args:
            look_up: Selects the matching row, by columns of the batch.
        """

    @abstractmethod
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        """Return the statement's parameters for these rows, whose values are in the order of the columns."""


@dataclass(frozen=True, slots=True)
class LocksSeen:
    """Locks of instances, as another connection or another process sees them."""

    epoch: str
    """Name of the time in which locks are kept. With its end they all vanish at once, and instances may live on."""
    locked: Mapping[str, bool]
    """Whether the lock of an instance is taken, by its name; without those of which that cannot be said."""


class Dialect(ABC):
    """One kind of database: what it can do, and the SQL and settings that are its own."""

    name: str
    """SQLAlchemy's name of the database."""
    driver: str
    """Name of the driver that this package uses."""
    has_addresses: bool = False
    """Whether a URL has a user, a password and a host."""
    has_schemas: bool
    """Whether tables may live in a named schema."""
    single_writer: bool
    """Whether writers exclude one another, so that a process writes on one connection at a time."""
    interruptible: bool
    """Whether a running statement can be abandoned, which ends its connection and its locks."""
    migrates_when_empty: bool
    """Whether an empty database is migrated on first contact."""
    begin: str
    """Statement that begins a transaction for changes, in which each statement sees what is committed by then."""
    has_notifications: bool
    """Whether clients notify one another through the database; see `NotificationChannel`."""
    changes_in_with: bool
    """Whether one statement may make several changes, one after the other in its WITH clause."""
    public_options: Collection[str]
    """Options of a URL whose values may be shown; that of any other may be a secret."""
    has_partitions: bool
    """Whether a table may be partitioned, so that a partition is dropped as a whole."""

    @abstractmethod
    def check_libraries(self) -> None:
        """Check that the driver and SQLAlchemy have the private names that this package uses.

        Raises:
            ImportError: One is missing; the message names the versions that have it.
        """

    @abstractmethod
    def batch(self, name: str, columns: Mapping[str, TypeEngine[Any]]) -> Batch:
        """Return a batch with these columns, for one statement."""

    @abstractmethod
    def insert_if_absent(self, table: sa.Table, columns: Sequence[str], rows: sa.Select[Any]) -> sa.Insert:
        """Return the insertion of the selected rows, except those whose primary key is taken."""

    @abstractmethod
    def is_one_of(self, column: sa.Column[Any], selected: sa.Select[Any]) -> sa.ColumnElement[bool]:
        """Return the condition that a column has one of the selected values.

        They are selected once and first, so that an index on the column is used.
        """

    @abstractmethod
    def delete_joined(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        """Return the deletion of the rows of a table that fulfil the conditions together with a row of a batch."""

    @abstractmethod
    def unlocked(
        self,
        table: sa.Table,
        *conditions: sa.ColumnElement[bool],
        each: Batch | None = None,
        limit: sa.ColumnElement[int] | None = None,
    ) -> sa.ColumnElement[bool]:
        """Return the condition of a change of rows that fulfil conditions, and that no other transaction has locked.

        Args:
            table: Table, the only one in the conditions but for their subqueries.
            conditions: Which rows.
            each: Batch, in whose columns the conditions are: the rows of the table are looked up for one of the batch's
                rows after the other.
            limit: How many rows at most; without `each`.
        """

    @abstractmethod
    def lock_numbers(self, numbers: Batch) -> sa.Select[Any] | None:
        """Return a query that takes the locks with the numbers of a batch, in its order, until the transaction ends.

        `None` where a transaction that was begun with `begin` excludes all others.
        """

    @abstractmethod
    def checked_url(self, url: URL) -> URL:
        """Return the URL with options that are known, by one name each.

        Raises:
            ConfigurationError: The URL cannot work.
        """

    def shown_database(self, url: URL) -> str | None:
        """Return the name of the database as it is shown: one that does not depend on the working folder."""
        return url.database

    @abstractmethod
    def refuse_volatile(self, url: URL) -> None:
        """Refuse a database in memory, which ends with the process.

        Raises:
            ConfigurationError: The URL is that of one.
        """

    @abstractmethod
    def failure_kind(self, error: BaseException) -> FailureKind | None:
        """Classify an error of the driver; `None` for any other."""

    @abstractmethod
    def misconfiguration(self, error: BaseException, url: URL) -> str | None:
        """Say what is wrong with how the database is set up, and what to do about it, without any part of a secret.

        `None` for an error that may pass.

        Args:
            error: An error of the driver or the network.
            url: URL of the database.
        """

    @abstractmethod
    def unusable(self, url: URL, *, writes: bool) -> str | None:
        """Say why this process cannot use a database and what to do, as far as that is seen without a connection.

        Args:
            url: URL of the database.
            writes: Whether it changes the database, or may make it.
        """

    def barred_from_upgrade(
        self,
        connection: sa.Connection,  # noqa: ARG002
        schema: str | None,  # noqa: ARG002
        names: Collection[str],  # noqa: ARG002
    ) -> Barred | None:
        """Return why the connection's user may not change a schema; `None` where it may.

        Args:
            connection: A connection to the database.
            schema: Schema with the tables; the connection's default unless given.
            names: Names of the tables.
        """
        return None

    @abstractmethod
    async def missing_privileges(self, connection: AsyncConnection, needed: Mapping[sa.Table, str]) -> Sequence[str]:
        """Return the privileges on tables that the connection's user lacks, as parts of a GRANT.

        Args:
            connection: A connection to the database.
            needed: Names of the privileges, separated by commas, by the table.
        """

    @abstractmethod
    def advice_on(self, error: BaseException) -> str | None:
        """Say what to do about a driver's error; `None` where its own text says enough."""

    @abstractmethod
    def precompiled(self, statement: sa.Executable) -> Statement:
        """Return a statement that is compiled once, at its first use; its values and rows are those of the driver."""

    @abstractmethod
    def driver_key(self, key: UUID) -> object:
        """Return a session's key as the driver takes and returns it."""

    @abstractmethod
    def key(self, value: object) -> UUID | None:
        """Return a session's key from a value that the driver returned; `None` for one that is no key."""

    @abstractmethod
    def driver_moment(self, moment: datetime) -> object:
        """Return a moment as the driver takes it."""

    @abstractmethod
    def moments(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return moments as `datetime`s, from values that the driver returned; `None` stays `None`.

        Raises:
            TypeError, OverflowError: A value is no moment.
        """

    @abstractmethod
    def run(
        self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool, atomic: bool = False
    ) -> Awaitable[_T]:
        """Run statements on a connection in autocommit, and return what the steps return.

        Where writers exclude one another, steps that write share one transaction; elsewhere each statement is a
        transaction, unless the steps are atomic. Steps that are not must be correct either way. Without `writes` the
        statements join a transaction that runs on the connection; in SQLite they share one if they are atomic.
        """

    @abstractmethod
    def supports_listen(self, url: URL) -> bool:
        """Return whether notifications may arrive on connections that are made with this URL."""

    async def lock_on_connection(self, connection: AsyncConnection, name: str) -> bool:  # noqa: ARG002
        """Take the lock of an instance on a connection, for as long as it is open; return whether it has it."""
        return False

    async def unlock_on_connection(self, connection: AsyncConnection, name: str) -> None:
        """Release the lock of an instance that `lock_on_connection` has taken."""
        raise NotImplementedError

    async def lock_of_process(self, connection: AsyncConnection, name: str) -> AbstractContextManager[bool]:  # noqa: ARG002
        """Return a context in which this process holds the lock of an instance; it says whether it has it.

        Args:
            connection: A connection to the database, which says where that lock is.
            name: Unique part of the instance's id.
        """
        return contextlib.nullcontext(False)

    @abstractmethod
    async def locks_seen(self, connection: AsyncConnection, names: Collection[str]) -> LocksSeen:
        """Return which locks of instances are taken; it takes none."""

    @abstractmethod
    def is_absent(self, url: URL) -> bool:
        """Return whether a connection would create the database."""

    @abstractmethod
    def connect_arguments(self, url: URL, *, timeout: float, command_timeout: float | None) -> dict[str, Any]:
        """Return the arguments of the driver for a connection of this package.

        Args:
            url: URL that `checked_url` returned.
            timeout: Seconds to connect, and to wait for a lock on the whole database.
            command_timeout: Seconds that a statement may take; `None` for no limit.
        """

    def in_autocommit(self, engine: AsyncEngine) -> AsyncEngine:
        """Return an engine over the connections of one that was given, in which each statement is a transaction.

        Raises:
            ConfigurationError: The engine sets another level on each connection, after this package.
        """
        level = engine.get_execution_options().get("isolation_level")
        if level not in (None, "AUTOCOMMIT"):
            raise ConfigurationError(
                f"the engine has execution_options(isolation_level={level!r}), which SQLAlchemy sets last on each "
                "connection; give the engine without them, or create_async_engine(..., isolation_level=...)"
            )
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    @abstractmethod
    def pool_size(self, url: URL) -> int | None:
        """Return the number of connections for queries, where the URL gives one."""

    def file(self, url: URL) -> WatchedFile | None:  # noqa: ARG002
        """Return the file of the database, where it is one that this process opens."""
        return None

    def check_file(self, connection: AsyncConnection) -> None:  # noqa: B027 - where there is none
        """Check before a commit that it goes into the file of the database's name.

        Raises:
            ConnectionError: That is another file by now.
        """

    async def leave_file(self, connection: AsyncConnection, file: OpenFile) -> None:  # noqa: B027
        """Leave a file that is no longer that of its name, see `OpenFile.leave`."""

    async def checkpoint(self, connection: AsyncConnection) -> None:  # noqa: B027
        """Bring what was committed into the database's file, outside of a transaction, if otherwise a commit would."""

    @abstractmethod
    def on_connect(self, connection: DBAPIConnection, url: URL) -> None:
        """Set up a new connection of an engine that this package made from a URL."""

    @abstractmethod
    def begin_migration(self, connection: sa.Connection, schema: str | None) -> None:
        """Begin a transaction that excludes other migrations, on a connection in autocommit.

        The revision must be read after it, because another migration may have changed it during the wait.
        """

    @abstractmethod
    def joining(self, connection: sa.Connection, schema: str | None) -> AbstractContextManager[None]:
        """Migrate within a block, in the transaction that runs on a connection, to whose end other migrations wait.

        Raises:
            ConfigurationError: There is no transaction to join.
        """

    def lock_migrations(self, connection: sa.Connection) -> None:  # noqa: B027 - where one writer excludes others
        """Exclude migrations, and other callers of this method, until the running transaction ends."""

    @abstractmethod
    def migration_preamble(self, schema: str | None) -> Sequence[str]:
        """Return the statements that begin the transaction of a migration that is printed as SQL."""

    @abstractmethod
    async def prepare(self, connection: AsyncConnection) -> None:
        """Set up the database as a whole, on first contact with an engine of this package."""

    @abstractmethod
    def snapshot(self, connection: AsyncConnection, *, timeout: float) -> AbstractAsyncContextManager[None]:
        """Read what is committed now, in one transaction, on a connection in autocommit.

        A connection on which it failed must be dropped.

        Args:
            connection: Connection to read on.
            timeout: Seconds after which the database abandons a statement of it.
        """

    @abstractmethod
    def stored_bytes(self, tables: Sequence[sa.Table]) -> sa.Executable:
        """Return a query for the bytes of tables: of their rows, and of their indexes where these are counted apart."""

    @abstractmethod
    def sweep_cutoff(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:
        """Return the moment before which a sweep removes rows one by one.

        A subquery, because Postgres uses no index for a comparison with a function that may change within the
        statement, as a clock does.

        Args:
            table: Table that is swept; it may be partitioned.
            max_age: Time for which a row is kept.
        """

    @abstractmethod
    def unlikely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """Return a condition with the planner's hint that few rows fulfil it, so that its index is the one to use."""
