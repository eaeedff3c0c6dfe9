"""The tables of this package beside those of an application, whose Alembic compares the database with its models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from alembic import context

from mcp_session_store.sql.dialects import dialect_named
from mcp_session_store.sql.dialects.partitions import PARTITION
from mcp_session_store.sql.engine import checked_schema
from mcp_session_store.sql.schema.tables import VERSION_TABLE, events_table, make_tables, new_tables
from mcp_session_store.sql.schema.version import HEAD

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["include_name", "metadata"]

_NAMES: Final = {VERSION_TABLE, *make_tables().tables}
_PARTITION: Final = re.compile(f"{events_table().name}_{PARTITION}")


def include_name(name: str | None, type_: str, parent_names: Mapping[Any, str | None]) -> bool:
    """Leave the tables of this package out of what Alembic compares with the models of an application.

    For `context.configure` in an `env.py`, with `include_schemas` and without, whatever schema the tables are in:

        context.configure(connection=connection, target_metadata=..., include_name=migrations.include_name)

    A table that the application's models have is compared: one of `metadata()`, or one of its own by the same name.

    Args:
        name: Name in the database.
        type_: What has the name, such as `table`.
        parent_names: Names of the schema and the table that it is in.

    Returns:
        Whether Alembic compares it.
    """
    table = name if type_ == "table" else parent_names.get("table_name")
    if table is None or not (table in _NAMES or _PARTITION.fullmatch(table)):
        return True
    return (parent_names.get("schema_name"), table) in _tables_of_models()


def _tables_of_models() -> Collection[tuple[str | None, str]]:
    """Return the schemas and names of the tables in the models that Alembic compares, as it names those it finds."""
    try:
        running = context.get_context()
    except (NameError, AttributeError):
        return ()  # A comparison outside of an `env.py`, whose models are known to its caller alone.
    models = running.opts.get("target_metadata")
    default = running.dialect.default_schema_name
    found = models if isinstance(models, list | tuple) else [models]
    return {
        (None if table.schema == default else table.schema, table.name)
        for one in found
        if isinstance(one, sa.MetaData)
        for table in one.tables.values()
    }


def metadata(schema: str | None = None) -> sa.MetaData:
    """Return the tables of this package, for an application that wants them beside its models.

    To query them, to refer to them by a foreign key, and to have its Alembic compare them, as one more of its
    `target_metadata`. `upgrade` makes them; where `create_all` does, as in tests, the revision is noted, too.

    Each call returns new objects. What is in the tables is not part of the contract, but for `mcp_session.key`.

    Args:
        schema: Postgres: the schema with the tables.

    Raises:
        ConfigurationError: The schema cannot be the name of one.
    """
    found = new_tables(checked_schema(schema, dialect_named("postgresql")))
    # As Alembic makes it.
    number = sa.Column("version_num", sa.String(32), nullable=False)
    version = sa.Table(VERSION_TABLE, found, number, sa.PrimaryKeyConstraint(number, name=f"{VERSION_TABLE}_pkc"))

    @sa.event.listens_for(version, "after_create")
    def note_revision(table: sa.Table, connection: sa.Connection, **_: Any) -> None:
        connection.execute(sa.insert(table).values(version_num=HEAD))

    return found
