"""Lists of sessions for operators: which sessions, in which order, and the cursor of the next page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import sqlalchemy as sa

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.records import Principal
from mcp_session_store.sql.admin.reader import NO_CURSOR, Position, decode_cursor, encode_cursor
from mcp_session_store.sql.dialects.functions import EPOCH, MOMENT, Bounded, driver_value
from mcp_session_store.sql.sessions.decoding import is_readable_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = [
    "SessionFilter",
    "SessionList",
    "SessionState",
    "StoredSession",
    "readable",
    "session_position",
]


LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""Position of a row whose time cannot be read."""


class SessionState(StrEnum):
    """State of a stored session."""

    LIVE = "live"
    EXPIRED = "expired"
    """Expired, and not yet swept."""
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFilter:
    """Filter of a list: the sessions in one state that fit every condition given.

    Raises:
        ConfigurationError: No session can fit.
    """

    state: SessionState = SessionState.LIVE
    client: str | None = None
    """Name that the client gives itself."""
    principal: bytes | None = None
    """Digest of the principal: `Principal.digest`."""
    anonymous: bool = False
    """Whether to take only sessions without a principal."""
    instance: str | None = None
    """Instance that last created or restored the session."""
    min_age: timedelta | None = None
    """Time since the session was opened, at least; since it expired or ended, in these states."""
    max_age: timedelta | None = None
    """The same time, at most."""

    def __post_init__(self) -> None:
        if self.anonymous and self.principal is not None:
            raise ConfigurationError("no session has a principal and is anonymous; give one of the two")
        if self.min_age is not None and self.max_age is not None and self.min_age >= self.max_age:
            raise ConfigurationError(
                f"no session is older than {self.min_age} and newer than {self.max_age}; exchange the two"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSession:
    """What is stored of a session in any state. Times are by the database's clock."""

    key: UUID
    state: SessionState
    protocol_version: str
    client_name: str
    client_version: str
    principal: Principal | None
    instance_hint: str
    """Instance that last created or restored the session."""
    created_at: datetime | None
    """When it was opened. As of all values, `None` or empty where it cannot be read."""
    last_seen_at: datetime | None
    expires_at: datetime | None
    ended_at: datetime | None
    end_reason: str | None
    """An `EndReason`, or a reason that only a newer version of this package knows."""
    restores: int
    revision: int
    stream_holder: int | None
    """Number of the instance on which the client's stream was opened last; `None`: it was never opened."""
    stream_opened_at: datetime | None


class SessionList:
    """Statements of the lists of the sessions of one namespace.

    Args:
        dialect: The database's dialect.
        sessions: The table of sessions.
        namespace: The namespace.
    """

    def __init__(self, dialect: Dialect, sessions: sa.Table, *, namespace: str) -> None:
        self._dialect = dialect
        self._table = sessions
        self._namespace = namespace

    def columns(self) -> Sequence[sa.ColumnElement[Any]]:
        """Return the columns that `stored` expects."""
        c = self._table.c
        return (
            driver_value(c.key),
            c.protocol_version,
            c.client_name,
            c.client_version,
            c.principal_digest,
            c.principal_display,
            c.instance_hint,
            *(
                Bounded(moment).label(moment.name)
                for moment in (c.created_at, c.last_seen_at, c.expires_at, c.ended_at, c.stream_opened_at)
            ),
            c.end_reason,
            c.restores,
            c.revision,
            c.stream_holder,
        )

    def page_statement(
        self, which: SessionFilter, now: datetime, *, limit: int, after: Position | None
    ) -> sa.Select[Any]:
        """Build the statement of a page.

        Args:
            which: The list.
            now: The time by the database's clock: a parameter, because a condition with a volatile function uses no
                index.
            limit: Rows at most.
            after: The position of the last row before the page.
        """
        table = self._table
        order = list(_position_columns(table, which.state))
        if which.state is SessionState.LIVE:
            # NULL in all of them, and named because Postgres uses the index for the order only with all its columns.
            order.insert(0, table.c.ended_at)
        if which.anonymous and which.state is not SessionState.EXPIRED:
            order.insert(0, table.c.principal_digest)
        return (
            sa.select(*self.columns())
            .where(*self.conditions(which, now, after))
            .order_by(*(column.desc() for column in order))
            .limit(limit)
        )

    def conditions(
        self, which: SessionFilter, now: datetime, after: Position | None = None
    ) -> list[sa.ColumnElement[bool]]:
        """Build the conditions of a list, and of its rows after a position."""
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
        # Only the tighter of the two ends of the range, because SQLite begins to read at one of them, by chance.
        if after is not None and (newest is None or after[0] <= newest):
            bounds = [sa.literal(value, column.type) for value, column in zip(after, position, strict=True)]
            end = sa.tuple_(*position) < sa.tuple_(*bounds)
        elif newest is not None:
            end = since <= sa.literal(newest, MOMENT)
        else:
            return conditions
        expired = which.state is SessionState.EXPIRED
        return [*conditions, self._dialect.unlikely(end) if expired else end]

    def stored(self, row: Any, now: datetime) -> StoredSession | None:
        """Return the session in a row with these columns, in its state at a moment; `None` without a readable key."""
        if (key := self._dialect.key(row.key)) is None:
            return None
        expired = row.expires_at is not None and row.expires_at <= now
        return StoredSession(
            key=key,
            state=SessionState.ENDED if row.ended_at else SessionState.EXPIRED if expired else SessionState.LIVE,
            protocol_version=readable(row.protocol_version),
            client_name=readable(row.client_name),
            client_version=readable(row.client_version),
            principal=_principal(row.principal_digest, row.principal_display),
            instance_hint=readable(row.instance_hint),
            created_at=row.created_at,
            last_seen_at=row.last_seen_at,
            expires_at=row.expires_at,
            ended_at=row.ended_at,
            end_reason=None if row.end_reason is None else readable(row.end_reason),
            restores=row.restores,
            revision=row.revision,
            stream_holder=row.stream_holder,
            stream_opened_at=row.stream_opened_at,
        )

    def cursor(self, state: SessionState, row: Any) -> str:
        """Return the cursor of the page after a row with these columns."""
        *moments, _ = (getattr(row, column.name) for column in _position_columns(self._table, state))
        # What cannot be read is passed over: SQLite has a text before all numbers in a list from high to low.
        position = (*(moment or LATEST for moment in moments), self._dialect.key(row.key) or UUID(int=0))
        return encode_cursor(state.value, position)


def readable(text: object) -> str:
    """Return a stored text; an empty one for what cannot be read."""
    return text if isinstance(text, str) and is_readable_text(text) else ""


def _principal(digest: object, display: object) -> Principal | None:
    if digest is None:
        return None
    try:
        return Principal(digest=bytes.fromhex(readable(digest)), display=readable(display))
    except ValueError:
        return Principal(digest=b"", display=readable(display))


def _position_columns(table: sa.Table, state: SessionState) -> Sequence[sa.Column[Any]]:
    """Return the columns that the list of a state is ordered by; ages count from the first."""
    match state:
        case SessionState.LIVE:
            return table.c.created_at, table.c.key
        case SessionState.EXPIRED:
            return table.c.expires_at, table.c.key
        case SessionState.ENDED:
            return table.c.ended_at, table.c.created_at, table.c.key


def session_position(cursor: str, state: SessionState) -> Position:
    """Return the position in a list that a cursor stands for.

    Raises:
        ConfigurationError: The cursor belongs to another list, or is not one.
    """
    found, position = decode_cursor(cursor) or ("", ())
    if found != state and found in [other.value for other in SessionState]:
        raise ConfigurationError(
            f"the cursor {cursor!r} is of the list of {found} sessions, not of {state} ones; {NO_CURSOR}"
        )
    if found != state or len(position) != (3 if state is SessionState.ENDED else 2):
        raise ConfigurationError(f"{cursor!r} is not a cursor of a list of sessions; {NO_CURSOR}")
    return position


def _before(now: datetime, age: timedelta) -> datetime:
    """Return the moment that long before another, or the earliest there is."""
    try:
        return max(now - age, EPOCH)
    except OverflowError:
        return EPOCH
