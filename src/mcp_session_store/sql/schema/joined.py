"""Migrations on a connection of the caller's, within its transaction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

from sqlalchemy.engine import AdaptedConnection

from mcp_session_store.errors import ConfigurationError, SessionStoreError, StoreBusy
from mcp_session_store.sql.dialects import dialect_named
from mcp_session_store.sql.engine import checked_schema, shown_url, url_of
from mcp_session_store.sql.failures import cannot_serve, failure_kind, hide_secrets
from mcp_session_store.sql.schema.running import (
    ALEMBIC,
    CONNECTION,
    JOINS,
    SCHEMA,
    alembic_config,
    command,
    run_alembic,
)
from mcp_session_store.sql.schema.version import HEAD, may_migrate, revision_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

__all__ = ["upgrade_within"]

logger = logging.getLogger(__name__)

_TURN_WITHIN: Final = 60.0
"""Seconds to wait until another migration of this process is done."""


def upgrade_within(connection: sa.Connection, schema: str | None, revision: str) -> None:
    """Bring a database's schema to a newer revision, within the transaction of a connection; see `migrate.upgrade`."""
    checked_schema(schema, dialect_named(connection.dialect.name))
    if connection.get_execution_options().get("schema_translate_map"):
        raise ConfigurationError(
            "the connection has a schema_translate_map, which these migrations do not follow; name the schema by "
            "schema= instead"
        )
    with _driver_errors_translated(connection):
        before = revision_of(connection, schema)
        if not may_migrate(connection, schema) or (before == HEAD and revision == "head"):
            return
        with _turn(connection):
            config = alembic_config({CONNECTION: connection, SCHEMA: schema, JOINS: True})
            run_alembic(lambda config: command.upgrade(config, revision), config, url_of(connection.engine), schema)
        if (after := revision_of(connection, schema)) != before:
            shown = shown_url(url_of(connection.engine))
            logger.info(
                "the schema of %s was migrated from %s to %s, in a transaction that its caller ends",
                shown,
                before or "nothing",
                after or "nothing",
            )


@contextlib.contextmanager
def _turn(connection: sa.Connection) -> Iterator[None]:
    """Wait until no other migration of this process runs."""
    gives_up_at = time.monotonic() + _TURN_WITHIN
    # Polled, because the other one may run in the event loop that a blocking wait would stop.
    while not ALEMBIC.acquire(blocking=False):
        if time.monotonic() > gives_up_at:
            raise StoreBusy("another migration runs in this process; try again when it is done")
        driver = connection.connection.dbapi_connection
        if isinstance(driver, AdaptedConnection):
            driver.run_async(lambda _: asyncio.sleep(0.01))
        else:
            time.sleep(0.01)
    try:
        yield
    finally:
        ALEMBIC.release()


@contextlib.contextmanager
def _driver_errors_translated(connection: sa.Connection) -> Iterator[None]:
    dialect, url = dialect_named(connection.dialect.name), url_of(connection.engine)
    try:
        yield
    except SessionStoreError:
        raise
    except Exception as error:
        hide_secrets(error, url)
        if failure_kind(error, dialect) is None:
            raise
        raise cannot_serve(url, shown_url(url), error, dialect) from error
