"""The tables, for statements and for the tests of the migrations."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import MOMENT

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "VERSION_TABLE",
    "events_table",
    "instances_table",
    "journal_table",
    "logs_table",
    "make_tables",
    "messages_table",
    "new_tables",
    "privileges_for_events",
    "privileges_for_mailbox",
    "privileges_for_sessions",
    "privileges_for_state",
    "privileges_for_values",
    "sessions_table",
    "state_table",
    "stream_messages_table",
    "values_table",
]

VERSION_TABLE: Final = "mcp_session_version"
"""Table in which Alembic keeps the revision; not `alembic_version`, which may be the application's."""


@functools.cache
def make_tables(schema: str | None = None) -> sa.MetaData:
    """Return all tables of this package, in a schema of the database."""
    return new_tables(schema)


def new_tables(schema: str | None) -> sa.MetaData:
    """Return all tables of this package, which the caller may add to."""
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
        # When the session last changed in a way that copies in other instances must learn of: an end, a new revision.
        sa.Column("changed_at", MOMENT),
        # Numbers of the instance that has the client's stream, and of the one from which it was taken last; the number
        # of times that it was taken; when it was opened.
        sa.Column("stream_holder", sa.Integer),
        sa.Column("stream_term", sa.Integer),
        sa.Column("stream_former", sa.Integer),
        sa.Column("stream_opened_at", MOMENT),
        # Number and bytes of the values of its state, names included.
        sa.Column("state_values", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("state_bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    )
    c = sessions.c
    # Live sessions have no `ended_at`. So each of these indexes finds live sessions in the order of their creation, and
    # ended ones in the order of their ends. There is none by client and none by instance, because a handshake, a claim
    # and an end would each pay for it: operators rarely list by these, and then read along `ended`.
    for name, first_columns in {"ended": [], "principal": [c.principal_digest]}.items():
        sa.Index(f"ix_mcp_session_{name}", c.namespace, *first_columns, c.ended_at, c.created_at, c.key)
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
        # Revision of the session when the entry was last set: the order in which a restore replays.
        sa.Column("revision", sa.Integer, nullable=False),
    )
    state = sa.Table(
        "mcp_session_state",
        metadata,
        sa.Column("key", sa.Uuid, sa.ForeignKey(c.key, ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        # Drawn at random by the writer.
        sa.Column("version", sa.BigInteger, nullable=False),
        # Of name and value.
        sa.Column("bytes", sa.Integer, nullable=False),
        # 1: loads of the session carry the value.
        sa.Column("watched", sa.Integer, nullable=False),
        # When its time is over; NULL: with its session.
        sa.Column("expires_at", MOMENT),
        # The last column, because SQLite reads all of a long text to reach the columns behind it.
        sa.Column("value", sa.Text, nullable=False),
    )
    has_end = state.c.expires_at.is_not(None)
    sa.Index(
        "ix_mcp_session_state_expires",
        state.c.namespace,
        state.c.expires_at,
        postgresql_where=has_end,
        sqlite_where=has_end,
    )
    # No foreign keys from here on, because dropping a partition of a table with one would lock the sessions.
    logs = sa.Table(
        "mcp_session_log",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        # Sequence of the newest event. An append locks this row until its commit, so that events appear in their order.
        sa.Column("sequence", sa.BigInteger, nullable=False),
        # Bytes of all messages that were ever stored.
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        # Sequence up to which events were removed, and `total_bytes` of that event.
        sa.Column("trimmed", sa.BigInteger, nullable=False),
        sa.Column("trimmed_bytes", sa.BigInteger, nullable=False),
        # When the oldest event that is left was stored. It rarely changes, so that appends rarely change its index.
        sa.Column("oldest_at", MOMENT),
        # When the notifications of new events end that another instance asked for.
        sa.Column("followed_until", MOMENT),
    )
    sa.Index("ix_mcp_session_log_oldest", logs.c.namespace, logs.c.oldest_at, logs.c.key)
    # One index, because each query is for a range of one session's events. In the index and in the table an event lies
    # beside the events of its session.
    sa.Table(
        "mcp_session_event",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("previous", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        # Bytes of the session's messages up to this one, of any stream.
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        # The last column, because SQLite reads all of a long text to reach the columns behind it.
        sa.Column("message", sa.Text),
    )
    instances = sa.Table(
        "mcp_session_instance",
        metadata,
        # Unique part of the instance's id.
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("instance", sa.Text, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("beat_at", MOMENT, nullable=False),
        # Epoch in which the instance holds its lock: of the server, or of the machine. NULL: it holds none.
        sa.Column("lock_epoch", sa.Text),
        # NULL: the instance is sent no messages. Older versions leave this and what follows empty.
        sa.Column("number", sa.Integer),
        sa.Column("namespace", sa.Text),
        sa.Column("server", sa.Text),
        sa.Column("version", sa.Text),
        sa.Column("residents", sa.Integer),
        sa.Column("streams", sa.Integer),
    )
    sa.Index("ix_mcp_session_instance_number", instances.c.number, unique=True)
    # It leads with the recipient and not with the session's key, because an instance reads what is for all its sessions
    # at once.
    messages = sa.Table(
        "mcp_session_message",
        metadata,
        # Numbers of instances.
        sa.Column("recipient", sa.Integer, primary_key=True),
        sa.Column("sender", sa.Integer, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("key", sa.Uuid, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        # Of the body.
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    # For the end of a session, which removes its messages.
    sa.Index("ix_mcp_session_message_key", messages.c.key)
    sa.Table(
        "mcp_session_stream_message",
        metadata,
        sa.Column("key", sa.Uuid, primary_key=True),
        # Number of an instance.
        sa.Column("sender", sa.Integer, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        # Of the body.
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        # Number of the instance that has taken it.
        sa.Column("taken_by", sa.Integer),
        # NULL: the message waits no more. It was given to the stream where an instance has taken it, else withdrawn.
        sa.Column("body", sa.Text),
    )
    # Values of no session, which `SqlKeyValue` keeps.
    values = sa.Table(
        "mcp_session_value",
        metadata,
        # Made of the namespace, the collection and the key that was given, none of which can be read from it.
        sa.Column("key", sa.Uuid, primary_key=True),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("collection", sa.Text, nullable=False),
        # Of the value.
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("value", sa.Text, nullable=False),
    )
    # For the sweep, and for the bytes of a namespace, which are then read from the index alone.
    sa.Index("ix_mcp_session_value_expires", values.c.namespace, values.c.expires_at, values.c.bytes)
    return metadata


def sessions_table(schema: str | None = None) -> sa.Table:
    """Return the table of sessions."""
    return _table("mcp_session", schema)


def journal_table(schema: str | None = None) -> sa.Table:
    """Return the table of the calls that a restore replays."""
    return _table("mcp_session_journal", schema)


def state_table(schema: str | None = None) -> sa.Table:
    """Return the table of the state of sessions."""
    return _table("mcp_session_state", schema)


def logs_table(schema: str | None = None) -> sa.Table:
    """Return the table of event logs, with a row for each session that has events."""
    return _table("mcp_session_log", schema)


def events_table(schema: str | None = None) -> sa.Table:
    """Return the table of events."""
    return _table("mcp_session_event", schema)


def instances_table(schema: str | None = None) -> sa.Table:
    """Return the table of running instances."""
    return _table("mcp_session_instance", schema)


def messages_table(schema: str | None = None) -> sa.Table:
    """Return the table of messages between instances."""
    return _table("mcp_session_message", schema)


def stream_messages_table(schema: str | None = None) -> sa.Table:
    """Return the table of messages for the streams of sessions."""
    return _table("mcp_session_stream_message", schema)


def values_table(schema: str | None = None) -> sa.Table:
    """Return the table of values that belong to no session."""
    return _table("mcp_session_value", schema)


_CHANGE: Final = "SELECT, INSERT, UPDATE, DELETE"


def privileges_for_sessions(schema: str | None = None) -> Mapping[sa.Table, str]:
    """Return the privileges that a store of sessions needs.

    The end of a session removes its events, messages and state, whether there are an event log, a mailbox and a store
    of state or not, and a sweep removes expired values, whether there is a `SqlKeyValue` or not.
    """
    return {
        sessions_table(schema): _CHANGE,
        journal_table(schema): _CHANGE,
        state_table(schema): "SELECT, INSERT, DELETE",
        # UPDATE where rows are locked before they are removed.
        logs_table(schema): "SELECT, UPDATE, DELETE",
        events_table(schema): "SELECT, DELETE",
        messages_table(schema): "SELECT, UPDATE, DELETE",
        stream_messages_table(schema): "SELECT, UPDATE, DELETE",
        values_table(schema): "SELECT, UPDATE, DELETE",
    }


def privileges_for_events(schema: str | None = None) -> Mapping[sa.Table, str]:
    """Return the privileges that an event log needs."""
    return {
        sessions_table(schema): "SELECT",
        logs_table(schema): _CHANGE,
        events_table(schema): "SELECT, INSERT, DELETE",
    }


def privileges_for_mailbox(schema: str | None = None) -> Mapping[sa.Table, str]:
    """Return the privileges that a mailbox needs."""
    return {
        sessions_table(schema): "SELECT",
        instances_table(schema): _CHANGE,
        messages_table(schema): _CHANGE,
        stream_messages_table(schema): _CHANGE,
    }


def privileges_for_state(schema: str | None = None) -> Mapping[sa.Table, str]:
    """Return the privileges that a store of state needs."""
    return {sessions_table(schema): "SELECT, UPDATE", state_table(schema): _CHANGE}


def privileges_for_values(schema: str | None = None) -> Mapping[sa.Table, str]:
    """Return the privileges that a `SqlKeyValue` needs."""
    return {values_table(schema): _CHANGE}


def _table(name: str, schema: str | None) -> sa.Table:
    return make_tables(schema).tables[name if schema is None else f"{schema}.{name}"]
