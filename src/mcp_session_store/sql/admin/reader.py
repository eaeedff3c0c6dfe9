"""Reading for operators: each call sees one moment of the database, and lists are paged by cursors."""

from __future__ import annotations

import base64
import json
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from uuid import UUID

import sqlalchemy as sa

from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.dialects.functions import EPOCH, StoreClock
from mcp_session_store.store import DEFAULT_NAMESPACE, checked_namespace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.database import Attempt

__all__ = ["NO_CURSOR", "Position", "Reader", "decode_cursor", "encode_cursor"]

_T = TypeVar("_T")

NO_CURSOR: Final = "give the cursor that the page before returned"
"""Remedy for a text that is not a cursor."""

Position: TypeAlias = tuple[Any, ...]
"""Position of a row in a list: its values of the columns that the list is ordered by."""


class Reader:
    """Reader of what is stored for a namespace, for operators.

    Each call is one read-only transaction: its result was true at one moment, `as_of` by the database's clock.

    Like a `SqlSessionStore`, it is used within one event loop, and its calls raise `StoreUnavailable` and
    `SchemaError`.

    Args:
        url_or_engine: As for `SqlSessionStore`.
        namespace: The namespace of the sessions.
        schema: Postgres: the schema with the tables.
        timeout: Seconds that a call takes at most; the database stops working on it then, too.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        timeout: float = OPERATOR_TIMEOUT,
    ) -> None:
        self.database = Database(url_or_engine, schema=schema, auto_upgrade=False, timeout=timeout)
        self._namespace = checked_namespace(namespace)

    async def __aenter__(self) -> Self:
        self.database.reopen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Release connections. Idempotent."""
        self.database.close_to_calls()
        await self.database.aclose()

    async def read(self, read: Callable[[AsyncConnection, datetime], Awaitable[_T]]) -> _T:
        """Call a function within a snapshot of the database, with the time at which the snapshot was taken."""
        database = self.database
        database.bind()

        async def attempt(attempt: Attempt) -> _T:
            connection = attempt.connection
            async with database.dialect.snapshot(connection, timeout=database.timeout):
                now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
                return await read(connection, now)

        begun = time.monotonic()
        try:
            async with database.lease(writes=False) as lease:
                return await lease.run(attempt)
        except StoreUnavailable as error:
            # The remedy is named whichever noticed the timeout first: the driver, the database or this package.
            if time.monotonic() - begun < database.timeout:
                raise
            raise StoreUnavailable(
                f"the database {database.shown_url} did not answer within {database.timeout:g} s; "
                "narrow down what is asked for, or give it more time with --timeout (timeout=)"
            ) from error


def encode_cursor(name: str, position: Position) -> str:
    """Return a cursor, an opaque text, for the name of a list and a position in it: times and then a key."""
    *moments, key = position
    parts = [name, *((moment - EPOCH) // timedelta(microseconds=1) for moment in moments), key.hex]
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[str, Position] | None:
    """Return the name of the list and the position; `None` for a text that is not a cursor."""
    try:
        parts = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        name, *moments, key = parts
        position = (*(EPOCH + timedelta(microseconds=moment) for moment in moments), UUID(hex=key))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return (name, position) if isinstance(name, str) else None
