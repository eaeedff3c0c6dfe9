"""The records of sessions: loading, claiming, touching and replacing them, and finding those that changed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mcp_session_store.activity import StreamHolder, Touched
from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.records import Change, Changes, EndReason, SessionRecord
from mcp_session_store.sql.sessions.decoding import end_reason, read_record
from mcp_session_store.store import Absence

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from mcp_session_store.activity import Activity
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect
    from mcp_session_store.sql.sessions.statements import SessionStatements

__all__ = ["Claim", "Loaded", "Records", "Touch", "as_number"]

Found: TypeAlias = SessionRecord | RecordUnreadable | Absence
"""What is found under a key."""
Loaded: TypeAlias = SessionRecord | RecordUnreadable
"""Record of a live session, or why it cannot be read."""

_NO_CLAIM: Final = (None, None, 0)
"""Number, age and term where no stream is claimed."""

as_number: Final = attrgetter("int")
"""Sorts keys as the databases do, without a comparison in Python for each pair."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of a session by the instance that restored it."""

    key: UUID
    instance: str
    restores: int


@dataclass(frozen=True, slots=True)
class Touch:
    """Activity of sessions, reported in one statement."""

    called_at: float
    """Time by the event loop's clock from which the ages count back."""
    activities: Sequence[Activity]
    """One activity of each session, in the order of the keys."""


