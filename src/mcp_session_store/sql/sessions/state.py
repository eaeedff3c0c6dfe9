"""Changes of the state of sessions: rows of values, and in the sessions' rows how many and how large they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import sessions_table, state_table
from mcp_session_store.state_store import state_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.sql.type_api import TypeEngine

    from mcp_session_store.records import NewSession, NewState
    from mcp_session_store.sql.dialects.compiled import Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["StateChanges", "StateRow", "StateTotal", "state_row"]


class StateRow(NamedTuple):
    """A value to be stored; the key is the driver's."""

    key: Any
    name: str
    version: int
    bytes: int
    watched: int
    ttl: float | None
    value: str


class StateTotal(NamedTuple):
    """Number and bytes of the values of a session; the key is the driver's."""

    key: Any
    state_values: int
    state_bytes: int


_TYPES: Final[dict[str, TypeEngine[Any]]] = {
    "key": sa.Uuid(),
    "name": sa.Text(),
    "version": sa.BigInteger(),
    "bytes": sa.Integer(),
    "watched": sa.Integer(),
    "ttl": sa.Double(),
    "value": sa.Text(),
}


class StateChanges:
    """Statements that change the state of sessions which the running transaction has locked or made.

    On Postgres the values and the totals of their sessions change in one statement.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the sessions.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str) -> None:
        self._dialect = dialect
        sessions, state = sessions_table(schema), state_table(schema)
        self._inserted = dialect.batch("inserted", _TYPES)
        self._replaced = dialect.batch("replaced", _TYPES)
        self._removed = dialect.batch("removed", {"key": sa.Uuid(), "name": sa.Text()})
        self._totals = dialect.batch(
            "totals", {"key": sa.Uuid(), "state_values": sa.Integer(), "state_bytes": sa.BigInteger()}
        )
        new = self._inserted.c
        values = {name: new[name] for name in _TYPES if name != "ttl"} | {
            "namespace": sa.literal(namespace, sa.Text),
            "expires_at": StoreClock(new.ttl),
        }
        insert = sa.insert(state).from_select(list(values), sa.select(*values.values()))
        replacing = self._replaced.c
        replace = (
            sa.update(state)
            .where(self._replaced.joined_on(state.c.key), state.c.name == replacing.name)
            .values(
                version=replacing.version,
                bytes=replacing.bytes,
                watched=replacing.watched,
                expires_at=StoreClock(replacing.ttl),
                value=replacing.value,
            )
        )
        remove = dialect.delete_joined(
            state, self._removed.joined_on(state.c.key), state.c.name == self._removed.c.name
        )
        totals = self._totals.c
        count = (
            sa.update(sessions)
            .where(self._totals.joined_on(sessions.c.key))
            .values(state_values=totals.state_values, state_bytes=totals.state_bytes)
        )
        if dialect.changes_in_with:
            for number, change in enumerate((insert, replace, remove)):
                count = count.add_cte(change.cte(f"change_{number}"))
            self._change_all = dialect.precompiled(count)
        else:
            self._insert, self._replace, self._remove, self._count = map(
                dialect.precompiled, (insert, replace, remove, count)
            )

    def change(
        self,
        totals: Sequence[StateTotal],
        *,
        inserted: Sequence[StateRow] = (),
        replaced: Sequence[StateRow] = (),
        removed: Sequence[tuple[Any, str]] = (),
    ) -> Steps[None]:
        """Change values, each of them once.

        Args:
            totals: What the sessions have after the change.
            inserted: Values under names that have none.
            replaced: Values in place of others.
            removed: Keys and names of the values to remove.
        """
        parameters = (
            self._inserted.parameters(inserted),
            self._replaced.parameters(replaced),
            self._removed.parameters(removed),
            self._totals.parameters(totals),
        )
        if self._dialect.changes_in_with:
            first, *others = parameters
            for other in others:
                first |= other
            yield self._change_all, first
            return
        statements = (self._insert, self._replace, self._remove, self._count)
        for rows, statement, given in zip((inserted, replaced, removed, totals), statements, parameters, strict=True):
            if rows:
                yield statement, given

    def store_new(self, sessions: Sequence[NewSession]) -> Steps[None]:
        """Store the state that comes with sessions which the running transaction has made."""
        rows, totals = [], []
        for session in sessions:
            key = self._dialect.driver_key(session.key)
            # Of several under one name the last one counts.
            last = {state.name: state for state in session.state}.values()
            of_session = [state_row(key, state) for state in last]
            rows += of_session
            totals.append(StateTotal(key, len(of_session), sum(row.bytes for row in of_session)))
        yield from self.change(totals, inserted=rows)


def state_row(key: Any, state: NewState) -> StateRow:
    """Return a value as a row of the driver."""
    size = state_bytes(state)
    return StateRow(key, state.name, state.version, size, int(state.watched), state.ttl, state.value)
