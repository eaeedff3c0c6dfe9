"""The namespaces of a database for operators: which there are, and how many sessions each has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.admin.reader import Reader
from mcp_session_store.sql.admin.session_list import readable
from mcp_session_store.sql.dialects.functions import MOMENT, Bounded, driver_value
from mcp_session_store.sql.schema.tables import sessions_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["NamespaceDirectory", "NamespaceList", "StoredNamespace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredNamespace:
    """A namespace with stored sessions. Times are by the database's clock."""

    namespace: str
    live: int
    expired: int
    """Sessions that have expired, and are not yet swept."""
    ended: int
    """Sessions that have ended, and are still kept."""
    last_seen_at: datetime | None
    """When a session of it was last used; `None` where that cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamespaceList:
    """All namespaces with stored sessions, by their names."""

    namespaces: Sequence[StoredNamespace]
    as_of: datetime
    """Time of the read, by the database's clock."""


class NamespaceDirectory(Reader):
    """Namespaces of a database, for operators. See `Reader`."""

    def __init__(
        self, url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, timeout: float = OPERATOR_TIMEOUT
    ) -> None:
        super().__init__(url_or_engine, schema=schema, timeout=timeout)

    async def all(self) -> NamespaceList:
        """Return the namespaces. Reads all sessions."""
        c = sessions_table(self.database.schema).c

        async def read(connection: AsyncConnection, now: datetime) -> NamespaceList:
            has_expired = sa.and_(c.expires_at.is_not(None), c.expires_at <= sa.literal(now, MOMENT))
            number, not_ended = sa.func.count(), c.ended_at.is_(None)
            statement = sa.select(
                driver_value(c.namespace),
                number.filter(not_ended, sa.not_(has_expired)).label("live"),
                number.filter(not_ended, has_expired).label("expired"),
                number.filter(c.ended_at.is_not(None)).label("ended"),
                sa.func.max(Bounded(c.last_seen_at), type_=MOMENT).label("last_seen_at"),
            )
            rows = await connection.execute(statement.group_by(c.namespace).order_by(c.namespace))
            found = [
                StoredNamespace(
                    namespace=readable(row.namespace),
                    live=row.live,
                    expired=row.expired,
                    ended=row.ended,
                    last_seen_at=row.last_seen_at,
                )
                for row in rows
            ]
            return NamespaceList(namespaces=found, as_of=now)

        return await self.read(read)
