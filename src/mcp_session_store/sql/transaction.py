"""Transactions of several statements, begun and ended in SQL on a connection in autocommit."""

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
    """Commit the statements of a block, or roll them back when the block raises.

    A block that is cancelled must drop the connection, as a `Lease` does, which rolls back too.
    """
    await connection.exec_driver_sql(dialect.begin)
    try:
        yield
        dialect.check_file(connection)
    except Exception:
        # Where this fails the connection is broken, which rolls back too.
        with contextlib.suppress(Exception):
            await connection.exec_driver_sql("ROLLBACK")
        raise
    await connection.exec_driver_sql("COMMIT")
