"""Refreshes: what was changed in a session elsewhere is brought into the copy of this instance, while it serves."""

from __future__ import annotations

import contextvars
import logging
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import anyio
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCResponse
from starlette.requests import Request

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.replay.journal import StateName
from mcp_session_store.adapter.replay.marker import REPLAYED_SESSION, SessionRestoreMarker
from mcp_session_store.adapter.replay.mirrored import MirroredCalls, scope_of
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import NEVER_FRESH, RESIDENT_SESSION
from mcp_session_store.adapter.sessions.state import STATE
from mcp_session_store.store import read_params

if TYPE_CHECKING:
    from typing import Any

    from mcp_session_store.adapter.replay.journal import ElsewhereChange
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.records import SessionRecord

__all__ = ["Refresher"]

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 100
"""Changes of one session that wait for its copy. Beyond them the journal is read, which has them all."""
RETRY_INTERVAL: Final = 1.0
"""Seconds between two tries while the store does not answer."""


class Refresher:
    """Brings into copies what other copies of their sessions have changed: those of each session one after the other.

    A change comes with the journaled call that made it, from the copy that ran the call. A copy that is one revision
    behind runs it, too. Any other is stale, and so is one that misses the message: it leaves memory if it is idle; one
    in use reads the journal, and runs what it does not have.

    Args:
        registry: Registry of the sessions in memory.
        writer: Commits what calls to this instance change.
        tasks: Task group in which copies are refreshed.
        replay_timeout: Seconds that a call may take until the next one goes on beside it.
    """

    def __init__(self, registry: Registry, writer: RecordWriter, tasks: ManagerTasks, replay_timeout: float) -> None:
        self._registry = registry
        self._writer = writer
        self._tasks = tasks
        self._timeout = replay_timeout
        self._context = contextvars.copy_context()
        registry.on_stale = self.refresh
        self._waiting: dict[ResidentSession, deque[ElsewhereChange]] = {}
        """Changes that wait for copies, of which each has a task that brings them in."""

    def take(self, session: ResidentSession, change: ElsewhereChange) -> None:
        """Bring a change by another copy into a copy, in the background."""
        waiting = self._waiting.get(session, ())
        if change.name is None or len(waiting) >= MAX_WAITING:
            self._missed(session, change.revision)
        elif isinstance(waiting, deque):
            waiting.append(change)
        else:
            self._begin(session, change)

    def refresh(self, session: ResidentSession) -> None:
        """Bring into a stale copy in use what it lacks, in the background."""
        if session not in self._waiting and session.stale_since < NEVER_FRESH:
            self._begin(session)

    def _begin(self, session: ResidentSession, *changes: ElsewhereChange) -> None:
        self._waiting[session] = deque(changes)
        # Not in the context of a request, of which a handler would find the user.
        self._context.copy().run(self._tasks.start_soon, self._serve, session)

    def _missed(self, session: ResidentSession, revision: int) -> None:
        """Note that a copy lacks something that its record has, or does not know whether it does."""
        session.stale_since = max(session.stale_since, revision)
        self._registry.renew_if_stale(session)

    async def _serve(self, session: ResidentSession) -> None:
        """Bring in the changes of a session until none is left."""
        waiting = self._waiting[session]
        is_logged = False
        try:
            while not session.stopping:
                try:
                    if waiting:
                        with session.taking_change():
                            await self._mirror(session, waiting.popleft())
                    elif not _is_to_refresh(session):
                        break
                    else:
                        async with session.recording:
                            pass  # What is heard of may be a change that is being committed here.
                        if not _is_to_refresh(session):
                            continue
                        with session.taking_change():
                            await self._refresh(session)
                        if _is_to_refresh(session):
                            await anyio.sleep(RETRY_INTERVAL)
                except Exception as error:
                    assert session.record is not None
                    namespace = self._registry.log.namespace
                    report_failure("refresh", error, key=session.record.key, namespace=namespace, log=not is_logged)
                    is_logged = True
                    await anyio.sleep(RETRY_INTERVAL)
        finally:
            del self._waiting[session]

    async def _mirror(self, session: ResidentSession, change: ElsewhereChange) -> None:
        """Run a call that another copy has run, if it is the next one."""
        record, state = session.record, session.set_state
        assert record is not None
        assert change.name is not None
        if change.revision <= record.revision or change.revision in state.ahead:
            return
        if change.revision > record.revision + 1:
            self._missed(session, change.revision)
            return
        # Unless a later call to this copy has set the same already.
        if not state.has_later(change.name, change.revision):
            if not await self._run(session, change.name, change.method, change.params):
                self._missed(session, change.revision)
                return
            state.keep(change.name, is_set=change.method == change.name.method)
        self._reached(session, change.revision)

    async def _run(self, session: ResidentSession, name: StateName, method: str, params: dict[str, Any] | None) -> bool:
        """Run a call; return whether it came to the server loop."""
        mirrored = self._mirrored(session)
        is_waited_for = not mirrored.is_late
        session.set_state.begin_other(name)
        try:
            call = await mirrored.run(session.session_id, _marker_of(session), method, params)
        finally:
            session.set_state.end_other()
        if call is None:
            return False
        assert session.record is not None
        if call.answer is None and is_waited_for:
            logger.warning(
                "a journaled call of %s of the session %s is slow to be answered, when it is run for another copy",
                method,
                session.record.key,
            )
        elif isinstance(call.answer, JSONRPCError):
            logger.warning(
                "a journaled call of %s of the session %s was answered by an error, when it was run for another copy",
                method,
                session.record.key,
            )
        return True

    def _mirrored(self, session: ResidentSession) -> MirroredCalls:
        loop = session.loop
        if loop.mirrored is None:
            loop.mirrored = MirroredCalls(
                session.transport,
                session,
                timeout=self._timeout,
                found={STATE: self._writer.state, REPLAYED_SESSION: session},
            )
        return loop.mirrored

    def _reached(self, session: ResidentSession, revision: int) -> None:
        """Note that a copy has everything up to a revision."""
        record = session.record
        assert record is not None
        revision = session.set_state.reached(max(revision, record.revision))
        session.record = replace(record, revision=revision)

    async def _refresh(self, session: ResidentSession) -> None:
        """Read what the record has, and bring it into the copy."""
        had, state = session.record, session.set_state
        assert had is not None
        names = frozenset(state.names)
        record = await self._writer.store.inner.load(had.key)
        if record is None:
            await self._writer.on_not_live([had.key])
            return
        # Also at the same revision, which a write of one value here may have made after another was written elsewhere.
        if record.revision >= session.watched_revision:
            session.watched, session.watched_revision = record.watched, record.revision
        # Later than the record, so that nothing is missing that the record's revision has.
        journal = await self._writer.store.inner.read_journal(had.key)
        if record.initialize_params != had.initialize_params and not await self._initialize(session, had, record):
            return
        for name in names.difference(StateName(entry.method, entry.subject) for entry in journal):
            if (undoing := self._writer.journal.undoing(name)) is None:
                self._give_up(
                    session, f"a call of {name.method} was undone elsewhere, and its params are not known here"
                )
                return
            if state.has_later(name, record.revision):
                continue
            if not await self._run(session, name, *undoing):
                return
            state.keep(name, is_set=False)
        for entry in journal:
            name = StateName(entry.method, entry.subject)
            if 0 < entry.revision <= had.revision or entry.revision in state.ahead:
                continue
            if state.has_later(name, max(entry.revision, record.revision)):
                continue
            if not await self._run(session, name, entry.method, read_params(entry.params)):
                return
            state.keep(name, is_set=True)
        assert session.record is not None
        session.record = replace(session.record, watched=record.watched)
        self._reached(session, record.revision)

    async def _initialize(self, session: ResidentSession, had: SessionRecord, record: SessionRecord) -> bool:
        """Handle a repeated `initialize`, and what follows it, as a restore does; return whether this is done."""
        params = read_params(record.initialize_params)
        call = await self._mirrored(session).run(session.session_id, _marker_of(session), "initialize", params)
        if call is None:
            return False
        answer = call.answer
        if not isinstance(answer, JSONRPCResponse) or answer.result.get("protocolVersion") != record.protocol_version:
            self._give_up(
                session, "its client has repeated initialize elsewhere, which is answered in another way here"
            )
            return False
        assert session.record is not None
        if session.record.initialize_params != had.initialize_params:
            # The client has sent another one here, before this or after it. The record says which one counts.
            newest = await self._writer.store.inner.load(record.key)
            return newest is not None and await self._initialize(session, session.record, newest)
        session.record = replace(
            session.record,
            initialize_params=record.initialize_params,
            protocol_version=record.protocol_version,
            client_name=record.client_name,
            client_version=record.client_version,
        )
        scope = scope_of(session.session_id, _marker_of(session))
        scope.update({RESIDENT_SESSION: session, RECORD_WRITER: self._writer, STATE: self._writer.state})
        scope[REPLAYED_SESSION] = session
        initialized = JSONRPCNotification(jsonrpc="2.0", method="notifications/initialized")
        with anyio.move_on_after(self._timeout):
            session.loop.swallow_initialized = False
            try:
                await sdk.deliver(session.transport, initialized, Request(scope))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return False
            finally:
                # The client's own is not the one that was handled.
                session.loop.swallow_initialized = True
        return True

    def _give_up(self, session: ResidentSession, reason: str) -> None:
        """Have a copy leave memory as soon as it is not in use, because it cannot be refreshed."""
        assert session.record is not None
        logger.info("the session %s cannot be refreshed while its copy is in use: %s", session.record.key, reason)
        session.stale_since = NEVER_FRESH


def _is_to_refresh(session: ResidentSession) -> bool:
    return session.stale and session.busy and session.stale_since < NEVER_FRESH


def _marker_of(session: ResidentSession) -> SessionRestoreMarker:
    """Return the marker that the handlers of mirrored calls find."""
    if session.marker is not None:
        return replace(session.marker, replaying=True)
    record = session.record
    assert record is not None
    return SessionRestoreMarker(
        session_id=session.session_id,
        created_at=record.created_at,
        restored_at=datetime.now(UTC),
        restores=record.restores,
        previous_instance=record.instance_hint,
        replaying=True,
    )
