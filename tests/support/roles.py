"""Roles of Postgres that may have few connections."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url

from tests.support.databases import execute, migrated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def limited(postgres_url: str, *, limit: int) -> AsyncIterator[str]:
    """The URL of a migrated database for a role that may have so many connections."""
    await migrated(postgres_url)
    database = make_url(postgres_url)
    role = f"few_{secrets.token_hex(6)}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'x' CONNECTION LIMIT {limit}")
    await execute(postgres_url, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        yield database.set(username=role, password="x").render_as_string(hide_password=False)
    finally:
        await execute(postgres_url, f"DROP OWNED BY {role}")
        await execute(postgres_url, f"DROP ROLE {role}")
