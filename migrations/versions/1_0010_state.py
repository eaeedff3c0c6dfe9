"""State of sessions: named values of the application's, and in each session's row how many and how large they are.

It only adds. An older version that ends a session leaves its values, which a sweep of a newer one removes, or the purge
of the session's tombstone.

On Postgres it needs the table of sessions for itself for a moment, and requests wait behind it meanwhile. So it waits
for running transactions for two seconds at most, then fails and changes nothing; run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0010_state"
down_revision = "1_0009_streams"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")

HAS_END = sa.text("expires_at IS NOT NULL")


def upgrade() -> None:
    context = op.get_context()
    schema = context.version_table_schema
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '2s'")
    for name, type_ in (("state_values", sa.Integer), ("state_bytes", sa.BigInteger)):
        column = sa.Column(name, type_, nullable=False, server_default=sa.text("0"))
        op.add_column("mcp_session", column, schema=schema)
    session = "mcp_session.key" if schema is None else f"{schema}.mcp_session.key"
    op.create_table(
        "mcp_session_state",
        sa.Column("key", sa.Uuid, sa.ForeignKey(session, ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("watched", sa.Integer, nullable=False),
        sa.Column("expires_at", moment),
        sa.Column("value", sa.Text, nullable=False),
        schema=schema,
    )
    if context.dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout TO DEFAULT")
    op.create_index(
        "ix_mcp_session_state_expires",
        "mcp_session_state",
        ["namespace", "expires_at"],
        schema=schema,
        postgresql_where=HAS_END,
        sqlite_where=HAS_END,
    )


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    op.drop_index("ix_mcp_session_state_expires", "mcp_session_state", schema=schema)
    op.drop_table("mcp_session_state", schema=schema)
    for name in ("state_bytes", "state_values"):
        op.drop_column("mcp_session", name, schema=schema)
