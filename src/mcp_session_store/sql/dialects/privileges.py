"""Privileges of a role in Postgres: on the tables of a server, and to change their schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects.barred import Barred
from mcp_session_store.sql.dialects.partitions import regclass

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["TABLES_NAMED", "barred_from_upgrade", "missing_privileges"]

TABLES_NAMED: Final = (
    " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE c.relname = ANY(CAST(:names AS text[])) AND c.relkind IN ('r', 'p')"
    " AND CASE WHEN CAST(:schema AS text) IS NULL THEN pg_table_is_visible(c.oid) ELSE n.nspname = :schema END"
)
"""Rest of a query for the tables of some names in a schema, or those that the names stand for without one."""
_OWNERS: Final = sa.text(
    "SELECT DISTINCT quote_ident(pg_get_userbyid(c.relowner)) AS owner, pg_has_role(c.relowner, 'USAGE') AS owned,"
    f" quote_ident(n.nspname) AS schema, has_schema_privilege(n.oid, 'CREATE') AS creatable{TABLES_NAMED} ORDER BY 1"
)
_PLACE: Final = sa.text(
    "SELECT quote_ident(wanted.name) AS name, n.oid IS NOT NULL AS exists,"
    " CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE')"
    " ELSE has_schema_privilege(n.oid, 'CREATE') AND has_schema_privilege(n.oid, 'USAGE') END AS creatable,"
    " quote_ident(current_database()) AS database, quote_ident(current_user) AS role,"
    " ARRAY(SELECT quote_ident(p.nspname) FROM pg_namespace p WHERE p.nspname = ANY(string_to_array(replace(replace("
    "current_setting('search_path'), '\"', ''), '$user', current_user), ', '))) AS hidden"
    " FROM (SELECT coalesce(CAST(:schema AS text), current_schema()) AS name) wanted"
    " LEFT JOIN pg_namespace n ON n.nspname = wanted.name"
)
"""Where tables would be made that are not there."""


async def missing_privileges(connection: AsyncConnection, needed: Mapping[sa.Table, str]) -> list[str]:
    """See `Dialect.missing_privileges`."""
    each = [(table, name) for table, names in needed.items() for name in dict.fromkeys(names.split(", "))]
    held = (
        await connection.execute(
            sa.select(*(sa.func.has_table_privilege(regclass(table), name) for table, name in each))
        )
    ).one()
    missing: dict[str, list[str]] = {}
    for (table, name), is_held in zip(each, held, strict=True):
        if not is_held:
            missing.setdefault(table.fullname, []).append(name)
    return [f"{', '.join(names)} ON {table}" for table, names in missing.items()]


def barred_from_upgrade(connection: sa.Connection, schema: str | None, names: Collection[str]) -> Barred | None:
    """See `Dialect.barred_from_upgrade`."""
    tables = connection.execute(_OWNERS, {"names": list(names), "schema": schema}).all()
    place = connection.execute(_PLACE, {"schema": schema}).one()
    if not tables:
        return None if place.name is not None and place.creatable else _barred_from(place)
    if owners := [table.owner for table in tables if not table.owned]:
        listed = ", ".join(dict.fromkeys(owners))
        return Barred(f"to upgrade is up to {listed}, the owner of the tables", f"take the role {listed}")
    if closed := [table.schema for table in tables if not table.creatable]:
        listed = ", ".join(dict.fromkeys(closed))
        return Barred(
            f"to upgrade needs CREATE on the schema {listed}",
            f"take another role, or GRANT CREATE ON SCHEMA {listed} TO {place.role}",
        )
    return None


def _barred_from(place: sa.Row[Any]) -> Barred:
    if place.name is None and not place.hidden:
        return Barred(
            "no schema of the role's search path exists",
            "name another one by options=-csearch_path%3Dname in the URL, or by schema= or --schema",
            hides=True,
        )
    if place.name is None:
        hidden = ", ".join(place.hidden)
        return Barred(
            "the role may use no schema of its search path",
            f"run: GRANT USAGE ON SCHEMA {hidden} TO {place.role}",
            hides=True,
        )
    if place.exists:
        found = f"the role may make no tables in the schema {place.name}"
        grant = f"USAGE, CREATE ON SCHEMA {place.name}"
    else:
        found, grant = f"the role may not make the schema {place.name}", f"CREATE ON DATABASE {place.database}"
    return Barred(found, f"take another role, or GRANT {grant} TO {place.role}")
