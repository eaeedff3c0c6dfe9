"""What operators see of the sessions of a namespace: pages of a list, one session, statistics. Reads only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.records import JournalEntry, Principal
from mcp_session_store.retention import SweepReport
from mcp_session_store.sql.admin.reader import (
    DEFAULT_TIMEOUT,
    EPOCH,
    NO_CURSOR,
    Position,
    Reader,
    decode_cursor,
    encode_cursor,
)
from mcp_session_store.sql.dialects.functions import MOMENT, ByteLength, StoreClock
from mcp_session_store.sql.schema.tables import journal_table, sessions_table
from mcp_session_store.sql.sessions.statements import expiry
from mcp_session_store.sql.sessions.sweep import SweepCandidates
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.retention import RetentionPolicy

__all__ = [
    "DEFAULT_TIMEOUT",
    "SessionDetails",
    "SessionDirectory",
    "SessionFilter",
    "SessionPage",
    "SessionState",
    "Statistics",
    "StoredSession",
]

AGES: Final = (
    timedelta(minutes=1),
    timedelta(minutes=10),
    timedelta(hours=1),
    timedelta(hours=6),
    timedelta(days=1),
    timedelta(days=7),
    timedelta(days=30),
)
"""Where the classes of the statistics' ages end; one more has no end."""


