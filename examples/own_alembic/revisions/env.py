"""Alembic's environment of the application, as `alembic init -t async` makes it, and one line."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mcp_session_store import migrations
from notes.models import Base

if TYPE_CHECKING:
    from sqlalchemy import Connection


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_name=migrations.include_name,  # Alembic leaves the tables of the sessions alone.
        render_as_batch=True,  # For SQLite, as its documentation has it.
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_online() -> None:
    engine = create_async_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)


asyncio.run(run_online())
