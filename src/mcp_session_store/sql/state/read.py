"""Reading the state of sessions: one statement for all names that are asked for at the time, one for whole states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table, state_table
from mcp_session_store.sql.sessions.decoding import is_readable_text
from mcp_session_store.sql.sessions.statements import live
from mcp_session_store.state_store import StoredState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["StateRead", "StateReads"]

Values: TypeAlias = dict[str, StoredState]


@dataclass(frozen=True, slots=True)
class StateRead:
    """Values to read of a session: under these names, or all where there are none."""

    key: UUID
    names: Collection[str] | None


class StateReads:
    """Statements that read the state of live sessions of one namespace.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        sessions, state, now = sessions_table(schema), state_table(schema), StoreClock()
        is_live = live(sessions, sa.literal(namespace, sa.Text), now)
        not_over = sa.or_(state.c.expires_at.is_(None), now < state.c.expires_at)
        columns = (state.c.name, state.c.value, state.c.version)
        self._named = dialect.batch("asked", {"key": sa.Uuid(), "name": sa.Text()})
        named = self._named
        # One value after the other, because each is found by the table's primary key.
        found = (named.joined_on(state.c.key), state.c.name == named.c.name, not_over)
        self._read_named = dialect.precompiled(
            sa.select(named.c.key, *columns).select_from(
                named.rows.join(sessions, sa.and_(named.joined_on(sessions.c.key), is_live)).outerjoin(
                    state, sa.and_(*found)
                )
            )
        )
        self._whole = dialect.batch("whole", {"key": sa.Uuid()})
        self._read_whole = dialect.precompiled(
            sa.select(sessions.c.key, *columns)
            .select_from(
                sessions.outerjoin(
                    state, sa.and_(state.c.key == sessions.c.key, self._whole.in_batch(state.c.key), not_over)
                )
            )
            .where(self._whole.in_batch(sessions.c.key), is_live)
        )

    async def read(self, attempt: Attempt, reads: Sequence[StateRead]) -> list[Values | RecordUnreadable | None]:
        """Return the values that each call asks for, by name; `None` where the session is not live."""
        return await self._dialect.run(attempt.connection, self._read(reads), writes=False)

    def _read(self, reads: Sequence[StateRead]) -> Steps[list[Values | RecordUnreadable | None]]:
        driver_keys = {read.key: self._dialect.driver_key(read.key) for read in reads}
        named: dict[Any, Values | RecordUnreadable] = {}
        whole: dict[Any, Values | RecordUnreadable] = {}
        # A call that asks for no name still learns whether the session is live.
        asked = {(driver_keys[r.key], name) for r in reads if r.names is not None for name in (r.names or ("",))}
        if asked:
            named = self._by_key((yield self._read_named, self._named.parameters(sorted(asked))))
        if keys := {(driver_keys[read.key],) for read in reads if read.names is None}:
            whole = self._by_key((yield self._read_whole, self._whole.parameters(sorted(keys))))
        results: list[Values | RecordUnreadable | None] = []
        for read in reads:
            values = (whole if read.names is None else named).get(driver_keys[read.key])
            if isinstance(values, dict) and read.names is not None:
                values = {name: values[name] for name in read.names if name in values}
            results.append(values)
        return results

    def _by_key(self, rows: Rows) -> dict[Any, Values | RecordUnreadable]:
        """Return the values in rows by session; an error in place of those of a session with one that is unreadable."""
        by_key: dict[Any, Values | RecordUnreadable] = {}
        for key, name, value, version in rows:
            values = by_key.setdefault(key, {})
            if version is None or isinstance(values, RecordUnreadable):
                continue
            if is_readable_text(name) and is_readable_text(value) and isinstance(version, int):
                values[name] = StoredState(value, version)
            else:
                by_key[key] = RecordUnreadable("a value of the session's state")
        return by_key
