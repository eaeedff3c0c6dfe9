"""Ends of sessions: by DELETE, on another instance or by an operator, by expiry and its sweep."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio

from mcp_session_store import telemetry
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.responses import SESSION_ENDED, SessionNotFound, ShuttingDown
from mcp_session_store.adapter.session_log import ENDED, IDLE
from mcp_session_store.adapter.sessions.changes import ChangeWatch
from mcp_session_store.errors import SessionStoreError
from mcp_session_store.records import EndReason, SessionRecord, session_key
from mcp_session_store.retention import SweepPace, SweepReport
from mcp_session_store.store import LEAST_SWEEP, SWEEP_LIMIT

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext

    from mcp_session_store.adapter.outage import RequestWait
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.lookup import Lookup
    from mcp_session_store.adapter.sessions.patient_store import PatientStore
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.records import Change

__all__ = ["EndHook", "Ender"]

logger = logging.getLogger(__name__)

EndHook: TypeAlias = Callable[[SessionRecord, EndReason], Awaitable[None]]

END_HOOK_TIMEOUT: Final = 5.0
"""Seconds that an `on_end` hook may hold up the answer to a DELETE."""


class Ender:
    """Ends sessions, and stops serving those that ended elsewhere.

    Args:
        store: The store that keeps the sessions.
        registry: Registry of the sessions in memory and of the restores under way.
        lookup: Looks up the record of a session for its principal.
        activity: Reports activity, and so learns which sessions are not live any more.
        tasks: Task group in which sessions are ended.
        on_end: The application's hook, called once for each resident session that ends.
        end_within: See `InstanceSettings`.
        serve_unverified_for: See `InstanceSettings`.
    """

    def __init__(
        self,
        store: PatientStore,
        registry: Registry,
        lookup: Lookup,
        activity: ActivityReporter,
        tasks: ManagerTasks,
        *,
        on_end: EndHook | None,
        end_within: float,
        serve_unverified_for: float | None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._lookup = lookup
        self._activity = activity
        self._tasks = tasks
        self._on_end = on_end
        self.changes: Final = ChangeWatch(
            store.inner,
            concerns=registry.concerns,
            learn=self.learn,
            verify=self.verify,
            within=end_within,
            unverified_for=serve_unverified_for,
        )
        """Learns which sessions ended elsewhere."""

    async def delete(self, session_id: str, requestor: AuthorizationContext | None, request: RequestWait) -> None:
        """End a session for its principal, resident or not.

        Args:
            session_id: Id of the session.
            requestor: Principal of the request.
            request: The request.

        Raises:
            SessionNotFound: There is no such session for this principal.
            SessionStoreError: The store did not answer, and the copy stays as it is.
        """
        done = anyio.Event()
        failure: Exception | None = ShuttingDown()

        async def end() -> None:
            nonlocal failure
            try:
                await self._delete(session_id, requestor, request)
                failure = None
            except Exception as error:
                failure = error
            finally:
                done.set()

        # In the manager's task group: what is committed is carried through, whether the client stays or not.
        self._tasks.start_soon(end)
        await done.wait()
        if failure is not None:
            raise failure

    async def _delete(self, session_id: str, requestor: AuthorizationContext | None, request: RequestWait) -> None:
        session = self._registry.get(session_id)
        key = session_key(session_id)
        record: SessionRecord | None = None
        if session is None or session.owner != requestor:
            record = await self._lookup.record_of(key, requestor, request)
        try:
            ended = await self._store.end(key, request, reason=EndReason.CLIENT)
        finally:
            self._lookup.forget(key)
        if (interest := self._registry.interest_in(key)) is not None:
            interest.ended = True
        if not ended:
            # It ended elsewhere.
            await self.end_not_live([key])
            raise SessionNotFound("ended")
        session = self._registry.get(session_id)
        if session is not None:
            await self._registry.evict(session, ENDED, answer=SESSION_ENDED)
            record = session.record
        lived = _age(record) if session is None else session.lifetime.age
        self._registry.log.ended(key, EndReason.CLIENT, record, lived=lived, counts=True)
        if session is not None:
            await self._notify_application(session, EndReason.CLIENT)

    def learn(self, change: Change) -> None:
        """Take over a change by another instance or an operator: an end, or a change of what a restore replays."""
        if (interest := self._registry.interest_in(change.key)) is not None:
            interest.ended = interest.ended or change.ended is not None
            interest.stale_since = max(interest.stale_since, change.revision)
        session = self._registry.with_key(change.key)
        if session is None:
            return
        if change.ended is not None:
            self._end_copy(session, change.ended)
        else:
            session.stale_since = max(session.stale_since, change.revision)
            self._registry.renew_if_stale(session)

    async def end_not_live(self, keys: Collection[UUID]) -> None:
        """Stop serving sessions that turned out not to be live, with the reason for which each one ended."""
        if any(self._registry.with_key(key) for key in keys):
            try:
                await self.changes.poll()
            except SessionStoreError as error:
                report_failure("changes", error, namespace=self._registry.log.namespace)
            # A session that did not end has expired.
            self._end_expired(keys)

    async def report(self) -> None:
        """Report activity, and stop serving sessions that are not live any more."""
        await self.end_not_live(await self._activity.report())

    async def sweep(self) -> None:
        """Sweep the store until nothing is left to sweep."""
        # A session in use here must not look unused: nothing is swept until the activity is reported.
        await self.report()
        log = self._registry.log
        pace = SweepPace(SWEEP_LIMIT, least=LEAST_SWEEP)
        total = SweepReport()
        with telemetry.within(telemetry.begin_span("sweep", log.namespace)) as span:
            try:
                while True:
                    began = anyio.current_time()
                    swept = await self._store.inner.sweep(limit=pace.limit)
                    total += swept
                    log.swept(swept)
                    if not swept.more:
                        break
                    await anyio.sleep(pace.pause_after(swept, anyio.current_time() - began))
            except Exception as error:
                telemetry.fail_span(span, error)
                raise
            finally:
                log.sweep_over(total)

    async def verify(self) -> None:
        """Find out which of all sessions in memory are not live any more, and stop serving them."""
        self._end_expired(await self._activity.report(everything=True))

    def end_past_life(self) -> None:
        """Stop serving sessions whose absolute lifetime is over, and evict those that were idle for too long.

        The store knows whether a session was used elsewhere meanwhile. So a copy whose calls run stays, until the store
        says in a report of activity that the session has expired.
        """
        for session in self._registry:
            if session.lifetime.past_absolute:
                self._end_copy(session, EndReason.EXPIRED)
            elif session.past_idle and not session.busy:
                self._registry.evict_soon(session, IDLE)

    def _end_expired(self, keys: Collection[UUID]) -> None:
        for key in keys:
            if (session := self._registry.with_key(key)) is not None:
                self._end_copy(session, EndReason.EXPIRED)

    def _end_copy(self, session: ResidentSession, reason: EndReason) -> None:
        """Stop serving a session that has ended, and notify the application."""
        if session.record is not None and not session.stopping:
            log, age = self._registry.log, session.lifetime.age
            log.ended(session.record.key, reason, session.record, lived=age, counts=False)
        self._registry.unpublish(session, ENDED)

        async def end() -> None:
            await self._registry.stop(session, answer=SESSION_ENDED)
            await self._notify_application(session, reason)

        self._tasks.start_soon(end)

    async def _notify_application(self, session: ResidentSession, reason: EndReason) -> None:
        if self._on_end is None or session.record is None:
            return
        record = session.record
        if session.marker is not None:
            # Its claim may have travelled with a report, whose answer has no record.
            record = replace(record, instance_hint=self._activity.instance, restores=session.marker.restores)
        try:
            with anyio.fail_after(END_HOOK_TIMEOUT):
                await self._on_end(record, reason)
        except Exception:
            logger.exception("the on_end hook failed for the session %s", session.record.key)


def _age(record: SessionRecord | None) -> float | None:
    """Return the seconds from the opening of a session to the load of its record, by the store's clock."""
    if record is None or record.loaded_at is None:
        return None
    return (record.loaded_at - record.created_at).total_seconds()
