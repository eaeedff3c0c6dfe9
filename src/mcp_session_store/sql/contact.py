"""First contact with a database: its schema is checked, and migrated where that was asked for."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Protocol

from mcp_session_store.errors import (
    SchemaBehind,
    SchemaMissing,
    SessionStoreError,
    StoreBusy,
    StoreClosed,
    StoreMisconfigured,
    StoreUnavailable,
)
from mcp_session_store.sql.connections import spawn
from mcp_session_store.sql.schema.version import check_schema, is_empty
from mcp_session_store.sql.shown import url_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.dialects.watched_file import WatchedFile

__all__ = ["FirstContact"]

MIGRATION_TIMEOUT: Final = 60.0
"""Seconds that a migration on first contact may take."""


class Contacted(Protocol):
    """What first contact needs of a `Database`."""

    @property
    def dialect(self) -> Dialect: ...
    @property
    def schema(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def shown_url(self) -> str: ...
    @property
    def given(self) -> URL | AsyncEngine: ...
    @property
    def owned(self) -> bool: ...
    @property
    def file(self) -> WatchedFile | None: ...
    @property
    def autocommit(self) -> AsyncEngine: ...
    async def connect(self) -> AsyncConnection: ...
    async def close_idle(self) -> None: ...
    async def release(self, connection: AsyncConnection, *, broken: bool) -> None: ...
    def silent(self) -> StoreUnavailable: ...
    def translate(self, error: Exception) -> Exception: ...


class FirstContact:
    """The check of a database's schema, which is made once, and again after a failure.

    Args:
        database: The database.
        auto_upgrade: Whether a schema that is missing or behind is migrated.
    """

    def __init__(self, database: Contacted, *, auto_upgrade: bool) -> None:
        self._database = database
        self._auto_upgrade = auto_upgrade
        self._contact: asyncio.Task[None] | None = None
        self.made = False
        """Whether the schema was found to fit."""
        self.needed: dict[sa.Table, str] = {}
        """Names of the privileges that the user needs, separated by commas, by the table."""

    async def make(self) -> None:
        """Check the schema, unless it was found to fit. Concurrent callers wait for the same check."""
        if self.made:
            return
        contact = self._contact
        if contact is None or _failed(contact):
            # A task of its own, because one caller's timeout must not stop a migration that others wait for.
            contact = self._contact = spawn(self._check())
            contact.add_done_callback(self._note)
        if not contact.done():
            await asyncio.wait({contact})
        if contact.cancelled():
            raise StoreClosed("the session store was closed")
        contact.result()

    def forget(self) -> None:
        """Make the next call check the schema again."""
        if self._contact is not None and self._contact.done():
            self._contact = None
            self.made = False

    def withdraw(self) -> asyncio.Task[None] | None:
        """Forget the check, and return its task, which may still run."""
        contact, self._contact = self._contact, None
        self.made = False
        return contact

    def _note(self, contact: asyncio.Task[None]) -> None:
        # A task that was withdrawn says nothing about what is used next.
        if contact is self._contact:
            self.made = not _failed(contact)

    async def _check(self) -> None:
        database = self._database
        # Where nothing will be written, a user that may only read is enough.
        url = url_of(database.autocommit)
        # One that was open and is gone, also with its folder, may come back.
        lost = database.file is not None and database.file.is_lost
        if not lost and (reason := database.dialect.unusable(url, writes=bool(self.needed))) is not None:
            raise self._misconfigured(reason)
        try:
            async with self._checking() as connection:
                if database.owned:
                    await database.dialect.prepare(connection)
                try:
                    await self._check_tables(connection)
                    return
                except SchemaMissing:
                    if database.file is not None and database.file.was_lost:
                        # It may be a backup that is being copied there, and its sessions are not to be given up.
                        raise
                    empty = database.dialect.migrates_when_empty and await is_empty(connection)
                    if not (empty or self._auto_upgrade):
                        # Another process may have migrated it between the two looks.
                        await self._check_tables(connection)
                        return
                except SchemaBehind:
                    if not self._auto_upgrade:
                        raise
            await self._migrate()
            async with self._checking() as connection:
                await self._check_tables(connection)
        except SessionStoreError:
            raise
        except Exception as error:
            raise database.translate(error) from error

    async def _check_tables(self, connection: AsyncConnection) -> None:
        database = self._database
        await check_schema(connection, database.schema)
        # Asked for, because a server that may only read would find out with its first handshake.
        if self.needed and (missing := await database.dialect.missing_privileges(connection, self.needed)):
            grants = "; ".join(f"GRANT {grant} TO the user" for grant in missing)
            raise self._misconfigured(f"the user lacks privileges; run: {grants}")

    def _misconfigured(self, reason: str) -> StoreMisconfigured:
        return StoreMisconfigured(f"the database {self._database.shown_url} cannot be used: {reason}")

    @contextlib.asynccontextmanager
    async def _checking(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection for the schema check, and drop it when it falls silent for the timeout.

        The check has a time limit of its own, because callers that give up waiting do not end it.
        """
        connection: AsyncConnection | None = None
        broken = True
        try:
            async with asyncio.timeout(self._database.timeout):
                connection = await self._database.connect()
                try:
                    yield connection
                except SessionStoreError:
                    broken = False
                    raise
            broken = False
        except TimeoutError:
            raise self._database.silent() from None
        finally:
            if connection is not None:
                await self._database.release(connection, broken=broken)

    async def _migrate(self) -> None:
        # Imported here, because Alembic is not needed where the schema fits.
        from mcp_session_store.sql.schema import migrate

        # It connects by itself, and there may be room for one only.
        await self._database.close_idle()
        task = spawn(migrate.upgrade(self._database.given, schema=self._database.schema))
        try:
            done, _ = await asyncio.wait({task}, timeout=MIGRATION_TIMEOUT)
        finally:
            # Not waited for, because on a connection that has fallen silent it never ends.
            task.cancel()
        if not done:
            raise StoreBusy(
                f"the migration of the database {self._database.shown_url} did not end within {MIGRATION_TIMEOUT:g} s"
            )
        task.result()


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
