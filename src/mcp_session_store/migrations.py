"""Migrate the database from a program, and have the program's own Alembic leave the tables of this package alone.

An application whose Alembic works on the same database tells it so by one line in its `env.py`:

    context.configure(connection=connection, target_metadata=..., include_name=migrations.include_name)

Without it Alembic takes the tables for some that the models do not have any more: `alembic check` fails, and the next
`alembic revision --autogenerate` drops them, and all sessions with them. `metadata()` has the tables for applications
that want them in their models.

`upgrade`, `check` and `current` do what the commands of these names do. Each takes a database URL, or an `AsyncEngine`
of the program's own. Each is awaited where an event loop runs:

    await migrations.upgrade(engine)

and run by `asyncio.run` where none does, as in a script or in the settings of a deployment:

    asyncio.run(migrations.upgrade("postgresql://user:password@host/database"))

Code that cannot await although a loop runs in its thread, runs the latter in another thread, and with a URL, because an
engine's connections belong to the loop that opened them.

`upgrade` also takes a connection, and joins its transaction: an `AsyncConnection`, or, in a migration of the
application's, the `Connection` that Alembic has, with which nothing is awaited:

    def upgrade() -> None:
        migrations.upgrade(op.get_bind())

Importing this module imports Alembic.
"""

from __future__ import annotations

from mcp_session_store.sql.schema.autogenerate import include_name, metadata
from mcp_session_store.sql.schema.migrate import check, current, upgrade

__all__ = ["check", "current", "include_name", "metadata", "upgrade"]
