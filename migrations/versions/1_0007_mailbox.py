"""The mailbox: messages between instances, and what an instance says of itself.

It only adds. Older versions leave the new columns empty, and an instance without a number is sent nothing.

On Postgres it needs the table of instances for itself for a moment, and heartbeats wait behind it meanwhile. So it
waits for running transactions for two seconds at most, then fails and changes nothing; run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0007_mailbox"
down_revision = "1_0006_instance_locks"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    is_postgres = op.get_context().dialect.name == "postgresql"
    op.create_table(
        "mcp_session_message",
        sa.Column("recipient", sa.Integer, primary_key=True),
        sa.Column("sender", sa.Integer, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("key", sa.Uuid, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        schema=schema,
    )
    op.create_index("ix_mcp_session_message_key", "mcp_session_message", ["key"], schema=schema)
    if is_postgres:
        _set_up_messages(schema)
        op.execute("SET LOCAL lock_timeout = '2s'")
    for name, type_ in (
        ("number", sa.Integer),
        ("namespace", sa.Text),
        ("server", sa.Text),
        ("version", sa.Text),
        ("residents", sa.Integer),
        ("streams", sa.Integer),
    ):
        op.add_column("mcp_session_instance", sa.Column(name, type_), schema=schema)
    op.create_index("ix_mcp_session_instance_number", "mcp_session_instance", ["number"], unique=True, schema=schema)
    if is_postgres:
        op.execute("SET LOCAL lock_timeout TO DEFAULT")


def _set_up_messages(schema: str | None) -> None:
    table = sa.table("mcp_session_message", schema=schema)
    name = op.get_context().dialect.identifier_preparer.format_table(table)
    # Messages live for milliseconds, for which compression is not worth its time.
    op.execute(f"ALTER TABLE {name} ALTER COLUMN body SET STORAGE EXTERNAL")
    # The table is empty nearly always. Were its file as small, Postgres would plan to read all of it, and keep to that
    # plan while it fills with rows that are removed already and another transaction keeps from being cleared away. So
    # the file gets a megabyte, and keeps it.
    op.execute(f"ALTER TABLE {name} SET (vacuum_truncate = false, toast.vacuum_truncate = true)")
    op.execute(
        f"INSERT INTO {name} (recipient, sender, sequence, key, kind, bytes, created_at, body) "  # noqa: S608
        "SELECT 0, 0, n, CAST('00000000-0000-0000-0000-000000000000' AS uuid), '', 0, now(), repeat('x', 1500) "
        "FROM generate_series(1, 640) AS n"
    )
    op.execute(f"DELETE FROM {name}")  # noqa: S608 - a quoted name


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    op.drop_index("ix_mcp_session_instance_number", "mcp_session_instance", schema=schema)
    for name in ("streams", "residents", "version", "server", "namespace", "number"):
        op.drop_column("mcp_session_instance", name, schema=schema)
    op.drop_index("ix_mcp_session_message_key", "mcp_session_message", schema=schema)
    op.drop_table("mcp_session_message", schema=schema)
