"""Sessions in a SQL database: the contract of `SessionStore` on Postgres and SQLite."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import ConfigurationError, SessionConflict, SessionStoreError
from mcp_session_store.records import Change, Changes, EndReason, JournalEntry, Principal, SessionRecord
from mcp_session_store.retention import SweepReport
from mcp_session_store.sql.batching import Batcher
from mcp_session_store.sql.database import Database, transaction
from mcp_session_store.sql.events.trim import EventRemoval
from mcp_session_store.sql.notifications import Listener
from mcp_session_store.sql.sessions.journal import Journal, JournalWrite
from mcp_session_store.sql.sessions.limits import Limits
from mcp_session_store.sql.sessions.statements import SessionStatements
from mcp_session_store.sql.sessions.sweep import SweepStatements
from mcp_session_store.store import DEFAULT_NAMESPACE, SWEEP_LIMIT, SessionStore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.errors import JournalFull, SessionLimitReached
    from mcp_session_store.records import Activity, NewSession
    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.sql.database import Attempt

__all__ = ["DEFAULT_TIMEOUT", "SqlSessionStore"]

DEFAULT_TIMEOUT: Final = 5.0

TOUCHES_PER_STATEMENT: Final = 500
EVENTS_PER_SWEEP: Final = 20_000
"""Events that the sessions have together which one step of a sweep ends, unless a single one has more."""


@dataclass(frozen=True, slots=True)
class _Claim:
    key: UUID
    instance: str
    restores: int


@dataclass(frozen=True, slots=True)
class _Touch:
    called_at: float
    """By the event loop's clock: from then on the ages count back."""
    rows: Sequence[tuple[UUID, float, float]]
    """Keys, first and last ages."""


@dataclass(frozen=True, slots=True)
class _End:
    key: UUID
    reason: EndReason


@dataclass(frozen=True, slots=True)
class _SweepStep:
    statement: sa.Executable
    limit: int
    ends: bool
    """Whether the sessions that it handles have ended."""
    candidates: sa.Executable | None = None
    """Tells which sessions it is about to end: those with very many events are fewer at a time."""


