"""Locks of instances: the epoch in which an instance holds its lock, so that others learn of its death at once.

It only adds a column. Older versions leave it empty, and instances of theirs are judged by their heartbeats, as before.

On Postgres it needs the table of instances for itself for a moment, and heartbeats wait behind it meanwhile. So it
waits for running transactions for two seconds at most, then fails and changes nothing; run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "1_0006_instance_locks"
down_revision = "1_0005_event_compression"
branch_labels = None
depends_on = None


def upgrade() -> None:
    context = op.get_context()
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '2s'")
    op.add_column("mcp_session_instance", sa.Column("lock_epoch", sa.Text), schema=context.version_table_schema)
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout TO DEFAULT")


def downgrade() -> None:
    op.drop_column("mcp_session_instance", "lock_epoch", schema=op.get_context().version_table_schema)
