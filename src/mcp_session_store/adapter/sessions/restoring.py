"""Restores: a session that this process does not hold becomes resident from its record, by replay."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
from opentelemetry.trace import get_current_span
from starlette.requests import Request

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import is_cancelled
from mcp_session_store.adapter.replay.journal import StateName
from mcp_session_store.adapter.replay.marker import REPLAYED_SESSION, SessionRestoreMarker
from mcp_session_store.adapter.replay.replay import TOO_LONG, Replay
from mcp_session_store.adapter.responses import MemoryFull, RestoreFailed, SessionNotFound, ShuttingDown
from mcp_session_store.adapter.session_log import STALE
from mcp_session_store.adapter.sessions.restores import Restore
from mcp_session_store.errors import RestoreRefused, SessionStoreError, StoreUnavailable
from mcp_session_store.records import EndReason, SessionRecord, session_key

if TYPE_CHECKING:
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from starlette.types import Scope

    from mcp_session_store.adapter.outage import RequestWait
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.admission import Admission
    from mcp_session_store.adapter.sessions.changes import ChangeWatch
    from mcp_session_store.adapter.sessions.lookup import Lookup
    from mcp_session_store.adapter.sessions.patient_store import PatientStore
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.sessions.restores import Interest

__all__ = ["RestoreHook", "Restorer"]

logger = logging.getLogger(__name__)

RestoreHook: TypeAlias = Callable[[SessionRestoreMarker, SessionRecord], Awaitable[None]]

STOP_TIMEOUT: Final = 10.0
"""Seconds that a restore waits for an earlier copy to stop: the SDK gives a connection's `exit_stack` five."""
MAX_UNANSWERED: Final = 1_000
"""Number of claims without an answer that are remembered."""
RESTORE_ATTEMPTS: Final = 3
"""Number of times that a restore begins, because the record changed meanwhile."""


class _RequestRefused(SessionNotFound):
    """The application refuses the request that began the restore, and perhaps no other one."""


