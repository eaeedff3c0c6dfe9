"""Restores: a session that this process does not hold becomes resident from its record, by replay."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from mcp_session_store.adapter import telemetry
from mcp_session_store.adapter.replay.replay import Replay
from mcp_session_store.adapter.replay.request_ids import RequestIds
from mcp_session_store.adapter.responses import MemoryFull, SessionNotFound
from mcp_session_store.adapter.sessions.registry import Restore
from mcp_session_store.errors import RestoreRefused, SessionStoreError, StoreUnavailable
from mcp_session_store.records import EndReason, SessionRecord, SessionRestoreMarker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from starlette.types import Scope

    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.admission import Admission
    from mcp_session_store.adapter.sessions.lookup import Lookup
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.records import JournalEntry
    from mcp_session_store.store import SessionStore

__all__ = ["RestoreHook", "Restorer"]

logger = logging.getLogger(__name__)

RestoreHook: TypeAlias = Callable[[SessionRestoreMarker, SessionRecord], Awaitable[None]]

STOP_TIMEOUT: Final = 10.0
"""Seconds that a restore waits for an earlier copy to stop: the SDK gives a connection's `exit_stack` five."""
RESTORE_ATTEMPTS: Final = 3
"""Number of times that a restore begins, because the record changed meanwhile."""


