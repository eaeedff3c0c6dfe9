"""Records of sessions in the database, read and changed past the server."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mcp_session_store import session_key
from mcp_session_store.sql.schema.tables import events_table, sessions_table
from tests.support.clients import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection

_NAME = "records of the tests"
_TABLE = sessions_table()
_EVENTS = events_table()


class Records:
    """The table of sessions in a database; each call is a connection of its own.

    Args:
        url: The database, with its driver.
    """

    def __init__(self, url: str) -> None:
        of_postgres = {"server_settings": {"application_name": _NAME}}
        self._engine = create_async_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=of_postgres if make_url(url).get_backend_name() == "postgresql" else {},
        )

    async def row(self, session_id: str | None) -> sa.RowMapping:
        """Return the row of a session, which must exist."""
        assert session_id is not None
        async with self._engine.connect() as connection:
            query = sa.select(_TABLE).where(_TABLE.c.key == session_key(session_id))
            return (await connection.execute(query)).mappings().one()

    async def restored(self, session_id: str | None, times: int = 1) -> sa.RowMapping:
        """Wait until a number of restores of a session is stored, and return its row."""
        with anyio.fail_after(PATIENCE):
            while (row := await self.row(session_id))["restores"] < times:
                await anyio.sleep(0.05)
        return row

    async def expire(self, session_id: str | None) -> None:
        """Make a session have expired long ago."""
        assert session_id is not None
        async with self._engine.connect() as connection:
            past = datetime(2020, 1, 1, tzinfo=UTC)
            update = sa.update(_TABLE).where(_TABLE.c.key == session_key(session_id)).values(expires_at=past)
            assert (await connection.execute(update)).rowcount == 1

    async def count(self) -> int:
        """Return the number of sessions, live or not."""
        return int(await self._scalar(sa.select(sa.func.count()).select_from(_TABLE)))

    async def rows(self, table: str) -> int:
        """Return the number of rows of a table."""
        return int(await self._scalar(sa.select(sa.func.count()).select_from(sa.table(table))))

    async def events(self, session_id: str | None) -> int:
        """Return the number of stored events of a session."""
        assert session_id is not None
        of_session = _EVENTS.c.key == session_key(session_id)
        return int(await self._scalar(sa.select(sa.func.count()).select_from(_EVENTS).where(of_session)))

    @asynccontextmanager
    async def locked(self, *, table: str = "mcp_session_log") -> AsyncIterator[None]:
        """Lock the database, so that no process can store events, or change another table, until the context ends."""
        async with self._engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                await connection.exec_driver_sql("BEGIN")
                await connection.exec_driver_sql(f"LOCK TABLE {table} IN EXCLUSIVE MODE")
            try:
                yield
            finally:
                await connection.exec_driver_sql("ROLLBACK")

    async def connections(self) -> int:
        """Return the number of connections to this Postgres database, without those of records.

        Its server ends a connection some time after the client.
        """
        others = "datname = current_database() AND application_name <> :name"
        query = sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {others}")
        return int(await self._scalar(query.bindparams(name=_NAME)))

    async def _scalar(self, query: sa.Executable) -> Any:
        connection: AsyncConnection
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).scalar_one()
