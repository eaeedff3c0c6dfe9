"""Sessions in a SQL database: the contract of `SessionStore` on Postgres and SQLite."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.errors import ConfigurationError, SessionConflict
from mcp_session_store.records import Principal, SessionRecord
from mcp_session_store.sql.batching import Batcher
from mcp_session_store.sql.database import Database
from mcp_session_store.sql.statements import SessionStatements
from mcp_session_store.store import DEFAULT_NAMESPACE, SessionStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.records import Activity, EndReason, NewSession
    from mcp_session_store.sql.database import Attempt

__all__ = ["DEFAULT_TIMEOUT", "SqlSessionStore"]

DEFAULT_TIMEOUT: Final = 5.0

TOUCHES_PER_STATEMENT: Final = 500


@dataclass(frozen=True, slots=True)
class _Claim:
    key: UUID
    instance: str
    restores: int


@dataclass(frozen=True, slots=True)
class _End:
    key: UUID
    reason: EndReason


class SqlSessionStore(SessionStore):
    """Sessions in Postgres or SQLite, shared by any number of processes.

    The database's schema must have been made by this package's migrations. An empty SQLite file is
    migrated on first use; any other database only with `auto_upgrade`. A database that is down when
    the store is made, or later, makes calls fail with `StoreUnavailable` until it is back.

    Calls of one kind that are made at once share a statement. A store uses at most one connection for
    each kind, and on SQLite one at a time for all that write.

    Args:
        url_or_engine: `postgresql://user:password@host/database` or `sqlite:///path`, or an
            `AsyncEngine` with the driver asyncpg or aiosqlite. A given engine is used as it is, and
            never disposed; no PRAGMA is set on it. It should have a pool of at least 5 connections.
            Behind PgBouncer in transaction mode, give a URL with `?pgbouncer=true`; an engine works there
            from PgBouncer 1.21 on, with its `max_prepared_statements`.
        namespace: Keeps servers that share a database apart.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        timeout: Seconds that a call takes at most.

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
    ) -> None:
        if not isinstance(namespace, str) or not namespace or "\0" in namespace:
            raise ConfigurationError(f"namespace={namespace!r} must be a text that is not empty, without NUL")
        self._namespace = namespace
        self._database = Database(url_or_engine, schema=schema, auto_upgrade=auto_upgrade, timeout=timeout)
        self._sql = SessionStatements(self._database.dialect, schema=self._database.schema, namespace=namespace)
        self._contacts = Batcher(self._database, _make_contact, writes=False)
        self._loads = Batcher(self._database, self._load_all, writes=False)
        self._creates = Batcher(self._database, self._create_all, writes=True)
        self._claims = Batcher(self._database, self._claim_all, writes=True)
        self._ends = Batcher(self._database, self._end_all, writes=True)
        # One item for each statement: a second initialize within a session is rare, and a touch is a batch.
        self._replacements = Batcher(self._database, self._replace_one, writes=True, max_batch=1)
        self._touches = Batcher(self._database, self._touch_one, writes=True, max_batch=1)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._database.shown_url} namespace={self._namespace!r}>"

    @property
    def namespace(self) -> str:
        return self._namespace

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
        )
        await asyncio.gather(*(batcher.aclose() for batcher in batchers))
        await self._database.aclose()

    async def create(self, session: NewSession) -> SessionRecord:
        record = await self._creates.submit(session)
        if record is None:
            raise SessionConflict(f"another record stands under key {session.key}; create a new session id")
        return record

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

    async def touch(self, activities: Sequence[Activity]) -> set[UUID]:
        # Several activities of one session are one: a statement changes a row once.
        ages: dict[UUID, tuple[float, float]] = {}
        for activity in activities:
            first, last = ages.get(activity.key, (activity.first_age, activity.last_age))
            ages[activity.key] = max(first, activity.first_age), min(last, activity.last_age)
        rows = [(key, first, last) for key, (first, last) in sorted(ages.items())]
        not_live: set[UUID] = set()
        for start in range(0, len(rows), TOUCHES_PER_STATEMENT):
            not_live |= await self._touches.submit(rows[start : start + TOUCHES_PER_STATEMENT])
        return not_live

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        return await self._ends.submit(_End(key, reason))

    async def _load_all(self, attempt: Attempt, keys: Sequence[UUID]) -> list[SessionRecord | None]:
        records = await self._load_live(attempt, set(keys))
        return [records.get(key) for key in keys]

    async def _load_live(self, attempt: Attempt, keys: set[UUID]) -> dict[UUID, SessionRecord]:
        parameters = self._sql.loads.parameters([(key,) for key in keys])
        result = await attempt.connection.execute(self._sql.load, parameters)
        return {row[0]: _record(row) for row in result}

    async def _create_all(self, attempt: Attempt, sessions: Sequence[NewSession]) -> list[SessionRecord | None]:
        """The records; `None` where another one stands under the key."""
        # Of several for one key the first is created, and the others find it there.
        first: dict[UUID, NewSession] = {}
        for session in sessions:
            first.setdefault(session.key, session)
        rows = [_create_row(first[key]) for key in sorted(first)]
        result = await attempt.connection.execute(self._sql.create, self._sql.creates.parameters(rows))
        records = {
            key: _new_record(first[key], self._namespace, created_at, last_seen_at, expires_at)
            for key, created_at, last_seen_at, expires_at in result
        }
        if present := first.keys() - records.keys():
            records |= await self._load_live(attempt, present)
        return [
            record if (record := records.get(session.key)) is not None and _same(record, session) else None
            for session in sessions
        ]

    async def _claim_all(self, attempt: Attempt, claims: Sequence[_Claim]) -> list[SessionRecord | None]:
        results: dict[int, SessionRecord | None] = {}
        remaining = dict(enumerate(claims))
        while remaining:
            # A statement changes a row once, and each claim of a session counts: so one round for each.
            turn: dict[UUID, int] = {}
            for position, claim in remaining.items():
                turn.setdefault(claim.key, position)
            rows = [(key, remaining[position].instance, remaining[position].restores) for key, position in turn.items()]
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

    async def _touch_one(
        self,
        attempt: Attempt,
        touches: Sequence[Sequence[tuple[UUID, float, float]]],
    ) -> list[set[UUID]]:
        not_live = []
        for rows in touches:
            result = await attempt.connection.execute(self._sql.touch, self._sql.touches.parameters(rows))
            not_live.append({key for key, _, _ in rows} - set(result.scalars()))
        return not_live

    async def _end_all(self, attempt: Attempt, ends: Sequence[_End]) -> list[bool]:
        # Of several for one session the first ends it, and the others find it ended.
        first: dict[UUID, _End] = {}
        for end in ends:
            first.setdefault(end.key, end)
        parameters = self._sql.ends.parameters([(key, end.reason.value) for key, end in first.items()])
        ended = set((await attempt.connection.execute(self._sql.end, parameters)).scalars())
        if attempt.repeated and first.keys() - ended:
            # The first try's commit may have been what ended them, and its answer was lost.
            ended |= set((await attempt.connection.execute(self._sql.ended_for_that_reason, parameters)).scalars())
        return [end is first[end.key] and end.key in ended for end in ends]


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
