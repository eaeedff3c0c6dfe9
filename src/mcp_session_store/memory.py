"""The contract in memory: for tests, and as its reference reading. Nothing here survives the process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from mcp_session_store.errors import SessionConflict
from mcp_session_store.records import SessionRecord
from mcp_session_store.store import DEFAULT_NAMESPACE, NEW_SESSION_LIFETIME, SessionStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.records import Activity, EndReason, NewSession

__all__ = ["MemorySessionStore"]


@dataclass(slots=True)
class _Row:
    record: SessionRecord
    ended: EndReason | None = None

    def live_at(self, moment: datetime) -> bool:
        expires_at = self.record.expires_at
        return self.ended is None and (expires_at is None or moment < expires_at)


class MemorySessionStore(SessionStore):
    """Sessions in a dictionary.

    No method awaits anything, so each call takes effect as a whole.

    Args:
        namespace: What keeps servers that share the sessions apart.
        shared_with: A store whose sessions this one shares, as two stores on one database do.
    """

    def __init__(self, *, namespace: str = DEFAULT_NAMESPACE, shared_with: MemorySessionStore | None = None) -> None:
        self._namespace = namespace
        self._rows: dict[UUID, _Row] = {} if shared_with is None else shared_with._rows

    @property
    def namespace(self) -> str:
        return self._namespace

    def _now(self) -> datetime:
        return datetime.now(UTC)

    def _row(self, key: UUID) -> _Row | None:
        row = self._rows.get(key)
        return row if row is not None and row.record.namespace == self._namespace else None

    def _live(self, key: UUID) -> _Row | None:
        row = self._row(key)
        return row if row is not None and row.live_at(self._now()) else None

    async def create(self, session: NewSession) -> SessionRecord:
        now = self._now()
        if (row := self._rows.get(session.key)) is not None:
            stored = row.record
            same = (
                self._live(session.key) is not None
                and stored.initialize_params == session.initialize_params
                and stored.protocol_version == session.protocol_version
                and stored.principal == session.principal
                and stored.instance_hint == session.instance
            )
            if not same:
                raise SessionConflict(f"another record stands under key {session.key}; create a new session id")
            return stored
        record = SessionRecord(
            key=session.key,
            namespace=self._namespace,
            initialize_params=session.initialize_params,
            protocol_version=session.protocol_version,
            client_name=session.client_name,
            client_version=session.client_version,
            principal=session.principal,
            instance_hint=session.instance,
            created_at=now,
            last_seen_at=now,
            expires_at=now + NEW_SESSION_LIFETIME,
            restores=0,
            revision=0,
        )
        self._rows[session.key] = _Row(record)
        return record

    async def load(self, key: UUID) -> SessionRecord | None:
        row = self._live(key)
        return None if row is None else row.record

    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        row = self._live(key)
        if row is None:
            return None
        repeated = row.record.instance_hint == instance and row.record.restores > restores
        row.record = replace(
            row.record,
            instance_hint=instance,
            restores=row.record.restores + (0 if repeated else 1),
            last_seen_at=self._now(),
            expires_at=None,
        )
        return row.record

    async def replace_initialize(
        self,
        key: UUID,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
        row = self._live(key)
        if row is None:
            return False
        row.record = replace(
            row.record,
            initialize_params=initialize_params,
            protocol_version=protocol_version,
            client_name=client_name,
            client_version=client_version,
            revision=row.record.revision + 1,
        )
        return True

    async def touch(self, activities: Sequence[Activity]) -> set[UUID]:
        now = self._now()
        not_live: set[UUID] = set()
        # Of several for one session, all together count: the oldest first age and the youngest last age.
        ages: dict[UUID, tuple[float, float]] = {}
        for activity in activities:
            first, last = ages.get(activity.key, (activity.first_age, activity.last_age))
            ages[activity.key] = max(first, activity.first_age), min(last, activity.last_age)
        for key, (first, last) in ages.items():
            row = self._row(key)
            if row is None or not row.live_at(now - timedelta(seconds=first)):
                not_live.add(key)
                continue
            seen = max(row.record.last_seen_at, now - timedelta(seconds=last))
            row.record = replace(row.record, last_seen_at=seen, expires_at=None)
        return not_live

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        row = self._live(key)
        if row is None:
            return False
        row.ended = reason
        return True
