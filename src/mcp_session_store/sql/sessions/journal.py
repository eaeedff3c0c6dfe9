"""The journals of sessions: the calls that a restore replays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mcp_session_store.errors import JournalFull, RecordUnreadable
from mcp_session_store.records import JournalEntry
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import journal_table, sessions_table
from mcp_session_store.sql.sessions.decoding import is_readable_text
from mcp_session_store.sql.sessions.statements import live, notify
from mcp_session_store.store import MAX_JOURNAL_ENTRIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["EntryWrite", "JournalStatements"]


@dataclass(frozen=True, slots=True)
class EntryWrite:
    """An entry to set, or to remove where `params` is `None`."""

    key: UUID
    method: str
    subject: str
    params: str | None


class JournalStatements:
    """Statements on the journals of the sessions of one namespace, run for batches of calls.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        sessions, journal = sessions_table(schema), journal_table(schema)
        now = StoreClock()
        key, method, subject = (
            sa.bindparam("journal_key", type_=sa.Uuid),
            sa.bindparam("journal_method", type_=sa.Text),
            sa.bindparam("journal_subject", type_=sa.Text),
        )
        is_live = live(sessions, sa.literal(namespace, sa.Text), now)

        self._raise_revision = dialect.precompiled(
            notify(
                dialect,
                sa.update(sessions)
                .where(sessions.c.key == key, is_live)
                .values(revision=sessions.c.revision + 1, changed_at=now)
                .returning(sessions.c.key, sessions.c.revision),
            )
        )
        self._remove = dialect.precompiled(
            sa.delete(journal).where(journal.c.key == key, journal.c.method == method, journal.c.subject == subject)
        )
        self._count = dialect.precompiled(sa.select(sa.func.count()).where(journal.c.key == key))
        self._insert = dialect.precompiled(
            sa.insert(journal).values(
                key=key,
                method=method,
                subject=subject,
                params=sa.bindparam("journal_params", type_=sa.Text),
                revision=sa.bindparam("journal_revision", type_=sa.Integer),
            )
        )
        self._select = dialect.precompiled(
            sa.select(journal.c.method, journal.c.subject, journal.c.params, journal.c.revision)
            .join(sessions, sessions.c.key == journal.c.key)
            .where(journal.c.key == key, sessions.c.key == key, is_live)
            .order_by(journal.c.revision)
        )

    async def write(self, attempt: Attempt, writes: Sequence[EntryWrite]) -> list[int | JournalFull | None]:
        """Set or remove entries, one after the other.

        Returns:
            For each the session's new revision, the refusal, or `None` where the session is not live.
        """
        return [await self._write(attempt, write) for write in writes]

    async def _write(self, attempt: Attempt, write: EntryWrite) -> int | JournalFull | None:
        try:
            return await self._dialect.run(attempt.connection, self._write_one(write), writes=True, atomic=True)
        except JournalFull as full:
            return full

    def _write_one(self, write: EntryWrite) -> Steps[int | None]:
        key = {"journal_key": self._dialect.driver_key(write.key)}
        name = key | {"journal_method": write.method, "journal_subject": write.subject}
        # First, because it locks the session: other writers of its journal wait here.
        rows = yield self._raise_revision, key
        if not rows:
            return None
        revision: int = rows[0][1]
        yield self._remove, name
        if write.params is not None:
            ((count,),) = yield self._count, key
            if count >= MAX_JOURNAL_ENTRIES:
                raise JournalFull(f"the session has {MAX_JOURNAL_ENTRIES} journaled calls already; undo some first")
            yield self._insert, name | {"journal_params": write.params, "journal_revision": revision}
        return revision

    async def read(self, attempt: Attempt, keys: Sequence[UUID]) -> list[list[JournalEntry] | RecordUnreadable]:
        """Return the entries of each live session, in the order in which they were last set."""
        return await self._dialect.run(attempt.connection, self._read(keys), writes=False)

    def _read(self, keys: Sequence[UUID]) -> Steps[list[list[JournalEntry] | RecordUnreadable]]:
        journals: list[list[JournalEntry] | RecordUnreadable] = []
        for key in keys:
            rows = yield self._select, {"journal_key": self._dialect.driver_key(key)}
            if not all(is_readable_text(text) for row in rows for text in row[:3]):
                journals.append(RecordUnreadable("an entry of the journal"))
                continue
            journals.append(
                [
                    JournalEntry(
                        method=method,
                        subject=subject,
                        params=params,
                        # SQLite keeps what is no number, too.
                        revision=revision if isinstance(revision, int) else 0,
                    )
                    for method, subject, params, revision in rows
                ]
            )
        return journals
