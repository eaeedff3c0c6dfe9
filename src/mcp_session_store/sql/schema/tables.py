"""The tables, as the statements and the migrations' tests see them."""

from __future__ import annotations

import functools
from typing import Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import MOMENT

__all__ = [
    "VERSION_TABLE",
    "events_table",
    "instances_table",
    "journal_table",
    "logs_table",
    "make_tables",
    "sessions_table",
]

VERSION_TABLE: Final = "mcp_session_version"
"""Where Alembic notes the revision: not `alembic_version`, which may be the application's."""


@functools.cache
def make_tables(schema: str | None = None) -> sa.MetaData:
    """All tables of this package, in a schema of the database."""
    metadata = sa.MetaData(schema=schema)
    # Tables lead with the session's key, so that they can be partitioned or distributed on it.
    sessions = sa.Table(
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
        # When something happened that copies in other instances must learn of: an end, a new revision.
        sa.Column("changed_at", MOMENT),
    )
    c = sessions.c
    # Live sessions have no `ended_at`: so each of these finds them in the order in which they were created, and
    # those that ended in the order in which they did.
    for name, looked_up_by in {
        "ended": [],
        "principal": [c.principal_digest],
        "client": [c.client_name],
        "instance": [c.instance_hint],
    }.items():
        sa.Index(f"ix_mcp_session_{name}", c.namespace, *looked_up_by, c.ended_at, c.created_at, c.key)
    for name, columns, where in (
        ("expires", [c.namespace, c.expires_at, c.key], c.ended_at.is_(None)),
        ("changed", [c.namespace, c.changed_at], c.changed_at.is_not(None)),
    ):
        sa.Index(f"ix_mcp_session_{name}", *columns, postgresql_where=where, sqlite_where=where)
    sa.Table(
        "mcp_session_journal",
        metadata,
        sa.Column("key", sa.Uuid, sa.ForeignKey(c.key, ondelete="CASCADE"), primary_key=True),
        sa.Column("method", sa.Text, primary_key=True),
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("params", sa.Text, nullable=False),
        # The session's, when the entry was last set: the order in which a restore replays.
        sa.Column("revision", sa.Integer, nullable=False),
    )
    # No foreign keys from here on: the SDK's own sessions have no row; and to drop a partition of a table with
    # one would lock the sessions.
    logs = sa.Table(
        "mcp_session_log",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        # Of the newest event. Who stores one locks this row to the commit, so that events appear in their order.
        sa.Column("sequence", sa.BigInteger, nullable=False),
        # Of all messages that were ever stored.
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        # Up to which sequence events were removed, and the total at that one.
        sa.Column("trimmed", sa.BigInteger, nullable=False),
        sa.Column("trimmed_bytes", sa.BigInteger, nullable=False),
        # When the oldest event that is kept was stored. Changes seldom, and so no index has to, when events are stored.
        sa.Column("oldest_at", MOMENT),
        # Until when another instance wants hints about it.
        sa.Column("followed_until", MOMENT),
    )
    sa.Index("ix_mcp_session_log_oldest", logs.c.namespace, logs.c.oldest_at, logs.c.key)
    # One index: what is asked for is always a range of one session's events. An event takes its place in it, and
    # in the table, beside those of its session.
    sa.Table(
        "mcp_session_event",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("previous", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        # Of the session's messages up to this one, of any stream.
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        # The last: to what comes after a long text, SQLite reads all of it.
        sa.Column("message", sa.Text),
    )
    sa.Table(
        "mcp_session_instance",
        metadata,
        # The unique part of the instance's id.
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("beat_at", MOMENT, nullable=False),
    )
    return metadata


def sessions_table(schema: str | None = None) -> sa.Table:
    """The table of sessions."""
    return _table("mcp_session", schema)


def journal_table(schema: str | None = None) -> sa.Table:
    """The table of the calls that a restore replays."""
    return _table("mcp_session_journal", schema)


def logs_table(schema: str | None = None) -> sa.Table:
    """The table of event logs, one for each session that has events."""
    return _table("mcp_session_log", schema)


def events_table(schema: str | None = None) -> sa.Table:
    """The table of events."""
    return _table("mcp_session_event", schema)


def instances_table(schema: str | None = None) -> sa.Table:
    """The table of the instances that run."""
    return _table("mcp_session_instance", schema)


def _table(name: str, schema: str | None) -> sa.Table:
    return make_tables(schema).tables[name if schema is None else f"{schema}.{name}"]
