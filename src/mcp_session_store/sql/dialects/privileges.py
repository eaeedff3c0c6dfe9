"""Privileges of a Postgres user on tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from mcp_session_store.sql.dialects.partitions import regclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["missing_privileges"]


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
