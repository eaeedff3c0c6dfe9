"""The records of sessions: loading, claiming, touching and replacing them, and finding those that changed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcp_session_store.records import Change, Changes, EndReason, Principal, SessionRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.sessions.statements import SessionStatements

__all__ = ["Claim", "Records", "Touch"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A restored session that an instance claims."""

    key: UUID
    instance: str
    restores: int


@dataclass(frozen=True, slots=True)
class Touch:
    """Activity of some sessions."""

    called_at: float
    """By the event loop's clock: from then on the ages count back."""
    rows: Sequence[tuple[UUID, float, float]]
    """Keys, first and last ages."""


class Records:
    """Runs the statements on the records of the sessions of one namespace.

    Each method serves a batch of calls, and returns a result for each in their order.

    Args:
        statements: The statements, which follow the policy.
        overlap: How far `changes` looks back before the moment that a call names.
    """

    def __init__(self, statements: SessionStatements, *, overlap: timedelta) -> None:
        self.statements = statements
        """May be replaced when the policy changes."""
        self._overlap = overlap

    async def load(self, attempt: Attempt, keys: Sequence[UUID]) -> list[SessionRecord | None]:
        records = await self.load_live(attempt, set(keys))
        return [records.get(key) for key in keys]

    async def load_live(self, attempt: Attempt, keys: set[UUID]) -> dict[UUID, SessionRecord]:
        """The records of those of the sessions that are live, by key."""
        sql = self.statements
        result = await attempt.connection.execute(sql.load, sql.loads.parameters([(key,) for key in keys]))
        return {row[0]: _record(row) for row in result}

    async def claim(self, attempt: Attempt, claims: Sequence[Claim]) -> list[SessionRecord | None]:
        sql = self.statements
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
            result = await attempt.connection.execute(sql.claim, sql.claims.parameters(rows))
            records = {row[0]: _record(row) for row in result}
            for key, position in turn.items():
                results[position] = records.get(key)
                del remaining[position]
        return [results[position] for position in range(len(claims))]

    async def touch(self, attempt: Attempt, touches: Sequence[Touch]) -> list[set[UUID]]:
        """The keys of the sessions that are not live, for each."""
        sql = self.statements
        not_live = []
        for touch in touches:
            # What was waited for since, a connection or another try, has made it all older.
            waited = asyncio.get_running_loop().time() - touch.called_at
            rows = [(key, first + waited, last + waited) for key, first, last in touch.rows]
            result = await attempt.connection.execute(sql.touch, sql.touches.parameters(rows))
            is_live = {key for key, expires_at, now in result if expires_at is None or now < expires_at}
            not_live.append({key for key, _, _ in rows} - is_live)
        return not_live

    async def replace_initialize(self, attempt: Attempt, replacements: Sequence[dict[str, Any]]) -> list[bool]:
        """Whether each session was live. A replacement is the statement's parameters."""
        return [
            (await attempt.connection.execute(self.statements.replace_initialize, replacement)).first() is not None
            for replacement in replacements
        ]

    async def changes(self, attempt: Attempt, polls: Sequence[datetime | None]) -> list[Changes]:
        return [await self._changes(attempt, since) for since in polls]

    async def _changes(self, attempt: Attempt, since: datetime | None) -> Changes:
        sql = self.statements
        if since is None:
            return Changes([], until=(await attempt.connection.execute(sql.until)).scalar_one())
        rows = (await attempt.connection.execute(sql.changes, {"changed_since": since - self._overlap})).all()
        changes = [
            Change(key=key, revision=revision, ended=None if reason is None else _end_reason(reason))
            for _, key, revision, reason in rows
            if key is not None
        ]
        return Changes(changes, until=rows[0].until)


def _end_reason(stored: str) -> EndReason:
    try:
        return EndReason(stored)
    except ValueError:
        # A newer version of this package, which runs beside this one during a deploy, may know more of them.
        return EndReason.OPERATOR


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
