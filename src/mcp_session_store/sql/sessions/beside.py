"""The database of what lies beside a session store: that of the store, or one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.engine import check_place
from mcp_session_store.sql.listening import Listening
from mcp_session_store.sql.notifications import Listener
from mcp_session_store.sql.sessions.store import SqlSessionStore
from mcp_session_store.store import DEFAULT_NAMESPACE, checked_namespace

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["database_at"]


def database_at(
    where: SqlSessionStore | str | URL | AsyncEngine,
    *,
    namespace: str,
    schema: str | None,
    auto_upgrade: bool,
    timeout: float,
    pool_size: int | None,
) -> tuple[Database, Listener, str]:
    """Return a database, a listener to it and a namespace: those of a store, or those that are given.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """
    if not isinstance(where, SqlSessionStore):
        check_place("where", where)
        namespace = checked_namespace(namespace)
        database = Database(where, schema=schema, auto_upgrade=auto_upgrade, timeout=timeout, pool_size=pool_size)
        return database, Listener(Listening(database)), namespace
    given = {
        "namespace": namespace != DEFAULT_NAMESPACE,
        "schema": schema is not None,
        "auto_upgrade": auto_upgrade,
        "timeout": timeout != DEFAULT_TIMEOUT,
        "pool_size": pool_size is not None,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise ConfigurationError(f"{', '.join(names)} go with a URL or an engine; a store has its own")
    return where.database, Listener(where.listening), where.namespace
