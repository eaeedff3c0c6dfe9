"""Streams: which instance has the client's stream of a session, and what waits for it.

It only adds. Older versions leave the new columns and the new table alone.

On Postgres it needs the table of sessions for itself for a moment, and requests wait behind it meanwhile. So it waits
for running transactions for two seconds at most, then fails and changes nothing; run it again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1_0009_streams"
down_revision = "1_0008_values"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
columns = (
    ("stream_holder", sa.Integer),
    ("stream_term", sa.Integer),
    ("stream_former", sa.Integer),
    ("stream_opened_at", moment),
)


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    is_postgres = op.get_context().dialect.name == "postgresql"
    op.create_table(
        "mcp_session_stream_message",
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("sender", sa.Integer, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("taken_by", sa.Integer),
        sa.Column("body", sa.Text),
        schema=schema,
    )
    if is_postgres:
        _set_up_messages(schema)
        op.execute("SET LOCAL lock_timeout = '2s'")
    for column, type_ in columns:
        op.add_column("mcp_session", sa.Column(column, type_), schema=schema)
    if is_postgres:
        op.execute("SET LOCAL lock_timeout TO DEFAULT")


def _set_up_messages(schema: str | None) -> None:
    table = sa.table("mcp_session_stream_message", schema=schema)
    name = op.get_context().dialect.identifier_preparer.format_table(table)
    # They live for milliseconds, for which compression is not worth its time.
    op.execute(f"ALTER TABLE {name} ALTER COLUMN body SET STORAGE EXTERNAL")
    # As for the table of messages: it is empty nearly always, and Postgres must not plan to read all of it. So its file
    # gets a megabyte, and keeps it.
    op.execute(f"ALTER TABLE {name} SET (vacuum_truncate = false, toast.vacuum_truncate = true)")
    op.execute(
        f"INSERT INTO {name} (key, sender, sequence, kind, bytes, created_at, body) "  # noqa: S608
        "SELECT CAST('00000000-0000-0000-0000-000000000000' AS uuid), 0, n, '', 0, now(), repeat('x', 1500) "
        "FROM generate_series(1, 640) AS n"
    )
    op.execute(f"DELETE FROM {name}")  # noqa: S608 - a quoted name


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    for column, _ in reversed(columns):
        op.drop_column("mcp_session", column, schema=schema)
    op.drop_table("mcp_session_stream_message", schema=schema)
