"""Session state in a SQL database: the contract of `StateStore` on Postgres and SQLite."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from mcp_session_store import telemetry
from mcp_session_store.errors import InvalidValue, RecordUnreadable, SessionStoreError
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.batching import Batcher, Lane
from mcp_session_store.sql.schema.tables import privileges_for_state
from mcp_session_store.sql.sessions.beside import BesideStore
from mcp_session_store.sql.state.read import StateRead, StateReads
from mcp_session_store.sql.state.sweep import StateSweep
from mcp_session_store.sql.state.write import StateWrite, StateWrites
from mcp_session_store.state_store import (
    STATE_SWEEP_LIMIT,
    StateStore,
    check_bounds,
    check_name,
    check_state,
)
from mcp_session_store.store import DEFAULT_NAMESPACE, check_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from uuid import UUID

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.records import NewState
    from mcp_session_store.retention import StatePolicy, StateSweepReport
    from mcp_session_store.sql.sessions.store import SqlSessionStore
    from mcp_session_store.state_store import StoredState

__all__ = ["SqlStateStore"]

READS_PER_STATEMENT = 50
"""Number of calls that one read serves at most, because each may return a mebibyte."""


class SqlStateStore(BesideStore, StateStore):
    """Session state in Postgres or SQLite, shared by any number of processes.

    Reads that are made at once share a query, and writes a transaction. All calls share the connections of the store.

    Args:
        where: The store of the sessions that the state belongs to, or a URL or engine of its database, as
            `SqlSessionStore` takes them. Of a store, the database, namespace and schema are taken, and its
            connections are used: it must stay open as long as this store of state.
        namespace: As for the store that the sessions are in.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        pool_size: As for `SqlSessionStore`, where its URL is given.
        timeout: Seconds that a call takes at most.
        policy: See `StateStore`.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """

    def __init__(
        self,
        where: SqlSessionStore | str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        auto_upgrade: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        pool_size: int | None = None,
        policy: StatePolicy | None = None,
    ) -> None:
        StateStore.__init__(self, policy=policy)
        super().__init__(
            where,
            namespace=namespace,
            schema=schema,
            auto_upgrade=auto_upgrade,
            timeout=timeout,
            pool_size=pool_size,
        )
        database = self._database
        dialect, schema, namespace = database.dialect, database.schema, self._namespace
        database.need(privileges_for_state(schema))
        self._state_writes = StateWrites(dialect, schema=schema, namespace=namespace, policy=self.policy)
        self._state_reads = StateReads(dialect, schema=schema, namespace=namespace)
        overlap = timedelta(seconds=2 * database.timeout)
        self._state_sweep = StateSweep(dialect, schema=schema, namespace=namespace, overlap=overlap)
        of = partial(telemetry.of_operation, namespace)
        self._gets = Batcher(
            database, self._state_reads.read, of("get_state"), writes=False, max_batch=READS_PER_STATEMENT
        )
        self._puts = Batcher(database, self._state_writes.write, of("write_state"), writes=True, weigh=_bytes_of)
        self._reads = Lane(database, of("state"), writes=False)
        self._sweeps = Lane(database, of("state_sweep"), writes=True)
        self._batchers = (self._gets, self._puts, self._reads, self._sweeps)

    async def get(self, key: UUID, names: Collection[str] | None = None) -> Mapping[str, StoredState] | None:
        check_keys(key)
        for name in names or ():
            check_name(name)
        try:
            found = await self._gets.submit(StateRead(key, names))
        except InvalidValue:
            raise RecordUnreadable("a value of the session's state that the driver does not read") from None
        if isinstance(found, RecordUnreadable):
            raise found
        return found

    async def put(self, key: UUID, state: NewState, *, expected: int | None = None) -> int | None:
        check_keys(key)
        check_state(state)
        check_bounds(self.policy, [state])
        return await self._write(StateWrite(key, state.name, state, expected))

    async def delete(self, key: UUID, name: str, *, expected: int | None = None) -> int | None:
        check_keys(key)
        check_name(name)
        return await self._write(StateWrite(key, name, None, expected))

    async def _write(self, write: StateWrite) -> int | None:
        outcome = await self._puts.submit(write)
        if isinstance(outcome, SessionStoreError):
            raise outcome
        return outcome

    async def sweep(self, *, limit: int = STATE_SWEEP_LIMIT) -> StateSweepReport:
        return await self._sweeps.run(lambda attempt: self._state_sweep.sweep(attempt, limit))


def _bytes_of(write: StateWrite) -> int:
    """Return about how many bytes of the application's a write has."""
    return 0 if write.state is None else len(write.state.value)
