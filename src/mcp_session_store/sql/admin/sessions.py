"""The sessions of a namespace for operators: pages of a list, one session, statistics."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa

from mcp_session_store.records import JournalEntry
from mcp_session_store.retention import SweepReport
from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.admin.reader import Reader
from mcp_session_store.sql.admin.session_list import (
    SessionFilter,
    SessionList,
    SessionState,
    StoredSession,
    readable,
    session_position,
)
from mcp_session_store.sql.dialects.functions import MOMENT, ByteLength, StoreClock, driver_value
from mcp_session_store.sql.schema.tables import journal_table, sessions_table, state_table
from mcp_session_store.sql.sessions.statements import expiry
from mcp_session_store.sql.sessions.sweep import SweepCandidates
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.retention import RetentionPolicy

__all__ = [
    "SessionDetails",
    "SessionDirectory",
    "SessionFilter",
    "SessionPage",
    "SessionState",
    "ShownState",
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
"""Ends of the age classes in statistics; one more class has no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionPage:
    """A page of a list of sessions."""

    sessions: Sequence[StoredSession]
    as_of: datetime
    """Time of the read, by the database's clock."""
    next: str | None
    """Cursor of the next page; `None` on the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownState:
    """A value of a session's state."""

    name: str
    value: str = field(repr=False)
    """The value as JSON text."""
    expires_at: datetime | None
    """When its time is over; `None`: with its session."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionDetails:
    """All that is stored of one session."""

    session: StoredSession
    as_of: datetime
    """Time of the read, by the database's clock."""
    initialize_params: str = field(repr=False)
    """`params` of the client's `initialize`, as JSON text; empty once the session has ended."""
    journal: Sequence[JournalEntry]
    """Entries in the order of a restore."""
    state: Sequence[ShownState]
    """Values of its state, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Counts and sizes of the stored sessions."""

    as_of: datetime
    """Time of the read, by the database's clock."""
    live: int
    expired: int
    ended: int
    ages: Sequence[tuple[timedelta | None, int]]
    """Numbers of live sessions by age: below this one, and not below the one before."""
    clients: Sequence[tuple[str, int]]
    """Clients with the most live sessions, and their numbers."""
    instances: Sequence[tuple[str, int]]
    """Instances that created or restored the most live sessions, and their numbers."""
    mean_params_bytes: float | None
    """Mean size of live sessions' `initialize` params; `None` without any."""
    state_values: int
    """Number of values of the state of live sessions."""
    state_bytes: int
    """Bytes of those values and their names."""
    table_bytes: int
    """Size of the tables; on SQLite, of the file."""
    index_bytes: int | None
    """Size of their indexes beside that; `None` on SQLite, where they are in the file."""


