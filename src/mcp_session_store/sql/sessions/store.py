"""Sessions in a SQL database: the contract of `SessionStore` on Postgres and SQLite."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

from mcp_session_store import telemetry
from mcp_session_store.activity import Touched, merged_activities
from mcp_session_store.errors import InvalidValue, RecordUnreadable, SchemaError, SessionConflict, SessionStoreError
from mcp_session_store.records import EndReason, check_session, check_texts
from mcp_session_store.retention import SweepReport
from mcp_session_store.settings import DEFAULT_TIMEOUT, checked_type
from mcp_session_store.sql.batching import Batcher, Lane
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.listening import Listening
from mcp_session_store.sql.notifications import SESSION_CHANNEL, Listener
from mcp_session_store.sql.schema.tables import privileges_for_sessions
from mcp_session_store.sql.schema.version import check_again
from mcp_session_store.sql.sessions.creation import Creation
from mcp_session_store.sql.sessions.journal import EntryWrite, JournalStatements
from mcp_session_store.sql.sessions.limits import Limits
from mcp_session_store.sql.sessions.records import Claim, Records, Touch
from mcp_session_store.sql.sessions.removal import End, SessionRemoval
from mcp_session_store.sql.sessions.state import StateChanges
from mcp_session_store.sql.sessions.statements import SessionStatements
from mcp_session_store.sql.sessions.sweep import Sweep, SweepResult, SweepStatements
from mcp_session_store.sql.sessions.values import ValueSweep
from mcp_session_store.state_store import check_state
from mcp_session_store.store import (
    DEFAULT_NAMESPACE,
    SWEEP_LIMIT,
    Absence,
    SessionStore,
    check_keys,
    checked_namespace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.activity import Activity, StreamHolder
    from mcp_session_store.records import Changes, JournalEntry, NewSession, SessionRecord
    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.database import Attempt

__all__ = ["SqlSessionStore"]

_T = TypeVar("_T")

TOUCHES_PER_STATEMENT: Final = 500
RECORDS_PER_STATEMENT: Final = 100
"""Number of records that a statement returns at most, because each may have 64 KiB of params, or as much as is set."""


class SqlSessionStore(SessionStore):
    """Sessions in Postgres or SQLite, shared by any number of processes.

    The database's schema must have been made by this package's migrations. An empty SQLite file is
    migrated on first use; any other database only with `auto_upgrade`. While a database is down, from the
    start or later, calls fail with `StoreUnavailable`.

    Calls of one kind that are made at once share a statement, and all calls share `pool_size` connections, on SQLite
    one at a time for all that write. One that is not needed is closed after ten seconds, but for the last. On Postgres
    `listen` takes one more; behind PgBouncer in transaction mode, where no hints arrive, it waits without one.

    Args:
        url_or_engine: `postgresql://user:password@host/database` or `sqlite:///path`, or an
            `AsyncEngine` with the driver asyncpg or aiosqlite. A given engine is used as it is: it is
            never disposed, and no PRAGMA is set on it. Its pool says how many connections there are; at most 11 are
            used at once, six more with an event log, and six with a mailbox; one for hints is taken out of it.
            Behind PgBouncer in transaction mode, give a URL with `?pgbouncer=true`; an engine works there
            from PgBouncer 1.21 on, with its `max_prepared_statements`.
        namespace: Keeps servers that share a database apart.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        timeout: Seconds that a call takes at most. It should be the same for all instances, see `changes`.
        pool_size: With a URL: connections for queries at most; 5 unless given here, or in the URL by `pool_size` or
            `connection_limit`. 1 works.
        retention: See `SessionStore`.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        auto_upgrade: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        pool_size: int | None = None,
        retention: RetentionPolicy | None = None,
    ) -> None:
        super().__init__(retention=retention)
        self._namespace = checked_namespace(namespace)
        database = self._database = Database(
            url_or_engine, schema=schema, auto_upgrade=auto_upgrade, timeout=timeout, pool_size=pool_size
        )
        dialect, schema = database.dialect, database.schema
        database.need(privileges_for_sessions(schema))
        overlap = timedelta(seconds=2 * self._database.timeout)
        self._removal = SessionRemoval(dialect, schema=schema, namespace=namespace)
        self._journal = JournalStatements(dialect, schema=schema, namespace=namespace)
        self._records = Records(dialect, self._for_policy(SessionStatements), overlap=overlap)
        self._creation = Creation(
            dialect,
            namespace=namespace,
            records=self._records,
            limits=self._for_policy(Limits),
            removal=self._removal,
            state=StateChanges(dialect, schema=schema, namespace=namespace),
        )
        self._sweep = Sweep(dialect, statements=self._for_policy(SweepStatements), removal=self._removal)
        self._listening = Listening(database)
        self._listener = Listener(self._listening)
        of = partial(telemetry.of_operation, namespace)
        self._pings = Batcher(database, self._check_again, of("ping"), writes=False)
        self._loads = Batcher(database, self._records.find, of("load"), writes=False, max_batch=RECORDS_PER_STATEMENT)
        self._creates = Batcher(database, self._creation.create, of("create"), writes=True, weigh=_params_of)
        self._claims = Batcher(database, self._records.claim, of("claim"), writes=True, max_batch=RECORDS_PER_STATEMENT)
        # Fewer than of the others, because each may have very many events, which are removed with it.
        self._ends = Batcher(database, self._removal.end, of("end"), writes=True, max_batch=20)
        # One call for each statement, because a second initialize within a session is rare, and a touch is a batch.
        self._replacements = Batcher(
            database, self._records.replace_initialize, of("replace_initialize"), writes=True, max_batch=1
        )
        self._touches = Batcher(database, self._records.touch, of("touch"), writes=True, max_batch=1)
        self._journal_writes = Batcher(database, self._journal.write, of("write_journal"), writes=True, max_batch=1)
        # One at a time, because each may have several MiB.
        self._journal_reads = Batcher(database, self._journal.read, of("read_journal"), writes=False, max_batch=1)
        self._polls = Batcher(database, self._records.changes, of("changes"), writes=False)
        self._sweep_looks = Lane(database, of("sweep"), writes=False)
        self._sweeps = Batcher(database, self._sweep.run, of("sweep"), writes=True, max_batch=1)
        values = ValueSweep(dialect, schema=schema, namespace=namespace)
        self._value_sweeps = Batcher(database, values.remove, of("value_sweep"), writes=True, max_batch=1)

    def _for_policy(self, statements: Callable[..., _T]) -> _T:
        """Build statements that follow the policy."""
        database = self._database
        return statements(database.dialect, schema=database.schema, namespace=self._namespace, retention=self.retention)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._database.shown_url} namespace={self._namespace!r}>"

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def database(self) -> Database:
        """Database of the sessions, which an event log shares."""
        return self._database

    @property
    def listening(self) -> Listening:
        """What hears the notifications of the database, for an event log and a mailbox beside this store."""
        return self._listening

    @property
    def retention(self) -> RetentionPolicy:
        return self._retention

    @retention.setter
    def retention(self, policy: RetentionPolicy) -> None:
        self._retention = self._checked_policy(policy)
        self._records.statements = self._for_policy(SessionStatements)
        self._creation.limits = self._for_policy(Limits)
        self._sweep.statements = self._for_policy(SweepStatements)

    async def open(self) -> None:
        self._database.reopen()
        await self.ping()

    async def aclose(self) -> None:
        self._database.close_to_calls()
        batchers: tuple[Batcher[Any, Any], ...] = (
            self._pings,
            self._loads,
            self._creates,
            self._claims,
            self._ends,
            self._replacements,
            self._touches,
            self._journal_writes,
            self._journal_reads,
            self._polls,
            self._sweep_looks,
            self._sweeps,
            self._value_sweeps,
        )
        await asyncio.gather(self._listening.aclose(), *(batcher.aclose() for batcher in batchers))
        await self._database.aclose()

    async def create(self, session: NewSession) -> SessionRecord:
        if session.key.__class__ is not UUID:  # without a call, because each handshake comes by here
            check_keys(session.key)
        check_session(session)
        for state in session.state:
            check_state(state)
        outcome = await self._creates.submit(session)
        if outcome is None:
            raise SessionConflict(f"another record stands under key {session.key}; create a new session id")
        if isinstance(outcome, SessionStoreError):
            raise outcome
        return outcome

    async def load(self, key: UUID) -> SessionRecord | None:
        record = await self.find(key)
        return None if isinstance(record, Absence) else record

    async def find(self, key: UUID) -> SessionRecord | Absence:
        check_keys(key)
        found = await _reading(self._loads, key)
        if isinstance(found, RecordUnreadable):
            raise found
        return found

    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        check_keys(key)
        check_texts(instance=instance)
        return _readable(await self._claims.submit(Claim(key, instance, restores)))

    async def replace_initialize(
        self,
        key: UUID,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
        check_keys(key)
        check_texts(
            initialize_params=initialize_params,
            protocol_version=protocol_version,
            client_name=client_name,
            client_version=client_version,
        )
        return await self._replacements.submit(
            {
                "replaced_key": key,
                "replaced_params": initialize_params,
                "replaced_protocol_version": protocol_version,
                "replaced_client_name": client_name,
                "replaced_client_version": client_version,
            }
        )

    async def write_journal(self, key: UUID, *, method: str, subject: str, params: str | None) -> int | None:
        check_keys(key)
        check_texts(method=method, subject=subject, params=params or "")
        outcome = await self._journal_writes.submit(EntryWrite(key, method, subject, params))
        if isinstance(outcome, SessionStoreError):
            raise outcome
        return outcome

    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        check_keys(key)
        return _readable(await _reading(self._journal_reads, key))

    async def touch(self, activities: Sequence[Activity]) -> Touched:
        called_at = asyncio.get_running_loop().time()
        check_keys(*[activity.key for activity in activities])
        for instance in {activity.claimed_by or "" for activity in activities}:
            check_texts(claimed_by=instance)
        # One for each session, because a statement changes a row once.
        rows = sorted(merged_activities(activities).values(), key=lambda activity: activity.key.int)
        not_live: set[UUID] = set()
        streams: dict[UUID, StreamHolder] = {}
        for start in range(0, len(rows), TOUCHES_PER_STATEMENT):
            touched = await self._touched(called_at, rows[start : start + TOUCHES_PER_STATEMENT])
            not_live |= touched.not_live
            streams |= touched.streams
        return Touched(not_live, streams)

    async def _touched(self, called_at: float, rows: Sequence[Activity]) -> Touched:
        try:
            return await self._touches.submit(Touch(called_at, rows))
        except InvalidValue:
            # A row that the driver cannot read must not keep the activity of other sessions from being stored. Its own
            # session is left as it is.
            if len(rows) == 1:
                return Touched(set(), {})
            middle = len(rows) // 2
            first, second = [await self._touched(called_at, half) for half in (rows[:middle], rows[middle:])]
            return Touched(first.not_live | second.not_live, {**first.streams, **second.streams})

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        check_keys(key)
        checked_type("reason", reason, EndReason, "an EndReason")
        return await self._ends.submit(End(key, reason))

    async def changes(self, since: datetime | None) -> Changes:
        """See `SessionStore.changes`.

        A change is dated when its statement runs, and visible when that is committed, so that a change with an
        earlier date may appear after one with a later date. At most the timeout lies between the two, because within
        it a call has ended, with the locks that it waits for, or is cancelled. So the changes returned
        begin twice that long before `since`; the second half is for a cancellation that takes its time, for
        an instance with a longer timeout, and for a clock that is set.
        """
        return await self._polls.submit(since)

    async def ping(self) -> None:
        """See `SessionStore.ping`. Pings that are made at once share a statement, which reads the schema's revision."""
        await self._pings.submit(None)

    async def _check_again(self, attempt: Attempt, pings: Sequence[None]) -> Sequence[None]:
        try:
            await check_again(attempt.connection, self._database.schema)
        except SchemaError:
            # The other calls then say it, too, until the schema fits.
            self._database.forget_contact()
            raise
        return pings

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        """See `SessionStore.listen`. On Postgres it takes a connection; on SQLite there are no hints."""
        await self._listener.listen(SESSION_CHANNEL, on_hint)

    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        *due, has_values = await self._sweep_looks.run(self._sweep.due)
        done: list[SweepResult] = []
        for step, was_due in zip(self._sweep.steps(limit), due, strict=True):
            # A session that the first step gives an expiry may have expired by it.
            is_due = was_due or (len(done) == 1 and done[0].handled > 0)
            done.append(await self._sweeps.submit(step) if step is not None and is_due else SweepResult())
        done.append(await self._value_sweeps.submit(limit) if has_values else SweepResult())
        return SweepReport(
            expired=done[1].handled,
            purged=done[2].handled,
            values=done[3].handled,
            more=any(result.more for result in done),
            longest=max(result.held_up for result in done),
            lives=done[1].lives,
        )


def _params_of(session: NewSession) -> int:
    """Return about how many bytes of the client's a session has."""
    return len(session.initialize_params) + sum(len(state.value) for state in session.state)


async def _reading(batcher: Batcher[UUID, _T], key: UUID) -> _T | RecordUnreadable:
    """Read what is stored under a key, where the driver may refuse the row."""
    try:
        return await batcher.submit(key)
    except InvalidValue:
        return RecordUnreadable("a value that the driver does not read")


def _readable(outcome: _T | RecordUnreadable) -> _T:
    if isinstance(outcome, RecordUnreadable):
        raise outcome
    return outcome
