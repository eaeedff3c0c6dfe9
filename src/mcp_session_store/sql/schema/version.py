"""Check without Alembic whether a database's schema fits this version of the package."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.errors import SchemaAhead, SchemaBehind, SchemaMissing, StoreMisconfigured
from mcp_session_store.sql.dialects import dialect_named
from mcp_session_store.sql.engine import shown_command, shown_url, url_of
from mcp_session_store.sql.schema.tables import VERSION_TABLE, make_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.barred import Barred

__all__ = [
    "HEAD",
    "advice_on",
    "check_again",
    "check_revision",
    "check_schema",
    "is_empty",
    "is_newer",
    "may_migrate",
    "read_revision",
    "revision_of",
]

logger = logging.getLogger(__name__)

HEAD: Final = "1_0010_state"
"""The newest revision; a constant, so that Alembic is imported for migrations only."""

# Major version of the schema, and number of the migration. Within a major version migrations only add.
_REVISION: Final = re.compile(r"(\d+)_(\d+)_\w+", re.ASCII)


async def read_revision(connection: AsyncConnection, schema: str | None) -> str | None:
    """Return the revision of a database; `None` before the first migration."""
    return await connection.run_sync(revision_of, schema)


def revision_of(connection: sa.Connection, schema: str | None) -> str | None:
    """Return the revision of a database; `None` before the first migration."""
    if not sa.inspect(connection).has_table(VERSION_TABLE, schema=schema):
        return None
    return connection.execute(_stored_revision(schema)).scalar()


def _stored_revision(schema: str | None) -> sa.Select[Any]:
    return sa.select(sa.table(VERSION_TABLE, sa.column("version_num", sa.String), schema=schema).c.version_num)


def is_newer(revision: str) -> bool:
    """Return whether a revision is newer than this version of the package."""
    found, known = _REVISION.fullmatch(revision), _REVISION.fullmatch(HEAD)
    assert known is not None
    return found is None or (int(found[1]), int(found[2])) > (int(known[1]), int(known[2]))


def is_older(revision: str) -> bool:
    """Return whether a revision is older than this version of the package needs."""
    return revision != HEAD and not is_newer(revision)


async def is_empty(connection: AsyncConnection) -> bool:
    """Return whether a database holds no table of any program."""
    return not await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())


async def check_schema(connection: AsyncConnection, schema: str | None) -> None:
    """Check the schema of a database.

    Raises:
        SchemaError: The schema does not fit; the message names the command to run.
    """
    revision = await read_revision(connection, schema)
    check_revision(revision, advice=await advice_on(connection, schema, revision))


async def advice_on(connection: AsyncConnection, schema: str | None, revision: str | None) -> Callable[[str], str]:
    """Return a function that returns the advice to run a command on a database, by another user where this one may not.

    Args:
        connection: A connection to the database.
        schema: Schema with the tables.
        revision: Revision of the database.

    Raises:
        StoreMisconfigured: There may be tables that the user does not see.
    """
    url = url_of(connection.engine)
    if revision is None or is_older(revision):
        barred = await connection.run_sync(_barred_from_upgrade, schema)
        if barred is not None and barred.hides:
            raise StoreMisconfigured(f"the database {shown_url(url)} cannot be used: {barred.reason}; {barred.remedy}")
        if barred is not None:
            reason = f"{barred.reason}; {barred.remedy}"
            return lambda command: f"{reason}: {shown_command(command, url, schema, as_another_user=True)}"
    return functools.partial(shown_command, url=url, schema=schema)


def may_migrate(connection: sa.Connection, schema: str | None) -> bool:
    """Return whether migrations may run: a newer schema of the same major version is left as it is, with a warning.

    Raises:
        SchemaAhead: The schema is of a newer major version.
        StoreMisconfigured: The user may not change an older one; the message says what to grant.
    """
    url, revision = url_of(connection.engine), revision_of(connection, schema)
    if revision is not None and is_newer(revision):
        # Alembic would only say that it cannot find the revision.
        check_revision(revision, advice=functools.partial(shown_command, url=url, schema=schema))
        return False
    if revision != HEAD and (barred := _barred_from_upgrade(connection, schema)) is not None:
        raise StoreMisconfigured(f"the database {shown_url(url)} cannot be upgraded: {barred.reason}; {barred.remedy}")
    return True


def _barred_from_upgrade(connection: sa.Connection, schema: str | None) -> Barred | None:
    dialect = dialect_named(connection.dialect.name)
    # Not the table of the revision, which an upgrade writes to and does not change.
    names = [table.name for table in make_tables(schema).sorted_tables]
    return dialect.barred_from_upgrade(connection, schema, names)


async def check_again(connection: AsyncConnection, schema: str | None) -> None:
    """Check the schema of a database that fitted before, by one statement and without a warning.

    Raises:
        SchemaError: The schema does not fit any more. Where its tables are gone, the driver's error is raised.
    """
    revision = (await connection.execute(_stored_revision(schema))).scalar()
    if revision != HEAD:
        check_revision(revision, advice=await advice_on(connection, schema, revision), warn=False)


def check_revision(revision: str | None, *, advice: Callable[[str], str], warn: bool = True) -> None:
    """Check a revision. A newer one of the same major version passes, with a warning.

    Args:
        revision: Revision of the database.
        advice: Returns the advice to run a command on the database.
        warn: Whether to log that warning.

    Raises:
        SchemaMissing: The database was never migrated.
        SchemaBehind: The revision is older than this version of the package needs.
        SchemaAhead: Its major version is newer, or it is not a revision of this package.
    """
    if revision == HEAD:
        return
    if revision is None:
        raise SchemaMissing(f"the database holds no tables of mcp-session-store; {advice('upgrade')}")
    found, needed = _REVISION.fullmatch(revision), _REVISION.fullmatch(HEAD)
    assert needed is not None
    if found is None or int(found[1]) > int(needed[1]):
        raise SchemaAhead(
            f"the database's schema is at {revision}, and this version of mcp-session-store needs {HEAD}; "
            "run: pip install --upgrade mcp-session-store; or, where the newer version is installed, "
            f"{advice(f'downgrade {HEAD}')}"
        )
    if (int(found[1]), int(found[2])) < (int(needed[1]), int(needed[2])):
        raise SchemaBehind(f"the database's schema is at {revision}, and {HEAD} is needed; {advice('upgrade')}")
    if warn:
        logger.warning(
            "the database's schema is at %s, newer than the %s of this version of mcp-session-store; it works, "
            "upgrade the package when you can",
            revision,
            HEAD,
        )
