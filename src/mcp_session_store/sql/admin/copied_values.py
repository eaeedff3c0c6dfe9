"""Copying the values that belong to no session, which `SqlKeyValue` keeps, from one database to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.sql.admin.copied_rows import beyond, chunks, decoded, stored, streamed
from mcp_session_store.sql.dialects.functions import MOMENT, driver_value
from mcp_session_store.sql.schema.tables import values_table
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.admin.reader import Reader
    from mcp_session_store.sql.database import Attempt

__all__ = ["copy_values"]

_PAGE: Final = 500


async def copy_values(source: Reader, destination: Reader | None, *, namespace: str | None, dry_run: bool) -> int:
    """Copy values that have not expired, and that are not there or were stored later; return their number.

    Args:
        source: Database with the values.
        destination: The other database; `None`: it does not exist, and nothing is written.
        namespace: Namespace of the values; all unless given.
        dry_run: Whether nothing is to be changed.
    """
    copying = _ValueCopy(source, destination, namespace=namespace, dry_run=dry_run)
    copied, after = 0, None
    while True:
        number, after = await copying.page(after)
        copied += number
        if after is None:
            return copied


class _ValueCopy:
    def __init__(self, source: Reader, destination: Reader | None, *, namespace: str | None, dry_run: bool) -> None:
        self._source = source
        self._destination = destination
        self._namespace = namespace
        self._dry_run = dry_run

    async def page(self, after: Any) -> tuple[int, Any]:
        """Copy the values whose keys follow one; return how many were copied, and the last key where there are more."""
        table = values_table(self._source.database.schema)
        wanted = [] if self._namespace is None else [table.c.namespace == self._namespace]
        if after is not None:
            wanted.append(beyond(table.c.key, after))

        async def read(connection: AsyncConnection, now: datetime) -> tuple[int, Any]:
            keys = sa.select(driver_value(table.c.key)).where(*wanted).order_by(table.c.key).limit(_PAGE)
            found = (await connection.execute(keys)).scalars().all()
            if not found:
                return 0, None
            is_kept = sa.or_(table.c.expires_at.is_(None), table.c.expires_at > sa.literal(now, MOMENT))
            of_page = sa.select(*map(driver_value, table.c)).where(
                *wanted, is_kept, sa.not_(beyond(table.c.key, found[-1]))
            )
            copied = 0
            async for chunk in chunks(streamed(connection, of_page, table, self._source.database.dialect)):
                copied += await self._write(chunk)
            return copied, found[-1] if len(found) == _PAGE else None

        return await self._source.read(read)

    async def _write(self, chunk: Sequence[Mapping[str, Any]]) -> int:
        if self._destination is None:
            return len(chunk)
        database = self._destination.database
        table = values_table(database.schema)
        there = sa.select(*map(driver_value, table.c)).where(table.c.key.in_([values["key"] for values in chunk]))

        async def attempt(attempt: Attempt) -> int:
            connection = attempt.connection
            if self._dry_run:
                return len(await missing(connection))
            async with transaction(connection, database.dialect):
                # Two copies at once would insert the same values.
                await connection.run_sync(database.dialect.lock_migrations)
                wanted = await missing(connection)
                if wanted:
                    keys = [values["key"] for values in wanted]
                    await connection.execute(sa.delete(table).where(table.c.key.in_(keys)))
                    await connection.execute(sa.insert(table), wanted)
            return len(wanted)

        async def missing(connection: AsyncConnection) -> Sequence[Mapping[str, Any]]:
            rows = [decoded(database.dialect, table, row) for row in await connection.execute(there)]
            stored_at = {row["key"]: row["created_at"] for row in rows if row is not None}
            return [
                values
                for values in chunk
                if values["key"] not in stored_at
                or stored_at[values["key"]] < stored(database.dialect, values["created_at"])
            ]

        async with database.lease(writes=not self._dry_run) as lease:
            return await lease.run(attempt)