class Restorer:
    """Restores sessions: each one once at a time, however many requests wait for it.

    Args:
        store: The store that keeps the sessions.
        registry: Registry of the sessions in memory and of the restores under way.
        lookup: Looks up the record of a session for its principal.
        admission: Makes the copy and runs its server loop.
        tasks: Task group in which restores run.
        instance: Id of this instance.
        on_restore: The application's hook; it may refuse a restore.
        replay_timeout: Seconds that each part of a replay may take.
    """

    def __init__(
        self,
        store: SessionStore,
        registry: Registry,
        lookup: Lookup,
        admission: Admission,
        tasks: ManagerTasks,
        *,
        instance: str,
        on_restore: RestoreHook | None,
        replay_timeout: float,
    ) -> None:
        self._store = store
        self._registry = registry
        self._lookup = lookup
        self._admission = admission
        self._tasks = tasks
        self._instance = instance
        self._on_restore = on_restore
        self._replay_timeout = replay_timeout

    async def restored(self, session_id: str, requestor: AuthorizationContext | None, scope: Scope) -> ResidentSession:
        """Return a session, resident and pinned, after a restore if it is not in memory.

        Args:
            session_id: Id of the session.
            requestor: Principal of the request.
            scope: ASGI scope of the request.

        Raises:
            SessionNotFound: There is no such session for this principal.
            MemoryFull: All places in memory are in use.
            SessionStoreError: The store did not answer.
        """
        session = self._registry.get(session_id)
        if session is None or not session.serving or session.owner != requestor:
            # Query the store for another principal's resident session too, so that neither timing nor an outage
            # distinguishes it from an unknown one.
            record = await self._lookup.record_of(session_id, requestor)
            # It may have been restored while the query ran.
            session = self._registry.get(session_id)
            if session is None or not session.serving:
                return await self._join_restore(session_id, record, requestor, scope)
        session.pin()
        return session

    async def _join_restore(
        self, session_id: str, record: SessionRecord, requestor: AuthorizationContext | None, scope: Scope
    ) -> ResidentSession:
        """Wait for the one restore of this session, and begin it if none is under way.

        All requests that join are of the session's principal: their lookups have passed.
        """
        restore = self._registry.restores.get(session_id)
        if restore is None:
            restore = self._registry.restores[session_id] = Restore(record.key)
            # In the manager's task group: the disconnect of this request fails no other. The task inherits this
            # request's context variables.
            self._tasks.start_soon(self._run_restore, restore, session_id, record, requestor, scope)
        restore.waiters += 1
        try:
            await restore.over.wait()
        except BaseException:
            if restore.session is not None:
                restore.session.unpin()
            restore.waiters -= 1
            raise
        if restore.session is None:
            assert restore.failure is not None
            raise restore.failure
        return restore.session

    async def _run_restore(
        self,
        restore: Restore,
        session_id: str,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
    ) -> None:
        try:
            session = await self._restore(restore, session_id, record, requestor, scope)
            # Pinned for all requests that wait, before anything else can run: none of them meets a stopping copy.
            session.pin(restore.waiters)
            restore.session = session
        except (SessionNotFound, MemoryFull, SessionStoreError) as failure:
            restore.failure = failure
        except Exception:
            logger.exception("the session %s could not be restored", record.key)
            restore.failure = StoreUnavailable("the session could not be restored")
        finally:
            if restore.session is None and restore.failure is None:
                restore.failure = StoreUnavailable("the manager is shutting down")
            del self._registry.restores[session_id]
            restore.over.set()

    async def _restore(
        self,
        restore: Restore,
        session_id: str,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
    ) -> ResidentSession:
        """Make a session resident from its record."""
        previous_instance = record.instance_hint
        for _ in range(RESTORE_ATTEMPTS):
            await self._await_predecessor(session_id)
            marker = SessionRestoreMarker(
                session_id=session_id,
                created_at=record.created_at,
                restored_at=datetime.now(UTC),
                restores=record.restores + 1,
                previous_instance=previous_instance,
                replaying=True,
            )
            await self._ask_application(marker, record)
            journal = await self._store.read_journal(record.key) if record.revision else ()
            session = self._admission.admit(session_id, requestor)
            try:
                claimed = await self._replay(session, marker, record, journal, scope)
                if restore.ended:
                    raise SessionNotFound
                if not session.serving or session.loop.stopped.is_set():
                    raise StoreUnavailable("the server loop of a session ended while it was being restored")
                if claimed.revision == record.revision:
                    session.stored(claimed, self._store.retention, new=False)
                    session.stale_since = restore.stale_since
                    session.marker = dataclasses.replace(marker, restores=claimed.restores, replaying=False)
                    self._registry.publish(session)
                    telemetry.restored.add(1)
                    return session
            finally:
                if self._registry.get(session_id) is not session:
                    await self._registry.evict(session)
            # Another instance has replaced meanwhile what was replayed here.
            record = claimed
        raise StoreUnavailable("the session kept changing while it was restored")

    async def _await_predecessor(self, session_id: str) -> None:
        """Wait until an earlier copy of this session has stopped, clean-up included."""
        if (not_serving := self._registry.get(session_id)) is not None:
            await self._registry.evict(not_serving)
        predecessor = self._registry.stopping(session_id)
        if predecessor is None:
            return
        with anyio.move_on_after(STOP_TIMEOUT):
            await predecessor.loop.stopped.wait()
            return
        raise StoreUnavailable(
            "an earlier copy of the session has not left memory yet, because one of its handlers does not end"
        )

    async def _ask_application(self, marker: SessionRestoreMarker, record: SessionRecord) -> None:
        """Let the application refuse the restore, which ends the session."""
        if self._on_restore is None:
            return
        try:
            with anyio.fail_after(self._replay_timeout):
                await self._on_restore(marker, record)
        except RestoreRefused:
            await self._store.end(record.key, reason=EndReason.REFUSED)
            telemetry.ended.add(1, {"reason": EndReason.REFUSED.value})
            raise SessionNotFound from None

    async def _replay(
        self,
        session: ResidentSession,
        marker: SessionRestoreMarker,
        record: SessionRecord,
        journal: Sequence[JournalEntry],
        scope: Scope,
    ) -> SessionRecord:
        """Replay the handshake and the journal into a session that no request can reach yet, and claim it."""
        session.loop.swallow_initialized = True
        session.loop.request_ids = RequestIds()
        replay = session.loop.replay = Replay(record, journal, marker, scope, session, timeout=self._replay_timeout)
        # The replay's timeout for the answer to `initialize` and for the notification's handler, with room for the
        # journal.
        self._tasks.start_soon(self._admission.run, session)
        with anyio.move_on_after((4 if journal else 2) * self._replay_timeout):
            await replay.over.wait()
        if not replay.over.is_set():
            raise StoreUnavailable("the replay of a session took too long")
        if replay.broken:
            raise StoreUnavailable(f"a session could not be restored: {replay.failure}")
        if replay.failure is not None:
            # The record stays: in a rolling deploy other instances still serve the session.
            logger.warning("the session %s cannot be restored by this instance: %s", record.key, replay.failure)
            raise SessionNotFound
        claimed = await self._store.claim(record.key, instance=self._instance, restores=record.restores)
        if claimed is None:
            raise SessionNotFound
        return claimed
