"""Run the migrations: from the command line, from a program, or as SQL text to be run elsewhere.

Importing this module imports Alembic.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import logging
import re
from typing import TYPE_CHECKING, Any, overload

import sqlalchemy as sa
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mcp_session_store.errors import ConfigurationError, SessionStoreError, StoreBusy, StoreMisconfigured
from mcp_session_store.settings import DEFAULT_TIMEOUT, OPERATOR_TIMEOUT, checked_seconds
from mcp_session_store.sql.dialects import dialect_named
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.engine import (
    check_place,
    checked_engine,
    checked_schema,
    checked_url,
    make_engine_without_pool,
    make_migration_engine,
    refuse_absent,
    shown_command,
    shown_url,
    url_of,
)
from mcp_session_store.sql.failures import cannot_serve, failure_kind, hide_secrets
from mcp_session_store.sql.room import RETRY
from mcp_session_store.sql.schema.joined import upgrade_within
from mcp_session_store.sql.schema.running import (
    ADVICE,
    ALEMBIC,
    CONNECTION,
    DATABASE,
    JOINS,
    SCHEMA,
    alembic_config,
    command,
    migrations_folder,
    run_alembic,
)
from mcp_session_store.sql.schema.tables import VERSION_TABLE, make_tables, sessions_table
from mcp_session_store.sql.schema.version import check_schema, may_migrate, read_revision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from types import ModuleType

    from alembic.config import Config
    from sqlalchemy.engine import URL

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = [
    "check",
    "current",
    "downgrade",
    "migrations_folder",
    "run_offline",
    "run_online",
    "tables_removed",
    "upgrade",
    "upgrade_sql",
]

logger = logging.getLogger(__name__)


@overload
def upgrade(
    place: str | URL | AsyncEngine | AsyncConnection, *, schema: str | None = None, revision: str = "head"
) -> Coroutine[Any, Any, None]: ...


@overload
def upgrade(place: sa.Connection, *, schema: str | None = None, revision: str = "head") -> None: ...


def upgrade(
    place: str | URL | AsyncEngine | AsyncConnection | sa.Connection,
    *,
    schema: str | None = None,
    revision: str = "head",
) -> Coroutine[Any, Any, None] | None:
    """Bring a database's schema to a newer revision.

    All in one transaction, which is safe when many processes do it at once: one migrates, and the others wait. It is
    awaited, but with a `Connection` of SQLAlchemy, as a migration of an application has one: then it is done when it
    returns.

    A connection's own transaction is joined: the caller commits it, and what was migrated is rolled back with it.
    Other migrations wait for its end where there was something to migrate. On SQLite the transaction is begun by `BEGIN
    IMMEDIATE`, unless one runs. One that runs must be able to write: where it has only read yet, and another process
    has written since, SQLite refuses, and all has to be repeated from its begin.

    Args:
        place: URL of the database, an engine, or a connection.
        schema: Postgres: the schema for the tables; it is created where it is missing.
        revision: Revision to reach; the newest unless given.

    Raises:
        SchemaAhead: The schema is of a newer major version.
        ConfigurationError: An argument cannot work, or the connection is in autocommit.
        StoreUnavailable: The database cannot be reached.
    """
    _check_revision(revision)
    if isinstance(place, MockConnection):
        raise ConfigurationError(
            "Alembic prints SQL and has no connection (--sql, offline mode); print the SQL of these tables by: "
            "mcp-session-store upgrade --sql"
        )
    if isinstance(place, sa.Connection):
        upgrade_within(place, schema, revision)
        return None
    if isinstance(place, AsyncConnection):
        return place.run_sync(upgrade_within, schema, revision)
    check_place("place", place)
    return _upgrade(place, schema=schema, revision=revision)


async def _upgrade(url_or_engine: str | URL | AsyncEngine, *, schema: str | None, revision: str) -> None:
    async with _connected(url_or_engine, schema) as connection:
        if not await connection.run_sync(may_migrate, schema):
            return
    await _migrate(url_or_engine, schema, lambda config: command.upgrade(config, revision))


async def downgrade(url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, revision: str) -> None:
    """Take a database's schema back to an older revision; `base` removes all tables, and the sessions with them.

    Args:
        url_or_engine: URL of the database, or an engine.
        schema: Postgres: the schema with the tables.
        revision: Revision to return to.

    Raises:
        ConfigurationError: An argument cannot work.
        StoreUnavailable: The database cannot be reached.
    """
    _check_revision(revision)
    await _migrate(url_or_engine, schema, lambda config: command.downgrade(config, revision))


async def tables_removed(url: str | URL, *, schema: str | None = None, revision: str) -> tuple[Sequence[str], int]:
    """Return the tables that a downgrade would remove, and the number of sessions in them.

    Args:
        url: URL of the database.
        schema: Postgres: the schema with the tables.
        revision: Revision to return to.

    Raises:
        ConfigurationError: An argument cannot work.
        StoreUnavailable: The database cannot be reached.
    """
    async with _connected(url, schema, existing=True) as connection:
        if (found := await read_revision(connection, schema)) is None:
            return (), 0
        statements = _printed(url, schema, lambda config: command.downgrade(config, f"{found}:{revision}", sql=True))
        removed = [
            name for name in make_tables().tables if re.search(rf"^DROP TABLE .*\b{name};$", statements, re.MULTILINE)
        ]
        sessions = sessions_table(schema)
        if sessions.name not in removed:
            return removed, 0
        return removed, (await connection.execute(sa.select(sa.func.count()).select_from(sessions))).scalar_one()


async def current(url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None) -> str | None:
    """Return the revision of a database's schema; `None` before the first migration.

    Args:
        url_or_engine: URL of the database, or an engine.
        schema: Postgres: the schema with the tables.

    Raises:
        ConfigurationError: An argument cannot work.
        StoreUnavailable: The database cannot be reached.
    """
    async with _connected(url_or_engine, schema, existing=True, timeout=OPERATOR_TIMEOUT) as connection:
        return await read_revision(connection, schema)


async def check(
    url_or_engine: str | URL | AsyncEngine, *, schema: str | None = None, timeout: float = OPERATOR_TIMEOUT
) -> None:
    """Check that a database's schema fits this version of the package.

    Args:
        url_or_engine: URL of the database, or an engine.
        schema: Postgres: the schema with the tables.
        timeout: Seconds to connect, and for each query; an engine has its own limits.

    Raises:
        SchemaError: The schema does not fit; the message names the command to run.
        ConfigurationError: An argument cannot work.
        StoreUnavailable: The database cannot be reached.
    """
    timeout = checked_seconds("timeout", timeout)
    async with _connected(url_or_engine, schema, existing=True, timeout=timeout) as connection:
        await check_schema(connection, schema)


def upgrade_sql(
    url: str | URL, *, schema: str | None = None, revision: str = "head", from_revision: str | None = None
) -> str:
    """Return the SQL that `upgrade` would run, without a connection to the database.

    Args:
        url: URL that names the kind of database; the rest of it plays no part.
        schema: Postgres: the schema for the tables.
        revision: Revision to reach.
        from_revision: Revision to start from; an empty database unless given.

    Raises:
        ConfigurationError: An argument cannot work.
        StoreBusy: Another migration runs in this process; try again when it is done.
    """
    revisions = revision if from_revision is None else f"{from_revision}:{revision}"
    return _printed(url, schema, lambda config: command.upgrade(config, revisions, sql=True))


def _printed(url: str | URL, schema: str | None, run: Callable[[Config], None]) -> str:
    """Return the SQL of a migration that is not run."""
    parsed, dialect = checked_url(url)
    buffer = io.StringIO()
    config = alembic_config({SCHEMA: checked_schema(schema, dialect), DATABASE: parsed}, output=buffer)
    # Not waited for, because its holder may be another task of the event loop that this would block.
    if not ALEMBIC.acquire(blocking=False):
        raise StoreBusy("another migration runs in this process; try again when it is done")
    try:
        run_alembic(run, config, parsed, schema)
    finally:
        ALEMBIC.release()
    return buffer.getvalue()


def _check_revision(revision: str) -> None:
    if not isinstance(revision, str) or not revision:
        raise ConfigurationError(
            f"revision={revision!r} is no revision; give its name, as the command current prints it"
        )


@contextlib.asynccontextmanager
async def _connected(
    url_or_engine: str | URL | AsyncEngine,
    schema: str | None,
    *,
    existing: bool = False,
    timeout: float | None = None,
) -> AsyncIterator[AsyncConnection]:
    """Lend a connection in autocommit, and translate driver errors.

    Args:
        url_or_engine: URL of the database, or an engine.
        schema: Postgres: the schema with the tables.
        existing: Whether to refuse a database that the connection would create.
        timeout: Seconds to connect to a URL, and for each query; those of a migration unless given.
    """
    check_place("url_or_engine", url_or_engine)
    engine: AsyncEngine
    if not isinstance(url_or_engine, AsyncEngine):
        url, dialect = checked_url(url_or_engine)
        checked_schema(schema, dialect)
        if existing:
            refuse_absent(url, dialect)
        if timeout is None:
            engine = autocommit = make_migration_engine(url, dialect)
        else:
            engine = autocommit = make_engine_without_pool(url, dialect, timeout=timeout, command_timeout=timeout)
        owned = True
    else:
        dialect = checked_engine(url_or_engine)
        checked_schema(schema, dialect)
        engine, owned = url_or_engine, False
        autocommit = dialect.in_autocommit(engine)
    if not existing and (reason := dialect.unusable(url_of(engine), writes=True)) is not None:
        raise StoreMisconfigured(f"the database {shown_url(url_of(engine))} cannot be used: {reason}")
    try:
        connection = await _with_room(autocommit, dialect)
        try:
            yield connection
        finally:
            await asyncio.shield(asyncio.ensure_future(connection.close()))
    except SessionStoreError:
        raise
    except Exception as error:
        hide_secrets(error, url_of(engine))
        if failure_kind(error, dialect) is None:
            raise
        raise cannot_serve(url_of(engine), shown_url(url_of(engine)), error, dialect) from error
    finally:
        if owned:
            await engine.dispose()


async def _with_room(engine: AsyncEngine, dialect: Dialect) -> AsyncConnection:
    """Connect; where the database has no room for a connection, wait for it."""
    gives_up_at = asyncio.get_running_loop().time() + DEFAULT_TIMEOUT
    while True:
        try:
            return await engine.connect()
        except Exception as error:
            is_full = failure_kind(error, dialect) is FailureKind.NO_ROOM
            if not is_full or asyncio.get_running_loop().time() > gives_up_at:
                raise
        await asyncio.sleep(RETRY)


async def _migrate(url_or_engine: str | URL | AsyncEngine, schema: str | None, run: Callable[[Config], None]) -> None:
    def migrate(connection: sa.Connection) -> None:
        config = alembic_config({CONNECTION: connection, SCHEMA: schema})
        run_alembic(run, config, url_of(connection.engine), schema)

    async with _connected(url_or_engine, schema) as connection:
        # Polled, because a blocking wait would stop the event loop in which the other migration runs.
        while not ALEMBIC.acquire(blocking=False):  # noqa: ASYNC110 - it may be held in another loop or thread
            await asyncio.sleep(0.01)
        try:
            before = await read_revision(connection, schema)
            await connection.run_sync(migrate)
            after = await read_revision(connection, schema)
        finally:
            ALEMBIC.release()
        if after != before:
            shown = shown_url(url_of(connection.engine))
            logger.info("the schema of %s was migrated from %s to %s", shown, before or "nothing", after or "nothing")


def run_online(context: ModuleType, target: sa.Connection | str | None, *, schema: str | None) -> None:
    """Run Alembic's migrations for `env.py`, in one transaction that excludes other migrations.

    The transaction begins and ends in SQL, on a connection in autocommit, because Python's driver for SQLite
    otherwise begins none before DDL; or the one of a caller's connection is joined.

    Args:
        context: `alembic.context`.
        target: Connection in autocommit or of a caller, or URL of a database to connect to.
        schema: Schema with the tables.
    """
    if not isinstance(target, sa.Connection):
        return asyncio.run(_run_online_at(context, target or "", schema))
    # Migrations import nothing of this package, because it changes and they do not.
    given = context.config.attributes
    given[ADVICE] = functools.partial(shown_command, url=url_of(target.engine), schema=schema)
    dialect = dialect_named(target.dialect.name)
    if given.get(JOINS):
        with dialect.joining(target, schema):
            _run_migrations(context, target, schema)
        return None
    dialect.begin_migration(target, schema)
    try:
        _run_migrations(context, target, schema)
    except BaseException:
        target.exec_driver_sql("ROLLBACK")
        raise
    target.exec_driver_sql("COMMIT")
    return None


def _run_migrations(context: ModuleType, connection: sa.Connection, schema: str | None) -> None:
    context.configure(
        connection=connection, version_table=VERSION_TABLE, version_table_schema=schema, transactional_ddl=True
    )
    context.run_migrations()


async def _run_online_at(context: ModuleType, url: str, schema: str | None) -> None:
    async with _connected(url, schema) as connection:
        await connection.run_sync(lambda sync: run_online(context, sync, schema=schema))


def run_offline(context: ModuleType, url: str | URL | None, *, schema: str | None) -> None:
    """Print Alembic's migrations as SQL for `env.py`.

    Args:
        context: `alembic.context`.
        url: URL that names the kind of database.
        schema: Schema with the tables.
    """
    _, dialect = checked_url(url or "")
    checked_schema(schema, dialect)
    context.configure(
        dialect_name=dialect.name,
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        transactional_ddl=True,
        literal_binds=True,
    )
    with context.begin_transaction():
        for statement in dialect.migration_preamble(schema):
            context.execute(statement)
        context.run_migrations()
