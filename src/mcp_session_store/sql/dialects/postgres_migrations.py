"""Migrations of Postgres exclude each other by an advisory lock of their transaction, whichever transaction that is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["exclude_migrations", "joining", "make_schema", "preamble"]

_NUMBER: Final = 7307198256364015989
"""Number of the lock: arbitrary, so that other programs do not use it."""

# Held until the transaction ends, whichever way.
_LOCK: Final = f"SELECT pg_advisory_xact_lock({_NUMBER})"
_IS_LOCKED: Final = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"  # noqa: S608
    f" AND objsubid = 1 AND (CAST(classid AS bigint) << 32 | CAST(objid AS bigint)) = {_NUMBER})"
)


def exclude_migrations(connection: sa.Connection) -> None:
    """Exclude other migrations until the running transaction ends."""
    connection.exec_driver_sql(_LOCK)


def make_schema(connection: sa.Connection, schema: str | None) -> None:
    """Make a schema that does not exist."""
    # IF NOT EXISTS needs the right to create a schema even where the schema exists.
    if schema is not None and not sa.inspect(connection).has_schema(schema):
        connection.execute(sa.schema.CreateSchema(schema))


@contextlib.contextmanager
def joining(connection: sa.Connection, schema: str | None) -> Iterator[None]:
    """See `Dialect.joining`."""
    exclude_migrations(connection)
    # Without a transaction the lock went with its statement. No driver needs to be asked, and each says it differently.
    if not connection.exec_driver_sql(_IS_LOCKED).scalar_one():
        raise ConfigurationError(
            "the connection is in autocommit, so that there is no transaction to join; give one without "
            "isolation_level='AUTOCOMMIT', or the engine or the URL, for a transaction of its own"
        )
    make_schema(connection, schema)
    # Migrations set it until the end of the transaction, and the caller's goes on.
    wait = connection.exec_driver_sql("SELECT current_setting('lock_timeout')").scalar_one()
    yield
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{wait}'")


def preamble(schema: str | None) -> Sequence[str]:
    """See `Dialect.migration_preamble`."""
    if schema is None:
        return (_LOCK,)
    return (_LOCK, str(sa.schema.CreateSchema(schema, if_not_exists=True)))
