"""What the rest of the package asks of a kind of database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from uuid import UUID

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.base import ReadOnlyColumnCollection
    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.sql.dialects.compiled import Statement, Steps

__all__ = ["Batch", "Dialect", "FailureKind"]

_T = TypeVar("_T")


class FailureKind(Enum):
    """What a driver's error means for the caller."""

    BROKEN = auto()
    """The connection is lost, or what was prepared on it is. Another connection may work at once."""
    UNAVAILABLE = auto()
    """The database cannot serve now."""
    INVALID_VALUE = auto()
    """The database refuses a value. The same statement works without that value."""
    WRONG_SCHEMA = auto()
    """A table or column is missing."""


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
    def in_batch(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """That a column has one of the values of the batch's column of the same name.

        Said beside a join with the batch, too: a planner that knows nothing of the table yet takes an
        index for this, where for the join alone it reads all of the table.
        """

    @abstractmethod
    def joined_on(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """That a column has the value of the batch's column of the same name, in a join that reads the batch first."""

    @abstractmethod
    def matching(self, look_up: Callable[[ReadOnlyColumnCollection[str, Any]], sa.Select[Any]]) -> sa.Select[Any]:
        """The rows of the batch for which there is a row elsewhere, which is locked where the query for it says so.

        One is looked up after the other, in the order of the batch. For a join a planner that does not know how many
        there are may compare each with each.

        Args:
            look_up: Selects that row, by columns of the batch.
        """

    @abstractmethod
    def parameters(self, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        """The statement's parameters for these rows, each with its values in the order of the columns."""


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
    has_notifications: bool
    """Whether clients notify one another through the database; see `NotificationChannel`."""
    changes_in_with: bool
    """Whether a statement may make several changes, each after the other in its WITH clause."""
    has_partitions: bool
    """Whether a table can be made of partitions, which are dropped as a whole."""

    @abstractmethod
    def check_libraries(self) -> None:
        """Check that the driver and SQLAlchemy have the private names that this package uses.

        Raises:
            ImportError: One is missing; the message names the versions that have it.
        """

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
    def delete_joined(self, table: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Delete:
        """Delete the rows of a table that fulfil conditions with a row of a batch."""

    @abstractmethod
    def lock_numbers(self, numbers: Batch) -> sa.Select[Any] | None:
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
    def failure_kind(self, error: BaseException) -> FailureKind | None:
        """Classify an error by the code that the driver gives it; `None` where it has none."""

    @abstractmethod
    def advice_on(self, error: BaseException) -> str | None:
        """Say what to do about a driver's error; `None` where its own text says enough."""

    @abstractmethod
    def precompiled(self, statement: sa.Executable) -> Statement:
        """A statement that runs very often, with values and rows as the driver has them."""

    @abstractmethod
    def driver_key(self, key: UUID) -> object:
        """A session's key as the driver takes and returns it."""

    @abstractmethod
    def run(self, connection: AsyncConnection, steps: Steps[_T], *, writes: bool) -> Awaitable[_T]:
        """Run statements on a connection in autocommit; what the steps return.

        Where writers exclude one another, those that write are a transaction, and otherwise each statement is one:
        whoever gives the steps must be right with both.
        """

    @abstractmethod
    def supports_listen(self, url: URL) -> bool:
        """Whether notifications may arrive on connections that are made with this URL."""

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

    @abstractmethod
    def sweep_cutoff(self, table: sa.Table, max_age: timedelta) -> sa.ScalarSelect[Any]:
        """The moment from before which a sweep removes rows, row by row.

        A subquery: Postgres compares an index with no function that may change within the statement, as a clock.

        Args:
            table: What is swept; it may be made of partitions.
            max_age: How long a row is to be kept.
        """

    @abstractmethod
    def unlikely(self, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """A condition that few rows fulfil, so that an index for it is the one to take."""
