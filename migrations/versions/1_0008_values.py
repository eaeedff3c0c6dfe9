"""Values that belong to no session, such as the logins of an OAuth proxy.

It only adds. Older versions leave the table alone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0008_values"
down_revision = "1_0007_mailbox"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "mcp_session_value",
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("collection", sa.Text, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("expires_at", moment),
        sa.Column("value", sa.Text, nullable=False),
        schema=schema,
    )
    op.create_index(
        "ix_mcp_session_value_expires", "mcp_session_value", ["namespace", "expires_at", "bytes"], schema=schema
    )


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    op.drop_index("ix_mcp_session_value_expires", "mcp_session_value", schema=schema)
    op.drop_table("mcp_session_value", schema=schema)