class Restorer:
    """Restores sessions: each one once at a time, however many requests wait for it.

    Args:
        store: The store that keeps the sessions.
        registry: Registry of the sessions in memory and of the restores under way.
        lookup: Looks up the record of a session for its principal.
        admission: Makes the copy and runs its server loop.
        activity: Reports activity, and with it claims the sessions that were restored.
        changes: Learns which sessions ended or changed elsewhere.
        tasks: Task group in which restores run.
        on_restore: The application's hook; it may refuse a restore.
        replay_timeout: Seconds that each part of a replay may take.
        loads_newest_event: Whether a loaded record says the newest event of the event log, see `EventLog.is_of`.
    """

    def __init__(
        self,
        store: PatientStore,
        registry: Registry,
        lookup: Lookup,
        admission: Admission,
        activity: ActivityReporter,
        changes: ChangeWatch,
        tasks: ManagerTasks,
        *,
        on_restore: RestoreHook | None,
        replay_timeout: float,
        loads_newest_event: bool,
    ) -> None:
        self._store = store
        self._registry = registry
        self._lookup = lookup
        self._admission = admission
        self._activity = activity
        self._changes = changes
        self._tasks = tasks
        self._on_restore = on_restore
        self._replay_timeout = replay_timeout
        self._loads_newest_event = loads_newest_event
        self._unanswered: dict[UUID, tuple[int, str]] = {}
        """Claims that may have taken effect without an answer, by key: restores and instance before each."""

    async def restored(
        self,
        session_id: str,
        requestor: AuthorizationContext | None,
        scope: Scope,
        request: RequestWait,
        attempts: int = RESTORE_ATTEMPTS,
    ) -> ResidentSession:
        """Return a session, resident and pinned, after a restore if it is not in memory.

        Args:
            session_id: Id of the session.
            requestor: Principal of the request.
            scope: ASGI scope of the request.
            request: The request, which may have to wait for the store.
            attempts: Number of restores that it waits for, because the application refuses those that began them.

        Raises:
            SessionNotFound: There is no such session for this principal.
            MemoryFull: All places in memory are in use.
            SessionStoreError: The store did not answer.
        """
        # From before the load, so that an end or a change is heard of that the record does not show.
        interest = self._registry.take_interest(session_key(session_id))
        try:
            # Query the store for a resident session too: another principal's, so that neither timing nor an outage
            # distinguishes it from an unknown one, and one that must be verified before it is served.
            record = await self._lookup.record_of(interest.key, requestor, request)
            # It may have been restored while the query ran.
            session = self._registry.get(session_id)
            if session is not None and record.revision > session.stale_since:
                # Another copy may have changed what this one replayed, and this one not have heard of it.
                session.stale_since = record.revision
                self._registry.renew_if_stale(session)
                session = self._registry.get(session_id)
            if session is None or not session.can_serve:
                return await self._join_restore(session_id, interest, record, requestor, scope, request, attempts)
        finally:
            self._registry.lose_interest(interest)
        session.pin()
        return session

    async def _join_restore(
        self,
        session_id: str,
        interest: Interest,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
        request: RequestWait,
        attempts: int,
    ) -> ResidentSession:
        """Wait for the one restore of this session, and begin it if none is under way.

        All requests that join are of the session's principal: their lookups have passed.
        """
        joined = restore = self._registry.restores.get(session_id)
        # The client may have changed the session elsewhere before it sent a request that joins.
        if record.revision > interest.stale_since:
            interest.stale_since = record.revision
        if restore is None:
            # A claim that has not left yet counts as if it were stored.
            restores, instance = self._before_unanswered(record)
            if (claimed := self._activity.claimed(interest.key)) > 0:
                restores = max(restores + (instance != self._activity.instance), claimed)
                instance = self._activity.instance
            restore = self._registry.restores[session_id] = Restore(
                session_id,
                interest,
                previous_instance=instance,
                restores=restores,
                loaded_at=clock.now(),
                arrived=request.arrived,
                span=telemetry.begin_span("restore", record.namespace, key=interest.key),
            )
            # In the manager's task group: the disconnect of this request fails no other. The task inherits this
            # request's context variables.
            self._tasks.start_soon(self._run_restore, restore, record, requestor, scope, RESTORE_ATTEMPTS)
        else:
            restore.span.add_link(get_current_span().get_span_context())
        restore.waiters += 1
        try:
            await restore.over_or_waiting.wait()
            if not restore.is_over:
                await self._store.gate.hold(request, restore.wait)
        except BaseException:
            if restore.session is not None:
                restore.session.unpin()
            restore.waiters -= 1
            if restore.is_waiting and not restore.waiters:
                self._registry.not_restored(restore, StoreUnavailable("no request waits for the restore any more"))
                restore.give_up()
            raise
        if restore.session is None:
            assert restore.failure is not None
            if joined is None or not isinstance(restore.failure, _RequestRefused):
                raise restore.failure
            if attempts == 1:
                raise RestoreFailed("the application kept refusing requests whose restores this one waited for")
            return await self.restored(session_id, requestor, scope, request, attempts - 1)
        return restore.session

    async def _run_restore(
        self,
        restore: Restore,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
        attempts: int,
    ) -> None:
        """Make a copy of a session, restore it, and serve it until it leaves memory."""
        try:
            # The replay takes the context as it is then.
            with telemetry.within(restore.span, ends=False):
                session = await self._admitted(restore, record, requestor, scope, attempts)
        except BaseException as error:
            self._registry.not_restored(restore, self._failure(error, record))
            if isinstance(error, Exception) or (
                isinstance(error, anyio.get_cancelled_exc_class()) and not is_cancelled()
            ):
                return
            raise
        # Not needed any more when the restore is over, while the copy lives.
        del restore, record, requestor, scope
        await self._admission.run(session)

    async def _admitted(
        self,
        restore: Restore,
        record: SessionRecord,
        requestor: AuthorizationContext | None,
        scope: Scope,
        attempts: int,
    ) -> ResidentSession:
        """Return the copy of a session that is going to be restored."""
        session_id = restore.session_id
        await self._await_predecessor(session_id)
        marker = SessionRestoreMarker(
            session_id=session_id,
            created_at=record.created_at,
            restored_at=datetime.now(UTC),
            restores=restore.restores + 1,
            previous_instance=restore.previous_instance,
            replaying=True,
            request=Request(scope),
        )
        if self._on_restore is not None:
            await self._ask_application(self._on_restore, restore, marker, record)
        journal = await self._store.read_journal(record.key, restore) if record.revision else ()
        session = restore.copy = self._admission.admit(session_id, requestor)
        session.watched, session.watched_revision = record.watched, record.revision
        if journal:
            session.set_state.names.update(StateName(entry.method, entry.subject) for entry in journal)

        def failed(failure: Exception) -> None:
            self._registry.not_restored(restore, failure)

        async def replayed() -> bool:
            if restore.is_over:
                return False
            restore.deadline = math.inf
            session.loop.limit(math.inf)
            return await self._publish(restore, session, marker, record, scope, attempts)

        replay = Replay(
            record,
            journal,
            marker,
            {**scope, REPLAYED_SESSION: session},
            session,
            timeout=self._replay_timeout,
            on_replayed=replayed,
            on_failure=failed,
        )
        # The replay's timeout for the answer to `initialize` and for the notification's handler, with room for the
        # journal.
        restore.deadline = anyio.current_time() + (4 if journal else 2) * self._replay_timeout
        session.loop.begin_with(replay, restore.deadline)
        return session

    def _before_unanswered(self, record: SessionRecord) -> tuple[int, str]:
        """Return the restores of a record and its instance, without a claim of a restore that was given up."""
        before = self._unanswered.pop(record.key, None)
        if before is not None and (record.restores, record.instance_hint) == (before[0] + 1, self._activity.instance):
            # The next claim names the same number, so that both count once.
            return before
        return record.restores, record.instance_hint

    def _may_claim_later(self, record: SessionRecord, interest: Interest) -> bool:
        """Return whether the next report of activity may claim a session that was restored from a record.

        Not when there may be more to replay, or when the process may have been suspended since the load: the answer
        to a claim says what was missed. And not when the store takes no reports, so that copies are not made without
        end that it knows nothing of.
        """
        return not (
            interest.stale_since or record.loaded_at is None or self._activity.failing or not self._changes.verified
        )

    async def _publish(
        self,
        restore: Restore,
        session: ResidentSession,
        marker: SessionRestoreMarker,
        record: SessionRecord,
        scope: Scope,
        attempts: int,
    ) -> bool:
        """Publish the copy of a session that was replayed, and claim the session; return whether the copy serves."""
        interest = restore.interest
        try:
            loaded_at: float | None = None
            claimed: SessionRecord | None
            if self._may_claim_later(record, interest):
                loaded_at = restore.loaded_at
                claimed = record
            else:
                claimed = await self._claimed(record.key, restore)
            if claimed is None or interest.ended:
                raise SessionNotFound("ended")
            if not session.serving:
                raise RestoreFailed("the server loop of a session ended while it was being restored")
            if claimed.revision == record.revision:
                newest_event = claimed.newest_event if self._loads_newest_event else None
                session.stored(
                    claimed, self._store.inner.retention, new=False, loaded_at=loaded_at, newest_event=newest_event
                )
                if session.lifetime.past_absolute:
                    raise SessionNotFound("expired")
                if loaded_at is not None:
                    self._activity.claim(
                        record.key, restores=marker.restores, since=loaded_at, used=session.lifetime.used
                    )
                session.stale_since = interest.stale_since
                session.marker = replace(
                    marker, restores=max(marker.restores, claimed.restores), replaying=False, request=None
                )
                self._registry.restored(restore, session)
                return True
            if attempts == 1:
                raise RestoreFailed("the session kept changing while it was restored")
        except Exception as error:
            self._registry.not_restored(restore, self._failure(error, record))
            return False
        # Another instance has replaced meanwhile what was replayed here.
        restore.restores = claimed.restores
        self._registry.unpublish(session, STALE)
        self._tasks.start_soon(self._run_restore, restore, claimed, session.owner, scope, attempts - 1)
        return False

    async def _claimed(self, key: UUID, restore: Restore) -> SessionRecord | None:
        """Claim a session for a restore."""
        try:
            return await self._store.claim(key, restore, instance=self._activity.instance, restores=restore.restores)
        except BaseException:
            if len(self._unanswered) >= MAX_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]
            self._unanswered[key] = restore.restores, restore.previous_instance
            raise

    def _failure(self, error: BaseException, record: SessionRecord) -> Exception:
        """Return the failure of a restore for the requests that wait for it."""
        if isinstance(error, SessionNotFound | MemoryFull | SessionStoreError):
            return error
        if isinstance(error, Exception) or not is_cancelled():
            logger.error("the session %s could not be restored", record.key, exc_info=error)
            return RestoreFailed("the session could not be restored")
        return ShuttingDown()

    async def fail_overdue(self) -> None:
        """Fail the restores whose replay takes too long, and does not let itself be cancelled."""
        now = anyio.current_time()
        for restore in list(self._registry.restores.values()):
            if restore.deadline <= now:
                self._registry.not_restored(restore, RestoreFailed(TOO_LONG))

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
        raise RestoreFailed(
            "an earlier copy of the session has not left memory yet, because one of its handlers does not end"
        )

    async def _ask_application(
        self, hook: RestoreHook, restore: Restore, marker: SessionRestoreMarker, record: SessionRecord
    ) -> None:
        """Let the application refuse the restore, which ends the session."""
        try:
            with anyio.fail_after(self._replay_timeout):
                await hook(marker, record)
        except RestoreRefused as refusal:
            if not refusal.ends_session:
                raise _RequestRefused("refused") from None
            await self._store.end(record.key, restore, reason=EndReason.REFUSED)
            self._lookup.forget(record.key)
            lived = None if record.loaded_at is None else (record.loaded_at - record.created_at).total_seconds()
            self._registry.log.ended(record.key, EndReason.REFUSED, record, lived=lived, counts=True)
            raise SessionNotFound("refused") from None
