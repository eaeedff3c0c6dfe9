"""The one way to a connection: time limits, one retry, and translated driver errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from mcp_session_store.errors import (
    ConfigurationError,
    InvalidValue,
    SessionStoreError,
    StoreClosed,
    StoreMisconfigured,
    StoreUnavailable,
)
from mcp_session_store.settings import checked_flags, checked_pool_size, checked_seconds
from mcp_session_store.sql.connections import Connections, PoolOfEngine, spawn
from mcp_session_store.sql.contact import FirstContact
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.dialects.watched_file import file_behind
from mcp_session_store.sql.engine import (
    check_place,
    checked_engine,
    checked_schema,
    checked_url,
    make_engine,
    shown_url,
    url_of,
)
from mcp_session_store.sql.failures import cannot_serve, failure_kind, hide_secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType
    from typing import Self

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.dialects.watched_file import OpenFile, WatchedFile

__all__ = ["DEFAULT_POOL_SIZE", "Attempt", "Database", "Lease", "spawn"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

DEFAULT_POOL_SIZE: Final = 5
"""Number of connections for queries at most, unless given."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a piece of work, with its connection."""

    connection: AsyncConnection
    repeated: bool
    """Whether an earlier try may have taken effect without an answer."""


class Database:
    """A database with the tables of this package: its engine, its dialect, and the check of its schema.

    Args:
        url_or_engine: URL, from which an engine is made, or an engine that the caller disposes.
        schema: Schema with the tables; the connection's default unless given.
        auto_upgrade: Whether a schema that is missing or behind is migrated on first contact.
        timeout: Seconds that a piece of work may take.
        pool_size: With a URL: number of connections for queries; as the URL says, or else `DEFAULT_POOL_SIZE`, unless
            given.

    Raises:
        ConfigurationError: An argument cannot work.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        schema: str | None,
        auto_upgrade: bool,
        timeout: float,
        pool_size: int | None = None,
    ) -> None:
        check_place("url_or_engine", url_or_engine)
        checked_flags(auto_upgrade=auto_upgrade)
        self.timeout: Final = checked_seconds("timeout", timeout)
        pool_size = checked_pool_size(pool_size)
        if not isinstance(url_or_engine, AsyncEngine):
            url, self.dialect = checked_url(url_or_engine)
            self.file = self.dialect.file(url)
            self.engine = make_engine(url, self.dialect, timeout=self.timeout, file=self.file)
            self.supports_listen = self.dialect.supports_listen(url)
            self.given: URL | AsyncEngine = url
            self.owned = True
            pool_size = pool_size or self.dialect.pool_size(url) or DEFAULT_POOL_SIZE
        else:
            self.dialect = checked_engine(url_or_engine)
            if pool_size is not None:
                raise ConfigurationError(
                    "pool_size goes with a database URL; an engine has a pool of its own, with the size that it was "
                    "made with"
                )
            self.supports_listen = self.dialect.has_notifications
            self.engine = self.given = url_or_engine
            self.file = self.dialect.file(url_or_engine.url)
            self.owned = False
        self.schema: Final = checked_schema(schema, self.dialect)
        self.shown_url: Final = shown_url(url_of(self.engine))
        self.autocommit: Final = self.engine if self.owned else self.dialect.in_autocommit(self.engine)
        """Engine whose connections run each statement as a transaction of its own."""
        self.connections: Final[Connections | PoolOfEngine] = (
            PoolOfEngine(self.autocommit, self.dialect)
            if pool_size is None
            else Connections(self.autocommit, self.dialect, most=pool_size)
        )
        """Connections for queries."""
        self.write_lock: asyncio.Lock | None = asyncio.Lock() if self.dialect.single_writer else None
        if self.file is not None:
            self.file.on_replaced = self.forget_contact
        self._contact = FirstContact(self, auto_upgrade=auto_upgrade)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.closing: set[asyncio.Task[None]] = set()
        """Tasks that return a connection to the pool, or close it."""

    def bind(self) -> asyncio.AbstractEventLoop:
        """Return the event loop, if it is the one of the first call, and `aclose` was not called since.

        Raises:
            StoreClosed: The store is closed.
            ConfigurationError: Another event loop runs, or none of asyncio's.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "SqlSessionStore needs a running asyncio event loop; under Trio, use another SessionStore"
            ) from None
        if self._closed:
            raise StoreClosed("the session store is closed; open() opens it again")
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ConfigurationError(
                "the SqlSessionStore is in use in another event loop; make one for each loop, "
                "or await aclose() there and open() here"
            )
        return loop

    def lease(self, *, writes: bool) -> Lease:
        """Return a lease of a connection, which is opened when it is first needed.

        Args:
            writes: Whether its statements change anything.
        """
        return Lease(self, self.write_lock if writes else None)

    def reopen(self) -> None:
        """Allow calls again after `aclose`, and make the next one check the schema."""
        self._closed = False
        self._contact.forget()

    @property
    def in_contact(self) -> bool:
        """Whether the schema was found to fit."""
        return self._contact.made

    async def first_contact(self) -> None:
        """Check the schema once, and again after a failure. Concurrent callers wait for the same check."""
        await self._contact.make()

    def need(self, privileges: Mapping[sa.Table, str]) -> None:
        """Make first contact fail where the user lacks one of these privileges, see `Dialect.missing_privileges`."""
        for table, names in privileges.items():
            self._contact.needed[table] = ", ".join(filter(None, (self._contact.needed.get(table), names)))

    def forget_contact(self) -> None:
        """Make the next call check the schema again, because a table was missing."""
        self._contact.forget()

    def silent(self) -> StoreUnavailable:
        """Return the error of a call that was not answered within the timeout."""
        if (refusal := self.connections.refusal(within=self.timeout)) is not None:
            return StoreUnavailable(
                f"the database {self.shown_url} gave this process no connection within {self.timeout:g} s: {refusal}"
            )
        return StoreUnavailable(f"the database {self.shown_url} did not answer within {self.timeout:g} s")

    async def connect(self) -> AsyncConnection:
        """Return a connection for queries, to be given back by `release`."""
        if self.file is not None and not self.owned:
            self.file.before_connect(makes=False)
        # As a rule one is idle; then no timer is made, which would be one for each statement.
        if (connection := self.connections.take_idle()) is None:
            try:
                async with asyncio.timeout(self.timeout):
                    connection = await self.connections.take()
            except TimeoutError:
                raise self.silent() from None
        if self.file is not None:
            try:
                self._file_of(connection, self.file).check()
            except OSError:
                try:
                    await self.leave_file(connection)
                finally:
                    await self.release(connection, broken=True)
                raise
        return connection

    async def leave_file(self, connection: AsyncConnection) -> None:
        """Leave the file behind a connection, if it is no longer the one of its name."""
        if self.file is not None:
            with contextlib.suppress(Exception):
                await self.dialect.leave_file(connection, self._file_of(connection, self.file))

    @staticmethod
    def _file_of(connection: AsyncConnection, file: WatchedFile) -> OpenFile:
        assert connection.sync_connection is not None
        return file_behind(connection.sync_connection.info, file)

    async def release(self, connection: AsyncConnection, *, broken: bool) -> None:
        """Give a connection back, or drop it when it is broken."""
        if broken or not self.connections.give_back(connection):
            await asyncio.shield(self._close(connection, broken=broken))

    async def close_idle(self) -> None:
        """Close the connections that no call uses."""
        if closing := [self._close(connection, broken=False) for connection in self.connections.note_break()]:
            await asyncio.wait(closing, timeout=self.timeout)

    def note_break(self) -> None:
        """Let no call use a connection that was opened before now, because the database has ended one, or its file."""
        if self.file is not None and self.file.is_lost:
            self.forget_contact()
        for connection in self.connections.note_break():
            self._close(connection, broken=True)

    def _close(self, connection: AsyncConnection, *, broken: bool) -> asyncio.Task[None]:
        # In a task of its own, so that a cancelled caller leaves no connection behind.
        task = spawn(self.connections.close(connection, broken=broken))
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)
        return task

    def translate(self, error: Exception) -> Exception:
        """Return this package's error for a driver's, to be raised from it; a bug is returned as it is."""
        if isinstance(error, SessionStoreError):
            return error
        hide_secrets(error, url_of(self.engine))
        kind = failure_kind(error, self.dialect)
        if kind is None:
            return error
        failure = cannot_serve(url_of(self.engine), self.shown_url, error, self.dialect)
        if kind is FailureKind.INVALID_VALUE and not isinstance(failure, StoreMisconfigured):
            return InvalidValue("the database does not take a value of this call, such as one that is too large")
        return failure

    def close_to_calls(self) -> None:
        """Refuse calls from now on."""
        self._closed = True

    async def aclose(self) -> None:
        """Close connections, unless the caller made the engine. All calls must have ended."""
        contact = self._contact.withdraw()
        if self._loop is not None and self._loop.is_closed():
            # Nothing can be asked any more of tasks and connections of a loop that is closed.
            self.closing.clear()
            self.connections.abandon()
        else:
            if contact is not None:
                await self.stop(contact)
            if self.closing:
                await asyncio.wait(self.closing, timeout=self.timeout)
            if self.file is not None:
                await self._leave_lost_file(self.file)
            await self.connections.aclose(timeout=self.timeout)
        self._loop = None
        if self.file is not None:
            self.file.forget()
        self.write_lock = asyncio.Lock() if self.dialect.single_writer else None

    async def _leave_lost_file(self, file: WatchedFile) -> None:
        # No call has noticed yet that it is lost, and SQLite would leave its write-ahead log beside its name.
        for connection in tuple(self.connections.idle):
            try:
                self._file_of(connection, file).check()
            except OSError:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.leave_file(connection), self.timeout)

    async def stop(self, task: asyncio.Task[None]) -> None:
        """End a task that uses the database, and wait for its end no longer than the timeout."""
        if not self.dialect.interruptible:
            await asyncio.wait({task}, timeout=self.timeout)
        task.cancel()
        await asyncio.wait({task}, timeout=self.timeout)


