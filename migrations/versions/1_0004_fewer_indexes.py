"""Fewer indexes: the sessions of a client, or of an instance, are found along the index of all sessions.

It drops two indexes that each handshake, claim and end changed for the sake of two filters of the command line. Older
versions of this package run on it as before; only their lists by these filters take longer.

On Postgres it needs the table for itself for a moment, and everything else waits behind it meanwhile. So it waits for
running transactions for two seconds at most, then fails and changes nothing; run it again. The downgrade builds the
indexes, which takes as long as reading the table; writers wait for it.
"""

from __future__ import annotations

from alembic import op

revision = "1_0004_fewer_indexes"
down_revision = "1_0003_events"
branch_labels = None
depends_on = None

DROPPED = {"ix_mcp_session_client": "client_name", "ix_mcp_session_instance": "instance_hint"}


def upgrade() -> None:
    context = op.get_context()
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '2s'")
    for name in DROPPED:
        op.drop_index(name, "mcp_session", schema=context.version_table_schema)
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout TO DEFAULT")


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    for name, column in DROPPED.items():
        op.create_index(name, "mcp_session", ["namespace", column, "ended_at", "created_at", "key"], schema=schema)