class SessionState(StrEnum):
    """What has become of a session that is stored."""

    LIVE = "live"
    EXPIRED = "expired"
    """Not live any more, and not yet swept."""
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFilter:
    """Which sessions: those in one state, of which all holds that is given.

    Raises:
        ConfigurationError: Nothing can fit.
    """

    state: SessionState = SessionState.LIVE
    client: str | None = None
    """What the client calls itself."""
    principal: bytes | None = None
    """The digest of whose it is, as `Principal.digest`."""
    anonymous: bool = False
    """That it is nobody's."""
    instance: str | None = None
    """The instance that last created or restored it."""
    min_age: timedelta | None = None
    """How long ago it was opened at least; how long ago it expired, or ended, for these states."""
    max_age: timedelta | None = None
    """How long ago at most."""

    def __post_init__(self) -> None:
        if self.anonymous and self.principal is not None:
            raise ConfigurationError("no session has a principal and is anonymous; give one of the two")
        if self.min_age is not None and self.max_age is not None and self.min_age >= self.max_age:
            raise ConfigurationError(
                f"no session is older than {self.min_age} and newer than {self.max_age}; exchange the two"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSession:
    """What is stored of a session, whatever its state. Times are the database's."""

    key: UUID
    state: SessionState
    protocol_version: str
    client_name: str
    client_version: str
    principal: Principal | None
    instance_hint: str
    """The instance that last created or restored the session."""
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime | None
    ended_at: datetime | None
    end_reason: str | None
    """An `EndReason`, or what a newer version of this package calls one."""
    restores: int
    revision: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionPage:
    """Some sessions of a list, and how to go on."""

    sessions: Sequence[StoredSession]
    as_of: datetime
    """By the database's clock."""
    next: str | None
    """The cursor of the next page; `None`: there are no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionDetails:
    """All that is stored of one session."""

    session: StoredSession
    as_of: datetime
    """By the database's clock."""
    initialize_params: str = field(repr=False)
    """The `params` of the client's `initialize`, as JSON text; empty once it has ended."""
    journal: Sequence[JournalEntry]
    """In the order of a restore."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What is stored, counted."""

    as_of: datetime
    """By the database's clock."""
    live: int
    expired: int
    ended: int
    ages: Sequence[tuple[timedelta | None, int]]
    """Live sessions by how long ago they were opened: less than this, and not less than the one before."""
    clients: Sequence[tuple[str, int]]
    """The clients with the most live sessions."""
    instances: Sequence[tuple[str, int]]
    """The instances that created or restored the most live sessions."""
    mean_params_bytes: float | None
    """Of live sessions' `initialize` params; `None` without any."""
    table_bytes: int
    """What the tables take; on SQLite, the file."""
    index_bytes: int | None
    """What their indexes take beside that; `None` on SQLite, where they are in the file."""


class SessionDirectory(Reader):
    """The sessions of a namespace, for operators. See `Reader`.

    To a list a session that has expired is no live one, swept or not.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(url_or_engine, namespace=namespace, schema=schema, timeout=timeout)
        self._table = sessions_table(self._database.schema)
        self._journal = journal_table(self._database.schema)

    async def page(self, which: SessionFilter, *, limit: int = 50, after: str | None = None) -> SessionPage:
        """A page of a list: live sessions newest first, those that expired or ended latest first.

        One range scan along an index, wherever the page lies. Sessions that come and go meanwhile make none of the
        others appear twice, or not at all.

        Args:
            which: The list.
            limit: Sessions on the page at most.
            after: `next` of the page before.

        Raises:
            ConfigurationError: The cursor is none of this list's.
        """
        position = None if after is None else _decode(after, which.state)

        async def read(connection: AsyncConnection, now: datetime) -> SessionPage:
            rows = (await connection.execute(self._page_statement(which, now, limit=limit + 1, after=position))).all()
            sessions = [_stored(row, now) for row in rows]
            more = len(sessions) > limit
            cursor = _encode(which.state, sessions[limit - 1]) if more else None
            return SessionPage(sessions=sessions[:limit], as_of=now, next=cursor)

        return await self._read(read)

    async def count(self, which: SessionFilter) -> int:
        """How many sessions a list has. Reads the range of an index that the list is in."""

        async def read(connection: AsyncConnection, now: datetime) -> int:
            statement = sa.select(sa.func.count()).select_from(self._table).where(*self._conditions(which, now))
            return (await connection.execute(statement)).scalar_one()

        return await self._read(read)

    async def find(self, key: UUID) -> SessionDetails | None:
        """All of one session, live or not; `None` for one that is unknown."""
        table, journal = self._table, self._journal

        async def read(connection: AsyncConnection, now: datetime) -> SessionDetails | None:
            statement = sa.select(*self._columns(), table.c.initialize_params).where(
                table.c.key == key, table.c.namespace == self._namespace
            )
            row = (await connection.execute(statement)).one_or_none()
            if row is None:
                return None
            entries = await connection.execute(
                sa.select(journal.c.method, journal.c.subject, journal.c.params)
                .where(journal.c.key == key)
                .order_by(journal.c.revision, journal.c.method, journal.c.subject)
            )
            return SessionDetails(
                session=_stored(row, now),
                as_of=now,
                initialize_params=row.initialize_params,
                journal=[
                    JournalEntry(method=method, subject=subject, params=text) for method, subject, text in entries
                ],
            )

        return await self._read(read)

    async def statistics(self, *, top: int = 10) -> Statistics:
        """Counts and sizes. Reads all of the sessions.

        Args:
            top: Clients, and instances, that are counted one by one.
        """
        table = self._table

        async def read(connection: AsyncConnection, now: datetime) -> Statistics:
            live, expired, ended = (
                sa.and_(*self._conditions(SessionFilter(state=state), now)) for state in SessionState
            )
            # An age class has all that are younger than its end; what the ones before it have is taken off below.
            younger = [sa.and_(live, table.c.created_at > sa.literal(now - age, MOMENT)) for age in AGES]
            counted = (
                await connection.execute(
                    sa.select(
                        *(sa.func.count().filter(condition) for condition in (live, expired, ended, *younger)),
                        sa.func.avg(ByteLength(table.c.initialize_params)).filter(live),
                    ).where(table.c.namespace == self._namespace)
                )
            ).one()
            totals, mean = list(counted)[:-1], counted[-1]
            upto = [0, *totals[3:], totals[0]]
            ages = [later - earlier for earlier, later in itertools.pairwise(upto)]
            table_bytes, index_bytes = (
                await connection.execute(self._database.dialect.stored_bytes([table, self._journal]))
            ).one()
            return Statistics(
                as_of=now,
                live=totals[0],
                expired=totals[1],
                ended=totals[2],
                ages=list(zip([*AGES, None], ages, strict=True)),
                clients=await self._most(connection, table.c.client_name, live, top),
                instances=await self._most(connection, table.c.instance_hint, live, top),
                mean_params_bytes=None if mean is None else float(mean),
                table_bytes=table_bytes,
                index_bytes=index_bytes,
            )

        return await self._read(read)

    async def preview(self, policy: RetentionPolicy) -> SweepReport:
        """What a sweep by a policy would do now, all of its steps together. Reads the ranges of the sessions swept."""
        table = self._table
        candidates = SweepCandidates(
            self._database.dialect, schema=self._database.schema, namespace=self._namespace, retention=policy
        )
        expired = [candidates.expired]
        if candidates.without_expiry is not None:
            # The sweep gives them an expiry first, which may have passed.
            given = expiry(policy, created_at=table.c.created_at, last_seen_at=StoreClock())
            passed = given <= StoreClock(-policy.sweep_grace.total_seconds())
            expired.append(
                sa.select(table.c.key).where(table.c.key.in_(candidates.without_expiry.order_by(None)), passed)
            )
        purged = [] if candidates.old_tombstones is None else [candidates.old_tombstones]

        async def count(connection: AsyncConnection, kind: sa.Select[Any]) -> int:
            statement = sa.select(sa.func.count()).select_from(kind.order_by(None).subquery())
            return (await connection.execute(statement)).scalar_one()

        async def read(connection: AsyncConnection, now: datetime) -> SweepReport:  # noqa: ARG001
            report = SweepReport(
                expired=sum([await count(connection, kind) for kind in expired]),
                purged=sum([await count(connection, kind) for kind in purged]),
            )
            return replace(report, more=report != SweepReport())

        return await self._read(read)

    async def _most(
        self, connection: AsyncConnection, column: sa.Column[str], live: sa.ColumnElement[bool], top: int
    ) -> Sequence[tuple[str, int]]:
        number = sa.func.count()
        statement = sa.select(column, number).where(live).group_by(column).order_by(number.desc(), column).limit(top)
        return [(name, count) for name, count in await connection.execute(statement)]

    def _page_statement(
        self, which: SessionFilter, now: datetime, *, limit: int, after: Position | None
    ) -> sa.Select[Any]:
        """The statement behind a page.

        Args:
            which: The list.
            now: What the database's clock shows. A parameter: no index serves a condition with a volatile function.
            limit: Rows at most.
            after: The position of the last row before the page.
        """
        table = self._table
        order = list(_position_columns(table, which.state))
        if which.state is SessionState.LIVE:
            # It is NULL in all of them. Postgres takes the index for the order only when all of its columns are in it.
            order.insert(0, table.c.ended_at)
        if which.anonymous and which.state is not SessionState.EXPIRED:
            order.insert(0, table.c.principal_digest)
        return (
            sa.select(*self._columns())
            .where(*self._conditions(which, now, after))
            .order_by(*(column.desc() for column in order))
            .limit(limit)
        )

    def _conditions(
        self, which: SessionFilter, now: datetime, after: Position | None = None
    ) -> list[sa.ColumnElement[bool]]:
        table = self._table
        conditions = [table.c.namespace == self._namespace]
        match which.state:
            case SessionState.LIVE:
                not_expired = sa.or_(table.c.expires_at.is_(None), table.c.expires_at > sa.literal(now, MOMENT))
                conditions += [table.c.ended_at.is_(None), not_expired]
            case SessionState.EXPIRED:
                conditions.append(table.c.ended_at.is_(None))
            case SessionState.ENDED:
                conditions.append(table.c.ended_at.is_not(None))
        if which.client is not None:
            conditions.append(table.c.client_name == which.client)
        if which.principal is not None:
            conditions.append(table.c.principal_digest == which.principal.hex())
        if which.anonymous:
            conditions.append(table.c.principal_digest.is_(None))
        if which.instance is not None:
            conditions.append(table.c.instance_hint == which.instance)

        position = _position_columns(table, which.state)
        since = position[0]
        if which.max_age is not None:
            conditions.append(since > sa.literal(_before(now, which.max_age), MOMENT))
        newest = now if which.state is SessionState.EXPIRED else None
        if which.min_age is not None:
            newest = _before(now, which.min_age)
        # Only the tighter of the two ends of the range: SQLite begins to read at one of them, and at which is chance.
        if after is not None and (newest is None or after[0] <= newest):
            bounds = [sa.literal(value, column.type) for value, column in zip(after, position, strict=True)]
            end = sa.tuple_(*position) < sa.tuple_(*bounds)
        elif newest is not None:
            end = since <= sa.literal(newest, MOMENT)
        else:
            return conditions
        expired = which.state is SessionState.EXPIRED
        return [*conditions, self._database.dialect.unlikely(end) if expired else end]

    def _columns(self) -> Sequence[sa.Column[Any]]:
        """In the order that `_stored` expects."""
        c = self._table.c
        return (
            c.key,
            c.protocol_version,
            c.client_name,
            c.client_version,
            c.principal_digest,
            c.principal_display,
            c.instance_hint,
            c.created_at,
            c.last_seen_at,
            c.expires_at,
            c.ended_at,
            c.end_reason,
            c.restores,
            c.revision,
        )


def _position_columns(table: sa.Table, state: SessionState) -> Sequence[sa.Column[Any]]:
    """What the list of a state is ordered by; the first is what the age is counted from."""
    match state:
        case SessionState.LIVE:
            return table.c.created_at, table.c.key
        case SessionState.EXPIRED:
            return table.c.expires_at, table.c.key
        case SessionState.ENDED:
            return table.c.ended_at, table.c.created_at, table.c.key


def _position(state: SessionState, session: StoredSession) -> Sequence[Any]:
    """As `_position_columns`."""
    match state:
        case SessionState.LIVE:
            return session.created_at, session.key
        case SessionState.EXPIRED:
            return session.expires_at, session.key
        case SessionState.ENDED:
            return session.ended_at, session.created_at, session.key


def _encode(state: SessionState, session: StoredSession) -> str:
    return encode_cursor(state.value, tuple(_position(state, session)))


def _decode(cursor: str, state: SessionState) -> Position:
    found, position = decode_cursor(cursor) or ("", ())
    if found != state and found in [other.value for other in SessionState]:
        raise ConfigurationError(
            f"the cursor {cursor!r} is of the list of {found} sessions, not of {state} ones; {NO_CURSOR}"
        )
    if found != state or len(position) != (3 if state is SessionState.ENDED else 2):
        raise ConfigurationError(f"{cursor!r} is no cursor of a list of sessions; {NO_CURSOR}")
    return position


def _before(now: datetime, age: timedelta) -> datetime:
    """A moment that long ago, or the earliest that there is."""
    try:
        return max(now - age, EPOCH)
    except OverflowError:
        return EPOCH


def _stored(row: Any, now: datetime) -> StoredSession:
    digest, display = row.principal_digest, row.principal_display
    expired = row.expires_at is not None and row.expires_at <= now
    return StoredSession(
        key=row.key,
        state=SessionState.ENDED if row.ended_at else SessionState.EXPIRED if expired else SessionState.LIVE,
        protocol_version=row.protocol_version,
        client_name=row.client_name,
        client_version=row.client_version,
        principal=None if digest is None else Principal(digest=bytes.fromhex(digest), display=display),
        instance_hint=row.instance_hint,
        created_at=row.created_at,
        last_seen_at=row.last_seen_at,
        expires_at=row.expires_at,
        ended_at=row.ended_at,
        end_reason=row.end_reason,
        restores=row.restores,
        revision=row.revision,
    )
