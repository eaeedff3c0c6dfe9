"""The tables, as the statements and the migrations' tests see them."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects import MOMENT

__all__ = ["VERSION_TABLE", "make_tables", "sessions_table"]

VERSION_TABLE: Final = "mcp_session_version"
"""Where Alembic notes the revision: not `alembic_version`, which may be the application's."""


def make_tables(schema: str | None = None) -> sa.MetaData:
    """All tables of this package, in a schema of the database."""
    metadata = sa.MetaData(schema=schema)
    # Tables lead with the session's key, so that they can be partitioned or distributed on it.
    sa.Table(
        "mcp_session",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        # TEXT, not JSONB, which rejects \u0000, reorders keys and drops duplicates.
        sa.Column("initialize_params", sa.Text, nullable=False),
        sa.Column("protocol_version", sa.Text, nullable=False),
        sa.Column("client_name", sa.Text, nullable=False),
        sa.Column("client_version", sa.Text, nullable=False),
        sa.Column("principal_digest", sa.Text),  # hexadecimal
        sa.Column("principal_display", sa.Text),
        sa.Column("instance_hint", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("last_seen_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("ended_at", MOMENT),
        sa.Column("end_reason", sa.Text),
        sa.Column("restores", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    return metadata


def sessions_table(schema: str | None = None) -> sa.Table:
    """The table of sessions."""
    metadata = make_tables(schema)
    return metadata.tables["mcp_session" if schema is None else f"{schema}.mcp_session"]
