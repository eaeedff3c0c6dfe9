"""Several statements that take effect together, on connections that are in autocommit."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["transaction"]


@contextlib.asynccontextmanager
async def transaction(connection: AsyncConnection, dialect: Dialect) -> AsyncIterator[None]:
    """Commit what is done within, or undo it when that raises.

    Whoever is cancelled within drops the connection, as a `Lease` does, and that undoes it too.
    """
    await connection.exec_driver_sql(dialect.begin)
    try:
        yield
    except Exception:
        # Where this fails the connection is broken, and then there is nothing to undo.
        with contextlib.suppress(Exception):
            await connection.exec_driver_sql("ROLLBACK")
        raise
    await connection.exec_driver_sql("COMMIT")
