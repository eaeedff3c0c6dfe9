"""The table of sessions.

It creates a table, and locks no other. The downgrade drops the table, and every session with it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0001_sessions"
down_revision = None
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "mcp_session",
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("initialize_params", sa.Text, nullable=False),
        sa.Column("protocol_version", sa.Text, nullable=False),
        sa.Column("client_name", sa.Text, nullable=False),
        sa.Column("client_version", sa.Text, nullable=False),
        sa.Column("principal_digest", sa.Text),
        sa.Column("principal_display", sa.Text),
        sa.Column("instance_hint", sa.Text, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("last_seen_at", moment, nullable=False),
        sa.Column("expires_at", moment),
        sa.Column("ended_at", moment),
        sa.Column("end_reason", sa.Text),
        sa.Column("restores", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        schema=schema,
    )


def downgrade() -> None:
    op.drop_table("mcp_session", schema=op.get_context().version_table_schema)
