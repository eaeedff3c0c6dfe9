"""Session store in memory, the reference of its contract."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import anyio

from mcp_session_store.activity import Touched, merged_activities
from mcp_session_store.errors import JournalFull, SessionConflict, SessionLimitReached
from mcp_session_store.memory.data import Data, OnHint, Row
from mcp_session_store.records import (
    Change,
    Changes,
    EndReason,
    JournalEntry,
    SessionRecord,
    check_session,
    check_texts,
)
from mcp_session_store.retention import MAY_BE_HELD, MIN_TOMBSTONE, RetentionPolicy, SweepReport
from mcp_session_store.settings import checked_type
from mcp_session_store.state_store import check_state
from mcp_session_store.store import (
    DEFAULT_NAMESPACE,
    MAX_JOURNAL_ENTRIES,
    SWEEP_LIMIT,
    Absence,
    SessionStore,
    check_keys,
    checked_namespace,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mcp_session_store.activity import Activity, StreamHolder
    from mcp_session_store.records import NewSession

__all__ = ["MemorySessionStore"]


class MemorySessionStore(SessionStore):
    """Session store in a dictionary.

    No method but `listen` awaits anything, so that each call takes effect as a whole.

    Args:
        namespace: Name that keeps servers apart which share the sessions.
        retention: See `SessionStore`.
        shared_with: Store whose sessions this one shares, as two stores on one database do.

    Raises:
        ConfigurationError: The namespace cannot be one.
    """

    def __init__(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        retention: RetentionPolicy | None = None,
        shared_with: MemorySessionStore | None = None,
    ) -> None:
        checked_type("shared_with", shared_with, MemorySessionStore | None, "a MemorySessionStore or None")
        super().__init__(retention=retention)
        self._namespace = checked_namespace(namespace)
        self._data = Data() if shared_with is None else shared_with.data

    @property
    def namespace(self) -> str:
        return self._namespace

    @property
    def data(self) -> Data:
        """Sessions of all stores that share them, and their events."""
        return self._data

    def _live(self, key: UUID) -> Row | None:
        return self._data.live(key, namespace=self._namespace)

    def _mine(self) -> Iterator[Row]:
        return (row for row in self._data.rows.values() if row.record.namespace == self._namespace)

    def _expiry(self, record: SessionRecord, last_seen_at: datetime) -> datetime | None:
        return self.retention.expiry(created_at=record.created_at, last_seen_at=last_seen_at)

    async def create(self, session: NewSession) -> SessionRecord:
        if session.key.__class__ is not UUID:  # without a call, because each handshake comes by here
            check_keys(session.key)
        check_session(session)
        for state in session.state:
            check_state(state)
        now = self._data.now()
        if (row := self._data.rows.get(session.key)) is not None:
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
        self._make_room(session)
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
            expires_at=now + self.retention.new_session_lifetime,
            restores=0,
            revision=0,
        )
        self._data.rows[session.key] = Row(record)
        for state in session.state:
            self._data.put(session.key, state)
        return record

    def _make_room(self, session: NewSession) -> None:
        """Make room for one more session, as the policy says.

        Raises:
            SessionLimitReached: The policy allows no more.
        """
        policy, now = self.retention, self._data.now()
        if (policy.anonymous if session.principal is None else policy.per_principal) is None:
            return
        if session.principal is None and policy.anonymous is not None and len(self._data.rows) < policy.anonymous:
            return  # far from the limit, as nearly always
        rows = [row for row in self._mine() if row.record.principal == session.principal]
        if session.principal is None:
            if policy.anonymous is None or len(rows) < policy.anonymous:
                return
            removable = [row for row in rows if row.ended_at is not None and row.ended_at <= now - MIN_TOMBSTONE]
            if not removable or len(rows) > policy.anonymous:
                raise SessionLimitReached(
                    f"{policy.anonymous} sessions without a principal are stored, as many as the policy's "
                    "anonymous allows"
                )
            del self._data.rows[min(removable, key=lambda row: row.ended_at or now).record.key]
            return
        live = [row for row in rows if row.live_at(now)]
        if policy.per_principal is None or len(live) < policy.per_principal:
            return
        if policy.per_principal_excess == "refuse":
            raise SessionLimitReached(
                f"the principal has {len(live)} sessions, as many as the policy's per_principal allows"
            )
        live.sort(key=lambda row: (row.record.last_seen_at, row.record.created_at))
        for row in live[: len(live) - policy.per_principal + 1]:
            self._end(row, EndReason.LIMIT)
            self._data.changed(row)

    async def load(self, key: UUID) -> SessionRecord | None:
        found = await self.find(key)
        return None if isinstance(found, Absence) else found

    async def find(self, key: UUID) -> SessionRecord | Absence:
        check_keys(key)
        row = self._live(key)
        if row is not None:
            log = self._data.logs.get(key)
            return replace(
                row.record,
                loaded_at=self._data.now(),
                newest_event=0 if log is None else log.last,
                watched=self._data.watched(key) if key in self._data.states else None,
            )
        row = self._data.rows.get(key)
        if row is None or row.record.namespace != self._namespace:
            return Absence.UNKNOWN
        return Absence.EXPIRED if row.ended in (None, EndReason.EXPIRED) else Absence.ENDED

    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        check_keys(key)
        check_texts(instance=instance)
        row = self._live(key)
        if row is None:
            return None
        now = self._data.now()
        row.record = replace(
            _claimed(row.record, instance, restores + 1), last_seen_at=now, expires_at=self._expiry(row.record, now)
        )
        return replace(row.record, watched=self._data.watched(key) if key in self._data.states else None)

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
        self._data.changed(row)
        return True

    async def write_journal(self, key: UUID, *, method: str, subject: str, params: str | None) -> int | None:
        check_keys(key)
        check_texts(method=method, subject=subject, params=params or "")
        row = self._live(key)
        if row is None:
            return None
        name = (method, subject)
        if params is not None and name not in row.journal and len(row.journal) >= MAX_JOURNAL_ENTRIES:
            raise JournalFull(f"the session has {MAX_JOURNAL_ENTRIES} journaled calls already; undo some first")
        row.journal.pop(name, None)
        revision = row.record.revision + 1
        if params is not None:
            row.journal[name] = JournalEntry(method=method, subject=subject, params=params, revision=revision)
        row.record = replace(row.record, revision=revision)
        self._data.changed(row)
        return revision

    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        check_keys(key)
        row = self._live(key)
        return [] if row is None else list(row.journal.values())

    async def touch(self, activities: Sequence[Activity]) -> Touched:
        now = self._data.now()
        not_live: set[UUID] = set()
        streams: dict[UUID, StreamHolder] = {}
        check_keys(*(activity.key for activity in activities))
        for activity in activities:
            check_texts(claimed_by=activity.claimed_by or "")
        for key, activity in merged_activities(activities).items():
            row = self._data.row(key, namespace=self._namespace)
            if row is not None and row.live_at(now - timedelta(seconds=activity.first_age)):
                if activity.claimed_by is not None:
                    row.record = _claimed(row.record, activity.claimed_by, activity.restores)
                if activity.used:
                    seen = max(row.record.last_seen_at, now - timedelta(seconds=activity.last_age))
                    row.record = replace(row.record, last_seen_at=seen, expires_at=self._expiry(row.record, seen))
                if activity.stream is not None:
                    row.claim_stream(activity.stream, now)
            if self._live(key) is None:
                not_live.add(key)
            elif row is not None and row.stream is not None and activity.stream is not None:
                streams[key] = row.stream._replace(waiting=self._data.waits_for_stream(key))
        return Touched(not_live, streams)

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        check_keys(key)
        checked_type("reason", reason, EndReason, "an EndReason")
        row = self._live(key)
        if row is None:
            return False
        self._end(row, reason)
        self._data.changed(row)
        return True

    def _end(self, row: Row, reason: EndReason) -> None:
        row.ended = reason
        row.ended_at = self._data.now()
        row.record = replace(row.record, initialize_params="")
        row.journal.clear()
        self._data.remove_session(row.record.key)

    async def changes(self, since: datetime | None) -> Changes:
        changes = [
            Change(key=row.record.key, revision=row.record.revision, ended=row.ended)
            for row in self._mine()
            if since is not None and row.changed_at is not None and row.changed_at >= since
        ]
        return Changes(changes, until=self._data.now())

    async def listen(self, on_hint: OnHint) -> None:
        self._data.listeners.append(on_hint)
        try:
            await anyio.sleep_forever()
        finally:
            self._data.listeners.remove(on_hint)

    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        now, policy = self._data.now(), self.retention
        for row in self._mine():
            if row.ended is None and row.record.expires_at is None:
                row.record = replace(row.record, expires_at=self._expiry(row.record, now))
        expired = [row for row in self._mine() if row.ended is None and row.expired_at(now - policy.sweep_grace)]
        for row in expired[:limit]:
            self._end(row, EndReason.EXPIRED)
            if row.record.last_seen_at > now - MAY_BE_HELD:
                row.changed_at = now
        kept = policy.tombstone_kept
        old = [row for row in self._mine() if kept is not None and row.ended_at and row.ended_at <= now - kept]
        for row in old[:limit]:
            del self._data.rows[row.record.key]
        return SweepReport(
            expired=len(expired[:limit]),
            purged=len(old[:limit]),
            more=len(expired) > limit or len(old) > limit,
            lives=[(now - row.record.created_at).total_seconds() for row in expired[:limit]],
        )


def _claimed(record: SessionRecord, instance: str, restores: int) -> SessionRecord:
    """Return a record after a claim, with no fewer restores than it names, and one more by another instance."""
    counted = record.restores + (record.instance_hint != instance)
    return replace(record, instance_hint=instance, restores=max(counted, restores))
