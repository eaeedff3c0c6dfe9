"""All that differs between Postgres and SQLite; knows no table of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql.dialects.postgres import Postgres
from mcp_session_store.sql.dialects.sqlite import Sqlite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL

    from mcp_session_store.sql.dialects.checkup import Checkup
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["DIALECTS", "checkup_of", "dialect_named"]

DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in (Postgres(), Sqlite())}
"""The databases that this package works on, by SQLAlchemy's name."""


def dialect_named(name: str) -> Dialect:
    """Return the dialect of a database, by SQLAlchemy's name.

    Raises:
        ConfigurationError: This package does not work on that database.
        ImportError: An installed library does not fit; the message names the versions that do.
    """
    if (dialect := DIALECTS.get(name)) is None:
        raise ConfigurationError(f"sessions cannot be stored on {name!r}; use a postgresql:// or a sqlite:/// URL")
    dialect.check_libraries()
    return dialect


def checkup_of(dialect: Dialect, url: URL, *, pool_size: int) -> Checkup:
    """Return what can be looked at in the database of a checked URL, for processes with a pool of this size."""
    # Imported here, because only operators look.
    if dialect.name == Sqlite.name:
        from mcp_session_store.sql.dialects.sqlite_checkup import SqliteCheckup

        return SqliteCheckup(url)
    from mcp_session_store.sql.dialects.postgres_checkup import PostgresCheckup

    return PostgresCheckup(url, pool_size=pool_size)
