"""Retention: indexes to sweep and to look sessions up by, the time of the last change, and the journal.

It only adds. Writers wait while the indexes are built, which takes as long as reading the table.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0002_retention"
down_revision = "1_0001_sessions"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")

LOOKED_UP_BY = {
    "ix_mcp_session_ended": ["namespace", "ended_at", "created_at", "key"],
    "ix_mcp_session_principal": ["namespace", "principal_digest", "ended_at", "created_at", "key"],
    "ix_mcp_session_client": ["namespace", "client_name", "ended_at", "created_at", "key"],
    "ix_mcp_session_instance": ["namespace", "instance_hint", "ended_at", "created_at", "key"],
}
PARTLY = {
    "ix_mcp_session_expires": (["namespace", "expires_at", "key"], "ended_at IS NULL"),
    "ix_mcp_session_changed": (["namespace", "changed_at"], "changed_at IS NOT NULL"),
}


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.add_column("mcp_session", sa.Column("changed_at", moment), schema=schema)
    for name, columns in LOOKED_UP_BY.items():
        op.create_index(name, "mcp_session", columns, schema=schema)
    for name, (columns, where) in PARTLY.items():
        condition = sa.text(where)
        op.create_index(name, "mcp_session", columns, schema=schema, postgresql_where=condition, sqlite_where=condition)
    session = "mcp_session.key" if schema is None else f"{schema}.mcp_session.key"
    op.create_table(
        "mcp_session_journal",
        sa.Column("key", sa.Uuid, sa.ForeignKey(session, ondelete="CASCADE"), primary_key=True),
        sa.Column("method", sa.Text, primary_key=True),
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        schema=schema,
    )


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    op.drop_table("mcp_session_journal", schema=schema)
    for name in [*PARTLY, *LOOKED_UP_BY]:
        op.drop_index(name, "mcp_session", schema=schema)
    op.drop_column("mcp_session", "changed_at", schema=schema)
