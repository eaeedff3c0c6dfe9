"""Stored rows are read one by one: a row that cannot be read, as after a change by hand, concerns no other.

A name that only a newer version of this package writes can be read: it is a text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.records import EndReason, Principal, SessionRecord
from mcp_session_store.sql.dialects.functions import MOMENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["end_reason", "is_readable_text", "read_record", "unreadable_columns"]


def read_record(
    dialect: Dialect, columns: Sequence[sa.Column[Any]], key: UUID, row: Sequence[Any]
) -> SessionRecord | RecordUnreadable:
    """Return the record in a row, or the error that says why it cannot be read.

    Args:
        dialect: The database's dialect.
        columns: The columns that `SessionStatements` selects. The time of the read, the sequence of the newest event
            and the watched values of the session's state may follow.
        key: The session's key.
        row: The row, as the driver returned it.
    """
    _, namespace, params, protocol_version, client_name, client_version, digest, display, instance_hint, *others = row
    restores, revision, *others = others
    moments, newest_event, watched = others[:4], others[4:5], others[5:]
    try:
        created_at, last_seen_at, expires_at, *loaded_at = dialect.moments(moments)
        principal = None if digest is None else Principal(digest=bytes.fromhex(digest), display=display or "")
        # One look at all texts: a value that is no text cannot be joined, and one that was no UTF-8 not encoded.
        texts = "".join(
            (namespace, params, protocol_version, client_name, client_version, display or "", instance_hint)
        )
        if not texts.isascii():
            texts.encode()
        if not isinstance(restores, int) or not isinstance(revision, int):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        # Not raised from here: these errors may hold what is stored.
        pass
    else:
        return SessionRecord(
            key=key,
            namespace=namespace,
            initialize_params=params,
            protocol_version=protocol_version,
            client_name=client_name,
            client_version=client_version,
            principal=principal,
            instance_hint=instance_hint,
            created_at=created_at,
            last_seen_at=last_seen_at,
            expires_at=expires_at,
            restores=restores,
            revision=revision,
            loaded_at=loaded_at[0] if loaded_at else None,
            newest_event=newest_event[0] if newest_event and isinstance(newest_event[0], int) else None,
            watched=_texts_by_name(watched[0]) if watched and watched[0] is not None else None,
        )
    unreadable = unreadable_columns(dialect, columns, row[: len(columns)])
    known = "principal_digest" not in unreadable
    return RecordUnreadable(
        ", ".join(unreadable),
        digest=bytes.fromhex(digest) if known and digest is not None else None,
        digest_known=known,
    )


def _texts_by_name(stored: object) -> dict[str, str] | None:
    """Return texts by name from a JSON object; `None` for an empty one, and for what is no such object."""
    try:
        texts = json.loads(stored) if isinstance(stored, str) else None
    except ValueError:
        return None
    return texts if texts and isinstance(texts, dict) else None


def unreadable_columns(dialect: Dialect, columns: Sequence[sa.Column[Any]], row: Sequence[Any]) -> list[str]:
    """Return the names of the columns of a row that hold what cannot be read.

    Args:
        dialect: The database's dialect.
        columns: The columns.
        row: Their values, as the driver returned them.
    """
    return [column.name for column, value in zip(columns, row, strict=True) if not _is_readable(dialect, column, value)]


def _is_readable(dialect: Dialect, column: sa.Column[Any], value: Any) -> bool:
    if value is None:
        return bool(column.nullable)
    if column.type is MOMENT:
        return _is_moment(dialect, value)
    if isinstance(column.type, sa.Uuid):
        return dialect.key(value) is not None
    if isinstance(column.type, sa.Integer):
        return isinstance(value, int)
    return is_readable_text(value) and (column.name != "principal_digest" or _is_hexadecimal(value))


def is_readable_text(value: object) -> bool:
    """Return whether a value that the driver returned is a text, and was UTF-8 in the database."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def _is_hexadecimal(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True


def _is_moment(dialect: Dialect, value: object) -> bool:
    try:
        dialect.moments([value])
    except (TypeError, OverflowError):
        return False
    return True


def end_reason(stored: Any) -> EndReason:
    """Return a stored reason; `EndReason.OPERATOR` for one that this version does not know."""
    try:
        return EndReason(stored)
    except ValueError:
        # A newer version of this package may know more reasons, and runs beside this one during a deploy.
        return EndReason.OPERATOR