class Lease:
    """A connection that is kept from one statement to the next, opened on demand and replaced when it breaks."""

    def __init__(self, database: Database, writing: asyncio.Lock | None) -> None:
        self._database = database
        self._writing = writing
        self._holds_writing = False
        self._connection: AsyncConnection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._release(broken=exc is not None)
        finally:
            if self._writing is not None and self._holds_writing:
                self._holds_writing = False
                self._writing.release()

    async def run(self, work: Callable[[Attempt], Awaitable[_T]]) -> _T:
        """Do a piece of work with the connection, and once more with another connection when the first one broke.

        Args:
            work: The work; it may run twice.

        Raises:
            StoreUnavailable: There is no connection, two broke, or no answer came within the timeout. Where a
                statement cannot be interrupted this may take longer, and the caller bounds its own wait.
            SchemaError: The schema does not fit.
            InvalidValue: The database refuses a value.
        """
        try:
            if not self._database.dialect.interruptible:
                return await self._try_twice(work)
            async with asyncio.timeout(self._database.timeout):
                return await self._try_twice(work)
        except TimeoutError:
            raise self._database.silent() from None

    async def _try_twice(self, work: Callable[[Attempt], Awaitable[_T]]) -> _T:
        if not self._database.in_contact:
            await self._contact()
        if self._writing is not None and not self._holds_writing:
            # Half of the timeout, because the wait for the file comes on top: the caller would have given up by then,
            # and what was refused would be committed.
            async with asyncio.timeout(self._database.timeout / 2):
                await self._writing.acquire()
            self._holds_writing = True
        try:
            return await self._attempt(work, repeated=False)
        except StoreUnavailable as error:
            if not _is_broken(error, self._database.dialect):
                raise
            logger.info("a connection to the database broke, trying another: %s", error)
        if not self._database.in_contact:
            await self._contact()
        return await self._attempt(work, repeated=True)

    async def _contact(self) -> None:
        """Have the schema checked, without the lease's connection, because the check may need it."""
        await self._release(broken=False)
        await self._database.first_contact()

    async def _attempt(self, work: Callable[[Attempt], Awaitable[_T]], *, repeated: bool) -> _T:
        failure: Exception
        try:
            if self._connection is None:
                self._connection = await self._database.connect()
            return await work(Attempt(self._connection, repeated))
        except Exception as error:
            failure = self._database.translate(error)
            kind = failure_kind(error, self._database.dialect)
            if kind is FailureKind.BROKEN:
                if self._connection is not None:
                    await self._database.leave_file(self._connection)
                self._database.note_break()
                if not isinstance(error, SQLAlchemyError):
                    await self._show_that_it_is_broken()
            # After an invalid value too: a statement whose values could not be sent is still open on the server, in a
            # transaction that asyncpg does not end, which behind PgBouncer keeps a server connection from others.
            await self._release(broken=True)
            if kind is FailureKind.WRONG_SCHEMA:
                self._database.forget_contact()
                # The check raises an error that says what is wrong, and which command to run.
                await self._database.first_contact()
            if not isinstance(failure, InvalidValue):
                if failure is error:
                    raise
                raise failure from error
        except BaseException:
            await self._release(broken=True)
            raise
        raise failure

    async def _show_that_it_is_broken(self) -> None:
        """Let SQLAlchemy meet the broken connection, so that a given engine's pool drops all that are as old."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                await self._connection.exec_driver_sql("SELECT 1")

    async def _release(self, *, broken: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._database.release(connection, broken=broken)


def _is_broken(error: StoreUnavailable, dialect: Dialect) -> bool:
    cause = error.__cause__
    return isinstance(cause, Exception) and failure_kind(cause, dialect) is FailureKind.BROKEN