class SessionDirectory(Reader):
    """Sessions of a namespace, for operators. See `Reader`.

    In a list an expired session is not live, swept or not.
    """

    def __init__(
        self,
        url_or_engine: str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        timeout: float = OPERATOR_TIMEOUT,
    ) -> None:
        super().__init__(url_or_engine, namespace=namespace, schema=schema, timeout=timeout)
        self._table = sessions_table(self.database.schema)
        self._journal = journal_table(self.database.schema)
        self._state = state_table(self.database.schema)
        self.lists = SessionList(self.database.dialect, self._table, namespace=namespace)
        """Statements of the lists."""

    async def page(self, which: SessionFilter, *, limit: int = 50, after: str | None = None) -> SessionPage:
        """Return a page of a list: live sessions newest first; expired or ended ones latest first.

        One range scan along an index, wherever the page lies. By a client or an instance, which have no index, the scan
        may pass all sessions of the list to find the few that fit. Sessions that come and go meanwhile do not make
        others appear twice, or not at all.

        Args:
            which: The list.
            limit: Sessions on the page at most.
            after: `next` of the page before.

        Raises:
            ConfigurationError: The cursor does not belong to this list.
        """
        position = None if after is None else session_position(after, which.state)

        async def read(connection: AsyncConnection, now: datetime) -> SessionPage:
            statement = self.lists.page_statement(which, now, limit=limit + 1, after=position)
            rows = (await connection.execute(statement)).all()
            cursor = self.lists.cursor(which.state, rows[limit - 1]) if len(rows) > limit else None
            stored = (self.lists.stored(row, now) for row in rows[:limit])
            return SessionPage(sessions=[session for session in stored if session], as_of=now, next=cursor)

        return await self.read(read)

    async def count(self, which: SessionFilter) -> int:
        """Return how many sessions a list has. Reads the list's range of an index."""

        async def read(connection: AsyncConnection, now: datetime) -> int:
            statement = sa.select(sa.func.count()).select_from(self._table).where(*self.lists.conditions(which, now))
            return (await connection.execute(statement)).scalar_one()

        return await self.read(read)

    async def find(self, key: UUID) -> SessionDetails | None:
        """Return all that is stored of one session in any state; `None` for an unknown one."""
        table, journal, state = self._table, self._journal, self._state

        async def read(connection: AsyncConnection, now: datetime) -> SessionDetails | None:
            statement = sa.select(*self.lists.columns(), table.c.initialize_params).where(
                table.c.key == key, table.c.namespace == self._namespace
            )
            row = (await connection.execute(statement)).one_or_none()
            if row is None or (session := self.lists.stored(row, now)) is None:
                return None
            entries = await connection.execute(
                sa.select(journal.c.method, journal.c.subject, journal.c.params)
                .where(journal.c.key == key)
                .order_by(journal.c.revision, journal.c.method, journal.c.subject)
            )
            values = await connection.execute(
                sa.select(state.c.name, state.c.value, state.c.expires_at)
                .where(state.c.key == key, sa.or_(state.c.expires_at.is_(None), StoreClock() < state.c.expires_at))
                .order_by(state.c.name)
            )
            return SessionDetails(
                session=session,
                as_of=now,
                initialize_params=readable(row.initialize_params),
                journal=[
                    JournalEntry(method=readable(method), subject=readable(subject), params=readable(text))
                    for method, subject, text in entries
                ],
                state=[
                    ShownState(name=readable(name), value=readable(value), expires_at=expires_at)
                    for name, value, expires_at in values
                ],
            )

        return await self.read(read)

    async def keys_beginning_with(self, digits: str, *, limit: int) -> list[UUID]:
        """Return the first keys, of sessions in any state, that begin with these hexadecimal digits.

        One range scan along the primary key.

        Args:
            digits: Fewer than 32 digits, without dashes.
            limit: Keys at most.
        """
        key = self._table.c.key
        first, last = (sa.literal(UUID(hex=digits.ljust(32, fill)), key.type) for fill in "0f")
        statement = sa.select(driver_value(key)).where(
            key.between(first, last), self._table.c.namespace == self._namespace
        )

        async def read(connection: AsyncConnection, now: datetime) -> list[UUID]:  # noqa: ARG001
            rows = await connection.execute(statement.order_by(key).limit(limit))
            found = (self.database.dialect.key(value) for (value,) in rows)
            return [key for key in found if key is not None]

        return await self.read(read)

    async def statistics(self, *, top: int = 10) -> Statistics:
        """Return counts and sizes. Reads all sessions of the namespace.

        Args:
            top: Clients, and instances, that are counted one by one.
        """
        table = self._table

        async def read(connection: AsyncConnection, now: datetime) -> Statistics:
            live, expired, ended = (
                sa.and_(*self.lists.conditions(SessionFilter(state=state), now)) for state in SessionState
            )
            # Each counts all sessions younger than its end; those of the classes before it are subtracted below.
            younger = [sa.and_(live, table.c.created_at > sa.literal(now - age, MOMENT)) for age in AGES]
            of_state = (table.c.state_values, table.c.state_bytes)
            counted = (
                await connection.execute(
                    sa.select(
                        *(sa.func.count().filter(condition) for condition in (live, expired, ended, *younger)),
                        sa.func.avg(ByteLength(table.c.initialize_params)).filter(live),
                        *(sa.func.coalesce(sa.func.sum(column).filter(live), 0) for column in of_state),
                    ).where(table.c.namespace == self._namespace)
                )
            ).one()
            *totals, mean, state_values, state_bytes = counted
            upto = [0, *totals[3:], totals[0]]
            ages = [later - earlier for earlier, later in itertools.pairwise(upto)]
            table_bytes, index_bytes = (
                await connection.execute(self.database.dialect.stored_bytes([table, self._journal, self._state]))
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
                state_values=int(state_values),
                state_bytes=int(state_bytes),
                table_bytes=table_bytes,
                index_bytes=index_bytes,
            )

        return await self.read(read)

    async def preview(self, policy: RetentionPolicy) -> SweepReport:
        """Return what a sweep by a policy would do now, all steps together. Reads the ranges of the sessions swept."""
        table = self._table
        candidates = SweepCandidates(
            self.database.dialect, schema=self.database.schema, namespace=self._namespace, retention=policy
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

        return await self.read(read)

    async def _most(
        self, connection: AsyncConnection, column: sa.Column[str], live: sa.ColumnElement[bool], top: int
    ) -> Sequence[tuple[str, int]]:
        number = sa.func.count()
        statement = sa.select(column, number).where(live).group_by(column).order_by(number.desc(), column).limit(top)
        return [(name, count) for name, count in await connection.execute(statement)]
