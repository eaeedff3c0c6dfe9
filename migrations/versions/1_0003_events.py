"""Streams that resume: the events of sessions, their logs, and the running instances.

It only adds; a session that exists gets a log with its first event. The downgrade drops all events, and is refused
while their table is partitioned.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from alembic.util.exc import CommandError
from sqlalchemy.dialects import postgresql

revision = "1_0003_events"
down_revision = "1_0002_retention"
branch_labels = None
depends_on = None

# Whole milliseconds since 1970 on SQLite, which has no type for moments.
moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "mcp_session_log",
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("trimmed", sa.BigInteger, nullable=False),
        sa.Column("trimmed_bytes", sa.BigInteger, nullable=False),
        sa.Column("oldest_at", moment),
        sa.Column("followed_until", moment),
        schema=schema,
    )
    op.create_index("ix_mcp_session_log_oldest", "mcp_session_log", ["namespace", "oldest_at", "key"], schema=schema)
    op.create_table(
        "mcp_session_event",
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("previous", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("message", sa.Text),
        schema=schema,
    )
    op.create_table(
        "mcp_session_instance",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("beat_at", moment, nullable=False),
        schema=schema,
    )


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    if _is_partitioned(schema):
        advice = context.config.attributes["advice"]
        raise CommandError(f"the events are partitioned; first, {advice('events unpartition')}")
    op.drop_table("mcp_session_instance", schema=schema)
    op.drop_table("mcp_session_event", schema=schema)
    op.drop_index("ix_mcp_session_log_oldest", "mcp_session_log", schema=schema)
    op.drop_table("mcp_session_log", schema=schema)


def _is_partitioned(schema: str | None) -> bool:
    context = op.get_context()
    if context.as_sql or context.dialect.name != "postgresql":
        return False
    name = context.dialect.identifier_preparer.format_table(sa.table("mcp_session_event", schema=schema))
    found = sa.text("SELECT count(*) FROM pg_partitioned_table WHERE partrelid = to_regclass(CAST(:name AS text))")
    return bool(op.get_bind().execute(found, {"name": name}).scalar_one())
