"""Migrate the database from a program, as `mcp-session-store upgrade`, `check` and `current` do.

Each function takes a database URL, or an `AsyncEngine` of the program's own. Each is awaited where an event loop runs:

    await migrations.upgrade(engine)

and run by `asyncio.run` where none does, as in a script or in the settings of a deployment:

    asyncio.run(migrations.upgrade("postgresql://user:password@host/database"))

Code that cannot await although a loop runs in its thread, runs the latter in another thread, and with a URL, because an
engine's connections belong to the loop that opened them.

Importing this module imports Alembic.
"""

from __future__ import annotations

from mcp_session_store.sql.schema.migrate import check, current, upgrade

__all__ = ["check", "current", "upgrade"]
