"""What an event log and a mailbox share: they stand beside a session store, on its database or on one of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.engine import check_place
from mcp_session_store.sql.listening import Listening
from mcp_session_store.sql.notifications import Listener
from mcp_session_store.sql.sessions.store import SqlSessionStore
from mcp_session_store.store import DEFAULT_NAMESPACE, Store, checked_namespace

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.sql.batching import Batcher, Lane
    from mcp_session_store.sql.database import Attempt

__all__ = ["BesideStore"]


class BesideStore(Store):
    """Base of what stands beside a session store: it uses the store's database, or opens and closes one of its own.

    Args:
        where: Store, or URL or engine of a database. Only with the latter the other arguments may be given.
        namespace: See `SqlSessionStore`.
        schema: See `SqlSessionStore`.
        auto_upgrade: See `SqlSessionStore`.
        timeout: See `SqlSessionStore`.
        pool_size: See `SqlSessionStore`.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """

    _reads: Lane
    """Lane of calls that only read."""
    _batchers: tuple[Batcher[Any, Any], ...]
    """All batchers, `_reads` included, which close with this."""

    def __init__(
        self,
        where: SqlSessionStore | str | URL | AsyncEngine,
        *,
        namespace: str,
        schema: str | None,
        auto_upgrade: bool,
        timeout: float,
        pool_size: int | None,
    ) -> None:
        self._store = where if isinstance(where, SqlSessionStore) else None
        if not isinstance(where, SqlSessionStore):
            check_place("where", where)
            self._namespace = checked_namespace(namespace)
            self._database = Database(
                where, schema=schema, auto_upgrade=auto_upgrade, timeout=timeout, pool_size=pool_size
            )
            self._listener = Listener(Listening(self._database))
            return
        given = {
            "namespace": namespace != DEFAULT_NAMESPACE,
            "schema": schema is not None,
            "auto_upgrade": auto_upgrade,
            "timeout": timeout != DEFAULT_TIMEOUT,
            "pool_size": pool_size is not None,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ConfigurationError(f"{', '.join(names)} go with a URL or an engine; a store has its own")
        self._namespace, self._database = where.namespace, where.database
        self._listener = Listener(where.listening)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._database.shown_url} namespace={self._namespace!r}>"

    @property
    def namespace(self) -> str:
        return self._namespace

    async def open(self) -> None:
        if self._store is None:
            self._database.reopen()
        await self._reads.run(_make_contact)

    async def aclose(self) -> None:
        if self._store is None:
            self._database.close_to_calls()
        await asyncio.gather(self._listener.aclose(), *(batcher.aclose() for batcher in self._batchers))
        if self._store is None:
            await self._database.aclose()


async def _make_contact(attempt: Attempt) -> None:
    await attempt.connection.exec_driver_sql("SELECT 1")