class Records:
    """Statements on the records of one namespace, run for batches of calls.

    Each method returns a result for each call, in their order.

    Args:
        dialect: The database's dialect.
        statements: The statements for the policy.
        overlap: How far `changes` looks back before the moment that a call names.
    """

    def __init__(self, dialect: Dialect, statements: SessionStatements, *, overlap: timedelta) -> None:
        self.statements = statements
        """Statements for the policy; replaced when it is."""
        self._dialect = dialect
        self._overlap = overlap

    async def find(self, attempt: Attempt, keys: Sequence[UUID]) -> list[Found]:
        """Return the record of each live session, and for any other why there is none."""
        found = await self._dialect.run(attempt.connection, self._find(set(keys)), writes=False)
        return [found.get(key, Absence.UNKNOWN) for key in keys]

    def load_live(self, keys: Collection[UUID]) -> Steps[dict[UUID, Loaded]]:
        """Return the records of the sessions that are live, by key."""
        found = yield from self._find(keys)
        return {key: one for key, one in found.items() if not isinstance(one, Absence)}

    def _find(self, keys: Collection[UUID]) -> Steps[dict[UUID, Found]]:
        sql = self.statements
        by_driver_key = {self._dialect.driver_key(key): key for key in keys}
        rows = yield sql.load, sql.loads.parameters([(key,) for key in by_driver_key])
        found: dict[UUID, Found] = {}
        live = []
        for row in rows:
            if (reason := row[-1]) is None:
                live.append(row[:-1])
            elif (key := by_driver_key.get(row[0])) is not None:
                found[key] = Absence.EXPIRED if reason == EndReason.EXPIRED.value else Absence.ENDED
        return found | self._records(by_driver_key, live)

    async def claim(self, attempt: Attempt, claims: Sequence[Claim]) -> list[Loaded | None]:
        """Claim sessions, and return the record of each as it then is; `None` where it is not live."""
        return await self._dialect.run(attempt.connection, self._claim(claims), writes=True)

    def _claim(self, claims: Sequence[Claim]) -> Steps[list[Loaded | None]]:
        sql = self.statements
        results: dict[int, Loaded | None] = {}
        remaining = dict(enumerate(claims))
        while remaining:
            # One round for each claim of a session, because a statement changes a row once and each claim counts.
            turn: dict[UUID, int] = {}
            for position, claim in remaining.items():
                turn.setdefault(claim.key, position)
            by_driver_key = {self._dialect.driver_key(key): key for key in sorted(turn, key=as_number)}
            rows = []
            for driver_key, key in by_driver_key.items():
                claim = remaining[turn[key]]
                rows.append((driver_key, claim.instance, claim.restores + 1))
            claimed = yield sql.claim, sql.claims.parameters(rows)
            if with_state := [(row[0],) for row in claimed if row[-1]]:
                watched = {row[0]: row[1] for row in (yield sql.watched, sql.watches.parameters(with_state))}
                claimed = [(*row[:-1], watched.get(row[0])) for row in claimed]
            records = self._records(by_driver_key, claimed)
            for key, position in turn.items():
                results[position] = records.get(key)
                del remaining[position]
        return [results[position] for position in range(len(claims))]

    async def touch(self, attempt: Attempt, touches: Sequence[Touch]) -> list[Touched]:
        """Record activity, and return for each report what became of its sessions."""
        now = asyncio.get_running_loop().time()
        return await self._dialect.run(attempt.connection, self._touch(touches, now), writes=True)

    def _touch(self, touches: Sequence[Touch], now: float) -> Steps[list[Touched]]:
        sql = self.statements
        touched = []
        for touch in touches:
            # The activity is older by the time that the report has waited, for a connection or another try.
            waited = now - touch.called_at
            by_driver_key = {self._dialect.driver_key(one.key): one for one in touch.activities}
            reports = [
                (
                    key,
                    one.first_age + waited,
                    one.last_age + waited,
                    one.claimed_by,
                    one.restores,
                    int(one.used),
                    *(
                        _NO_CLAIM
                        if one.stream is None
                        else (one.stream.number, one.stream.age + waited, one.stream.term)
                    ),
                )
                for key, one in by_driver_key.items()
            ]
            rows = yield sql.touch, sql.touches.parameters(reports)
            is_live = {key for key, expires_at, now in rows if expires_at is None or now < expires_at}
            not_live = {one.key for key, one in by_driver_key.items() if key not in is_live}
            streams: dict[UUID, StreamHolder] = {}
            if claimed := [(key,) for key in is_live if key in by_driver_key and by_driver_key[key].stream is not None]:
                # After the claims, so that on Postgres a message that was stored before them is seen.
                holders = yield sql.find_holders, sql.holders.parameters(claimed)
                streams = {
                    by_driver_key[row[0]].key: StreamHolder(row[1], row[2], row[3], bool(row[4])) for row in holders
                }
            touched.append(Touched(not_live, streams))
        return touched

    async def replace_initialize(self, attempt: Attempt, replacements: Sequence[dict[str, Any]]) -> list[bool]:
        """Replace initialize params, each given as the statement's parameters; return whether each session was live."""
        return [
            (await attempt.connection.execute(self.statements.replace_initialize, replacement)).first() is not None
            for replacement in replacements
        ]

    async def changes(self, attempt: Attempt, polls: Sequence[datetime | None]) -> list[Changes]:
        """Return the changes since each moment; for `None` only the moment to go on from."""
        run, connection = self._dialect.run, attempt.connection
        return [await run(connection, self._changes(since), writes=False) for since in polls]

    def _changes(self, since: datetime | None) -> Steps[Changes]:
        sql = self.statements
        if since is None:
            ((until,),) = yield sql.until, {}
            return Changes([], until=self._dialect.moments([until])[0])
        rows = yield sql.changes, {"changed_since": self._dialect.driver_moment(since - self._overlap)}
        changes = [
            Change(key=key, revision=revision, ended=None if reason is None else end_reason(reason))
            for _, driver_key, revision, reason in rows
            # A row whose key or revision cannot be read is of no session that is served.
            if (key := self._dialect.key(driver_key)) is not None and isinstance(revision, int)
        ]
        return Changes(changes, until=self._dialect.moments([rows[0][0]])[0])

    def _records(self, keys: Mapping[object, UUID], rows: Rows) -> dict[UUID, Loaded]:
        """Return what can be read of rows with the columns that `SessionStatements` selects, by key.

        Args:
            keys: The keys of the sessions, by the driver's.
            rows: The rows, as the driver returned them.
        """
        columns = self.statements.record
        return {key: read_record(self._dialect, columns, key, row) for row in rows if (key := keys[row[0]])}