class SqlSessionStore(SessionStore):
    """Sessions in Postgres or SQLite, shared by any number of processes.

    The database's schema must have been made by this package's migrations. An empty SQLite file is
    migrated on first use; any other database only with `auto_upgrade`. A database that is down when
    the store is made, or later, makes calls fail with `StoreUnavailable` until it is back.

    Calls of one kind that are made at once share a statement. A store uses at most one connection for
    each kind, and on SQLite one at a time for all that write. On Postgres `listen` takes one more, which
    does not count in the pool; behind PgBouncer in transaction mode no hints arrive, and it waits without one.

    Args:
        url_or_engine: `postgresql://user:password@host/database` or `sqlite:///path`, or an
            `AsyncEngine` with the driver asyncpg or aiosqlite. A given engine is used as it is, and
            never disposed; no PRAGMA is set on it. It should have a pool of at least
            5 connections; 12 are the most that are used, one of them for hints, for as long as an app runs, and 5 more
            with an event log.
            Behind PgBouncer in transaction mode, give a URL with `?pgbouncer=true`; an engine works there
            from PgBouncer 1.21 on, with its `max_prepared_statements`.
        namespace: Keeps servers that share a database apart.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        timeout: Seconds that a call takes at most. It should be the same for all instances, see `changes`.
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
        retention: RetentionPolicy | None = None,
    ) -> None:
        super().__init__(retention=retention)
        if not isinstance(namespace, str) or not namespace or "\0" in namespace:
            raise ConfigurationError(f"namespace={namespace!r} must be a text that is not empty, without NUL")
        self._namespace = namespace
        self._database = Database(url_or_engine, schema=schema, auto_upgrade=auto_upgrade, timeout=timeout)
        self._build_statements()
        self._listener = Listener(self._database, self._database.dialect.channel)
        self._contacts = Batcher(self._database, _make_contact, writes=False)
        self._loads = Batcher(self._database, self._load_all, writes=False)
        self._creates = Batcher(self._database, self._create_all, writes=True)
        self._claims = Batcher(self._database, self._claim_all, writes=True)
        # Fewer than of the others: each may have very many events, and all of them go with it.
        self._ends = Batcher(self._database, self._end_all, writes=True, max_batch=20)
        # One item for each statement: a second initialize within a session is rare, and a touch is a batch.
        self._replacements = Batcher(self._database, self._replace_one, writes=True, max_batch=1)
        self._touches = Batcher(self._database, self._touch_one, writes=True, max_batch=1)
        self._journal_writes = Batcher(self._database, self._write_journal_one, writes=True, max_batch=1)
        self._journal_reads = Batcher(self._database, self._read_journal_each, writes=False)
        self._polls = Batcher(self._database, self._poll_each, writes=False)
        self._sweeps = Batcher(self._database, self._sweep_one, writes=True, max_batch=1)

    def _build_statements(self) -> None:
        dialect, schema, namespace = self._database.dialect, self._database.schema, self._namespace
        self._sql = SessionStatements(dialect, schema=schema, namespace=namespace, retention=self.retention)
        self._sweeping = SweepStatements(dialect, schema=schema, namespace=namespace, retention=self.retention)
        self._limits = Limits(dialect, schema=schema, namespace=namespace, retention=self.retention)
        self._journal = Journal(dialect, schema=schema, namespace=namespace)
        self._removal = EventRemoval(dialect, schema=schema)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._database.shown_url} namespace={self._namespace!r}>"

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def database(self) -> Database:
        """Where the sessions are; the log of their events is there, too."""
        return self._database

    @property
    def retention(self) -> RetentionPolicy:
        return self._retention

    @retention.setter
    def retention(self, policy: RetentionPolicy) -> None:
        self._retention = policy
        self._build_statements()

    async def open(self) -> None:
        self._database.reopen()
        await self._contacts.submit(None)

    async def aclose(self) -> None:
        self._database.close_to_calls()
        batchers: tuple[Batcher[Any, Any], ...] = (
            self._contacts,
            self._loads,
            self._creates,
            self._claims,
            self._ends,
            self._replacements,
            self._touches,
            self._journal_writes,
            self._journal_reads,
            self._polls,
            self._sweeps,
        )
        await asyncio.gather(self._listener.aclose(), *(batcher.aclose() for batcher in batchers))
        await self._database.aclose()

    async def create(self, session: NewSession) -> SessionRecord:
        outcome = await self._creates.submit(session)
        if outcome is None:
            raise SessionConflict(f"another record stands under key {session.key}; create a new session id")
        if isinstance(outcome, SessionStoreError):
            raise outcome
        return outcome

    async def load(self, key: UUID) -> SessionRecord | None:
        return await self._loads.submit(key)

    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        return await self._claims.submit(_Claim(key, instance, restores))

    async def replace_initialize(
        self,
        key: UUID,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
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
        outcome = await self._journal_writes.submit(JournalWrite(key, method, subject, params))
        if isinstance(outcome, SessionStoreError):
            raise outcome
        return outcome

    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        return await self._journal_reads.submit(key)

    async def touch(self, activities: Sequence[Activity]) -> set[UUID]:
        called_at = asyncio.get_running_loop().time()
        # Several activities of one session are one: a statement changes a row once.
        ages: dict[UUID, tuple[float, float]] = {}
        for activity in activities:
            first, last = ages.get(activity.key, (activity.first_age, activity.last_age))
            ages[activity.key] = max(first, activity.first_age), min(last, activity.last_age)
        rows = [(key, first, last) for key, (first, last) in sorted(ages.items())]
        not_live: set[UUID] = set()
        for start in range(0, len(rows), TOUCHES_PER_STATEMENT):
            not_live |= await self._touches.submit(_Touch(called_at, rows[start : start + TOUCHES_PER_STATEMENT]))
        return not_live

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        return await self._ends.submit(_End(key, reason))

    async def changes(self, since: datetime | None) -> Changes:
        """See `SessionStore.changes`.

        A change is dated when its statement runs, and can be seen when that is committed, so that one with an
        earlier date may appear after one with a later. Between the two lies the timeout at most: within it all
        that a call does has ended, with the locks that it waits for, or is cancelled. So what is told
        begins twice as long before `since`; the rest is for a cancellation that takes its time, for
        an instance with a longer timeout, and for a clock that is set.
        """
        return await self._polls.submit(since)

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        """See `SessionStore.listen`. On Postgres it takes a connection of its own, on SQLite there are no hints."""
        await self._listener.listen(on_hint)

    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        sql = self._sweeping
        steps = [
            None if sql.give_expiry is None else _SweepStep(sql.give_expiry, limit, ends=False),
            _SweepStep(sql.end_expired, limit, ends=True, candidates=sql.expired),
            None if sql.remove_tombstones is None else _SweepStep(sql.remove_tombstones, limit, ends=True),
        ]
        done = [(0, False) if step is None else await self._sweeps.submit(step) for step in steps]
        return SweepReport(expired=done[1][0], purged=done[2][0], more=any(more for _, more in done))

    async def _load_all(self, attempt: Attempt, keys: Sequence[UUID]) -> list[SessionRecord | None]:
        records = await self._load_live(attempt, set(keys))
        return [records.get(key) for key in keys]

    async def _load_live(self, attempt: Attempt, keys: set[UUID]) -> dict[UUID, SessionRecord]:
        parameters = self._sql.loads.parameters([(key,) for key in keys])
        result = await attempt.connection.execute(self._sql.load, parameters)
        return {row[0]: _record(row) for row in result}

    async def _create_all(
        self, attempt: Attempt, sessions: Sequence[NewSession]
    ) -> list[SessionRecord | SessionLimitReached | None]:
        """The records; `None` where another one stands under the key."""
        # Of several for one key the first is created, and the others find it there.
        first: dict[UUID, NewSession] = {}
        for session in sessions:
            first.setdefault(session.key, session)
        wanted = [first[key] for key in sorted(first)]
        refused: Mapping[UUID, SessionLimitReached] = {}
        if self._limits.concern(wanted):
            records, refused = await self._create_within_limits(attempt, wanted)
        else:
            records = await self._insert(attempt, wanted)
        if present := first.keys() - records.keys() - refused.keys():
            records |= await self._load_live(attempt, present)
        return [
            refused[session.key]
            if session.key in refused
            else record
            if (record := records.get(session.key)) is not None and _same(record, session)
            else None
            for session in sessions
        ]

    async def _insert(self, attempt: Attempt, sessions: Sequence[NewSession]) -> dict[UUID, SessionRecord]:
        """The records of those under whose key nothing was stored."""
        by_key = {session.key: session for session in sessions}
        parameters = self._sql.creates.parameters([_create_row(session) for session in sessions])
        result = await attempt.connection.execute(self._sql.create, parameters)
        return {
            key: _new_record(by_key[key], self._namespace, created_at, last_seen_at, expires_at)
            for key, created_at, last_seen_at, expires_at in result
        }

    async def _create_within_limits(
        self, attempt: Attempt, sessions: Sequence[NewSession]
    ) -> tuple[dict[UUID, SessionRecord], dict[UUID, SessionLimitReached]]:
        limits = self._limits
        async with transaction(attempt.connection, self._database.dialect):
            await limits.lock(attempt, sessions)
            new = await limits.new_among(attempt, sessions)
            refused, removed = await limits.refuse(attempt, new)
            await self._forget(attempt, removed)
            admitted = [session for session in new if session.key not in refused]
            records = await self._insert(attempt, admitted) if admitted else {}
            excess = await limits.excess(attempt, [session for session in admitted if session.key in records])
            if excess:
                await self._end(attempt, [(key, EndReason.LIMIT.value) for key in sorted(excess)])
        return records, refused

    async def _claim_all(self, attempt: Attempt, claims: Sequence[_Claim]) -> list[SessionRecord | None]:
        results: dict[int, SessionRecord | None] = {}
        remaining = dict(enumerate(claims))
        while remaining:
            # A statement changes a row once, and each claim of a session counts: so one round for each.
            turn: dict[UUID, int] = {}
            for position, claim in remaining.items():
                turn.setdefault(claim.key, position)
            rows = [
                (key, remaining[position].instance, remaining[position].restores)
                for key, position in sorted(turn.items())
            ]
            result = await attempt.connection.execute(self._sql.claim, self._sql.claims.parameters(rows))
            records = {row[0]: _record(row) for row in result}
            for key, position in turn.items():
                results[position] = records.get(key)
                del remaining[position]
        return [results[position] for position in range(len(claims))]

    async def _replace_one(self, attempt: Attempt, replacements: Sequence[dict[str, Any]]) -> list[bool]:
        return [
            (await attempt.connection.execute(self._sql.replace_initialize, replacement)).first() is not None
            for replacement in replacements
        ]

    async def _touch_one(self, attempt: Attempt, touches: Sequence[_Touch]) -> list[set[UUID]]:
        not_live = []
        for touch in touches:
            # What was waited for since, a connection or another try, has made it all older.
            waited = asyncio.get_running_loop().time() - touch.called_at
            rows = [(key, first + waited, last + waited) for key, first, last in touch.rows]
            result = await attempt.connection.execute(self._sql.touch, self._sql.touches.parameters(rows))
            is_live = {key for key, expires_at, now in result if expires_at is None or now < expires_at}
            not_live.append({key for key, _, _ in rows} - is_live)
        return not_live

    async def _end_all(self, attempt: Attempt, ends: Sequence[_End]) -> list[bool]:
        # Of several for one session the first ends it, and the others find it ended.
        first: dict[UUID, _End] = {}
        for end in ends:
            first.setdefault(end.key, end)
        rows = [(key, first[key].reason.value) for key in sorted(first)]
        async with transaction(attempt.connection, self._database.dialect):
            ended = await self._end(attempt, rows)
        if attempt.repeated and first.keys() - ended:
            # The first try's commit may have been what ended them, and its answer was lost.
            parameters = self._sql.ends.parameters(rows)
            result = await attempt.connection.execute(self._sql.ended_for_that_reason, parameters)
            ended |= {row.key for row in result}
        return [end is first[end.key] and end.key in ended for end in ends]

    async def _end(self, attempt: Attempt, rows: Sequence[tuple[UUID, str]]) -> set[UUID]:
        """End live sessions, each for its reason, within a transaction; the keys of those that were."""
        result = (await attempt.connection.execute(self._sql.end, self._sql.ends.parameters(rows))).all()
        await self._forget(attempt, [(row.key, row.revision) for row in result])
        return {row.key for row in result}

    async def _forget(self, attempt: Attempt, ended: Collection[tuple[UUID, int]]) -> None:
        """Remove what sessions that ended within this transaction had.

        Args:
            attempt: Where from.
            ended: Their keys and revisions.
        """
        await self._journal.forget_all(attempt, ended)
        await self._removal.forget_all(attempt, [key for key, _ in ended])

    async def _write_journal_one(
        self, attempt: Attempt, writes: Sequence[JournalWrite]
    ) -> list[int | JournalFull | None]:
        return [await self._journal.write(attempt, write) for write in writes]

    async def _read_journal_each(self, attempt: Attempt, keys: Sequence[UUID]) -> list[list[JournalEntry]]:
        return [await self._journal.entries(attempt, key) for key in keys]

    async def _poll_each(self, attempt: Attempt, polls: Sequence[datetime | None]) -> list[Changes]:
        return [await self._poll(attempt, since) for since in polls]

    async def _poll(self, attempt: Attempt, since: datetime | None) -> Changes:
        if since is None:
            return Changes([], until=(await attempt.connection.execute(self._sql.until)).scalar_one())
        overlap = timedelta(seconds=2 * self._database.timeout)
        rows = (await attempt.connection.execute(self._sql.changes, {"changed_since": since - overlap})).all()
        changes = [
            Change(key=key, revision=revision, ended=None if reason is None else _end_reason(reason))
            for _, key, revision, reason in rows
            if key is not None
        ]
        return Changes(changes, until=rows[0].until)

    async def _sweep_one(self, attempt: Attempt, steps: Sequence[_SweepStep]) -> list[tuple[int, bool]]:
        return [await self._sweep_some(attempt, step) for step in steps]

    async def _sweep_some(self, attempt: Attempt, step: _SweepStep) -> tuple[int, bool]:
        """How many sessions a step has handled, and whether there may be more."""
        execute = attempt.connection.execute
        if not step.ends:
            handled = len((await execute(step.statement, {"limit": step.limit})).all())
            return handled, handled == step.limit
        limit = step.limit
        if step.candidates is not None:
            keys = list((await execute(step.candidates, {"limit": limit})).scalars())
            if not keys:
                return 0, False
            totals = accumulate(await self._removal.counts(attempt, keys))
            few = sum(total <= EVENTS_PER_SWEEP for total in totals)
            limit = limit if few == len(keys) else max(1, few)
        async with transaction(attempt.connection, self._database.dialect):
            result = (await execute(step.statement, {"limit": limit})).all()
            await self._forget(attempt, [(row.key, row.revision) for row in result])
        return len(result), len(result) == limit


def _end_reason(stored: str) -> EndReason:
    try:
        return EndReason(stored)
    except ValueError:
        # A newer version of this package, which runs beside this one during a deploy, may know more of them.
        return EndReason.OPERATOR


async def _make_contact(attempt: Attempt, openings: Sequence[None]) -> Sequence[None]:
    await attempt.connection.exec_driver_sql("SELECT 1")
    return openings


def _create_row(session: NewSession) -> tuple[object, ...]:
    principal = session.principal
    return (
        session.key,
        session.initialize_params,
        session.protocol_version,
        session.client_name,
        session.client_version,
        None if principal is None else principal.digest.hex(),
        None if principal is None else principal.display,
        session.instance,
    )


def _new_record(
    session: NewSession, namespace: str, created_at: Any, last_seen_at: Any, expires_at: Any
) -> SessionRecord:
    return SessionRecord(
        key=session.key,
        namespace=namespace,
        initialize_params=session.initialize_params,
        protocol_version=session.protocol_version,
        client_name=session.client_name,
        client_version=session.client_version,
        principal=session.principal,
        instance_hint=session.instance,
        created_at=created_at,
        last_seen_at=last_seen_at,
        expires_at=expires_at,
        restores=0,
        revision=0,
    )


def _record(row: Sequence[Any]) -> SessionRecord:
    """The record in a row with the columns that `SessionStatements` selects."""
    (
        key,
        namespace,
        initialize_params,
        protocol_version,
        client_name,
        client_version,
        digest,
        display,
        instance_hint,
        created_at,
        last_seen_at,
        expires_at,
        restores,
        revision,
    ) = row
    return SessionRecord(
        key=key,
        namespace=namespace,
        initialize_params=initialize_params,
        protocol_version=protocol_version,
        client_name=client_name,
        client_version=client_version,
        principal=None if digest is None else Principal(digest=bytes.fromhex(digest), display=display),
        instance_hint=instance_hint,
        created_at=created_at,
        last_seen_at=last_seen_at,
        expires_at=expires_at,
        restores=restores,
        revision=revision,
    )


def _same(record: SessionRecord, session: NewSession) -> bool:
    """Whether a record is what creating this session made."""
    return (
        record.initialize_params == session.initialize_params
        and record.protocol_version == session.protocol_version
        and record.principal == session.principal
        and record.instance_hint == session.instance
    )
