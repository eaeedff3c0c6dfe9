"""Writing the state of sessions: all writes that wait, in one transaction that locks their sessions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from mcp_session_store.errors import StateConflict
from mcp_session_store.sql.dialects.functions import StoreClock, Unindexed
from mcp_session_store.sql.schema.tables import sessions_table, state_table
from mcp_session_store.sql.sessions.records import as_number
from mcp_session_store.sql.sessions.state import StateChanges, StateRow, StateTotal, state_row
from mcp_session_store.sql.sessions.statements import live, notify
from mcp_session_store.state_store import NO_VALUE, state_full

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.errors import SessionStoreError
    from mcp_session_store.records import NewState
    from mcp_session_store.retention import StatePolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["StateWrite", "StateWrites"]


@dataclass(frozen=True, slots=True)
class StateWrite:
    """A value to store, or to remove."""

    key: UUID
    name: str
    state: NewState | None
    """The value; `None` removes it."""
    expected: int | None
    """Version that it must have; `None`: any."""


@dataclass(slots=True)
class _Value:
    """A value as it is after the writes so far."""

    version: int
    size: int
    watched: bool
    is_over: bool = False
    stored: bool = True
    """Whether the table has a row of it."""
    row: StateRow | None = None
    """What a write has made of it; `None`: nothing yet."""


@dataclass(slots=True)
class _Session:
    """A session that is live and locked, as it is after the writes so far."""

    key: Any  # the driver's
    values: int
    size: int
    revision: int
    raised: int = 0
    has_made_room: bool = False
    changed: bool = False
    by_name: dict[str, _Value] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)


class StateWrites:
    """Statements that write the state of sessions of one namespace.

    A write locks its session first, so that no other comes between the comparison and the write, and the totals in the
    session's row are right.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
        policy: Bounds of the state of a session.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, policy: StatePolicy) -> None:
        self._dialect = dialect
        self._policy = policy
        self._changes = StateChanges(dialect, schema=schema, namespace=namespace)
        sessions, state, now = sessions_table(schema), state_table(schema), StoreClock()
        self._keys = dialect.batch("written", {"key": sa.Uuid()})
        self._lock = dialect.precompiled(
            sa.select(sessions.c.key, sessions.c.state_values, sessions.c.state_bytes, sessions.c.revision)
            .where(self._keys.in_batch(sessions.c.key), live(sessions, sa.literal(namespace, sa.Text), now))
            .order_by(sessions.c.key)
            .with_for_update(key_share=True)
        )
        self._names = dialect.batch("named", {"key": sa.Uuid(), "name": sa.Text()})
        is_over = sa.case((state.c.expires_at <= now, 1), else_=0)
        self._read = dialect.precompiled(
            sa.select(state.c.key, state.c.name, state.c.version, state.c.bytes, state.c.watched, is_over).join(
                self._names.rows, sa.and_(self._names.joined_on(state.c.key), state.c.name == self._names.c.name)
            )
        )
        self._remove_over = dialect.precompiled(
            sa.delete(state)
            .where(self._keys.in_batch(state.c.key), Unindexed(state.c.expires_at) <= now)
            .returning(state.c.name, state.c.bytes)
        )
        self._raised = dialect.batch("raised", {"key": sa.Uuid(), "by": sa.Integer()})
        raised = self._raised.c
        self._raise = dialect.precompiled(
            notify(
                dialect,
                sa.update(sessions)
                .where(self._raised.joined_on(sessions.c.key))
                .values(revision=sessions.c.revision + raised.by, changed_at=now)
                .returning(sessions.c.key),
            )
        )

    async def write(self, attempt: Attempt, writes: Sequence[StateWrite]) -> list[int | SessionStoreError | None]:
        """Write values, one after the other.

        Returns:
            For each the session's revision after it, the refusal, or `None` where the session is not live.
        """
        return await self._dialect.run(attempt.connection, self._write(writes), writes=True, atomic=True)

    def _write(self, writes: Sequence[StateWrite]) -> Steps[list[int | SessionStoreError | None]]:
        driver_keys = {key: self._dialect.driver_key(key) for key in sorted({w.key for w in writes}, key=as_number)}
        locked = yield self._lock, self._keys.parameters([(key,) for key in driver_keys.values()])
        by_driver_key = {row[0]: _Session(*row) for row in locked}
        sessions = {key: found for key, driver in driver_keys.items() if (found := by_driver_key.get(driver))}
        if not sessions:
            return [None] * len(writes)
        names = {(sessions[write.key].key, write.name) for write in writes if write.key in sessions}
        for key, name, version, size, watched, is_over in (yield self._read, self._names.parameters(sorted(names))):
            by_driver_key[key].by_name[name] = _Value(version, size, bool(watched), bool(is_over))
        results: list[int | SessionStoreError | None] = []
        for write in writes:
            session = sessions.get(write.key)
            results.append(None if session is None else (yield from self._write_one(session, write)))
        yield from self._store([session for session in sessions.values() if session.changed])
        return results

    def _write_one(self, session: _Session, write: StateWrite) -> Steps[int | SessionStoreError]:
        """Note a write of a session, and return the session's revision after it, or the refusal."""
        value = session.by_name.get(write.name)
        present = value is not None and not value.is_over
        version = value.version if value is not None and present else NO_VALUE
        if write.state is None:
            if value is None or not present:
                return session.revision
        elif version == write.state.version:
            return session.revision  # by an earlier try
        if write.expected not in (None, version):
            return StateConflict("the value has another version than the write expects")
        if write.state is None:
            assert value is not None
            self._note_removal(session, write.name, value)
            return self._revised(session, value.watched)
        row = state_row(session.key, write.state)
        if not self._fits(session, value, row) and not session.has_made_room:
            yield from self._make_room(session)
            value = session.by_name.get(write.name)
        if not self._fits(session, value, row):
            values, size = self._after(session, value, row)
            return state_full(self._policy, values=values, size=size)
        session.values, session.size = self._after(session, value, row)
        session.changed = True
        stored = write.name in session.removed or (value is not None and value.stored)
        session.removed.discard(write.name)
        session.by_name[write.name] = _Value(row.version, row.bytes, bool(row.watched), stored=stored, row=row)
        return self._revised(session, bool(row.watched) or (value is not None and value.watched))

    def _note_removal(self, session: _Session, name: str, value: _Value) -> None:
        session.values -= 1
        session.size -= value.size
        session.changed = True
        del session.by_name[name]
        if value.stored:
            session.removed.add(name)

    def _revised(self, session: _Session, raises: bool) -> int:
        session.raised += raises
        session.revision += raises
        return session.revision

    def _after(self, session: _Session, value: _Value | None, row: StateRow) -> tuple[int, int]:
        """Return number and bytes of a session's values after a write of one."""
        return session.values + (value is None), session.size - (0 if value is None else value.size) + row.bytes

    def _fits(self, session: _Session, value: _Value | None, row: StateRow) -> bool:
        values, size = self._after(session, value, row)
        return values <= self._policy.max_values_per_session and size <= self._policy.max_bytes_per_session

    def _make_room(self, session: _Session) -> Steps[None]:
        """Remove the values of a session whose time is over."""
        session.has_made_room = True
        for name, size in (yield self._remove_over, self._keys.parameters([(session.key,)])):
            value = session.by_name.get(name)
            if name in session.removed:
                session.removed.remove(name)
            elif value is not None and value.row is not None:
                value.stored = False  # counted when it was replaced
            else:
                session.values -= 1
                session.size -= size
                session.changed = True
                session.by_name.pop(name, None)

    def _store(self, sessions: Sequence[_Session]) -> Steps[None]:
        """Store what the writes have made of sessions."""
        if not sessions:
            return
        written = [value for session in sessions for value in session.by_name.values() if value.row is not None]
        yield from self._changes.change(
            [StateTotal(session.key, session.values, session.size) for session in sessions],
            inserted=[value.row for value in written if value.row is not None and not value.stored],
            replaced=[value.row for value in written if value.row is not None and value.stored],
            removed=[(session.key, name) for session in sessions for name in sorted(session.removed)],
        )
        if raised := [(session.key, session.raised) for session in sessions if session.raised]:
            yield self._raise, self._raised.parameters(raised)
