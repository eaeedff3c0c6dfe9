"""Copies that leave memory for being unused, and questions of copies whose clients are away for good."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import anyio
from mcp_types import CONNECTION_CLOSED, ErrorData, JSONRPCError

from mcp_session_store.adapter import clock, sdk
from mcp_session_store.adapter.session_log import IDLE
from mcp_session_store.adapter.sessions.eviction import AWAY, AWAY_RESUMABLE
from mcp_session_store.errors import RecordUnreadable, StoreBusy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.ending import Ender
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.records import SessionRecord
    from mcp_session_store.settings import InstanceSettings
    from mcp_session_store.store import SessionStore

__all__ = ["Absences"]

logger = logging.getLogger(__name__)

INTERVAL: Final = 2.5
"""Most seconds between two rounds."""
LOOK_AGAIN: Final = 60.0
"""Seconds after which the store is asked again about a copy whose client is away."""
LOADS: Final = 100
"""Number of records that are loaded at once, which a SQL store does in one statement."""
LOOK_TIMEOUT: Final = 5.0
"""Seconds that a round asks the store at most."""
READ_TIMEOUT: Final = 5.0
"""Seconds that a server loop has to read the errors that end its questions."""
SLACK: Final = 1.0
"""Seconds by which a use that this instance has reported may seem to come after the client's last contact here."""


class Absences:
    """Evicts copies that are not used, and finds out about clients that are away from copies at work.

    A copy at work, which runs a call or waits for the answer to a question, is in use while its client is here: while
    there is contact, and for as long as the client was active on any instance within `evict_after`. So the store is
    asked, in one query for all copies at work whose clients have had no contact for some time. Where it cannot say,
    contact here alone counts. When the client is not here any more nothing will answer the questions of the copy. One
    that runs a call gets errors for them, so that it comes to rest and leaves; any other leaves at once.

    Args:
        store: The store that keeps the sessions.
        registry: Registry of the sessions in memory.
        ender: Ends sessions whose life is over.
        activity: Reports activity, which other instances do as well.
        tasks: Task group in which questions are ended.
        settings: The numbers of this process.
    """

    def __init__(
        self,
        store: SessionStore,
        registry: Registry,
        ender: Ender,
        activity: ActivityReporter,
        tasks: ManagerTasks,
        settings: InstanceSettings,
    ) -> None:
        self._store = store
        self._registry = registry
        self._ender = ender
        self._lag = activity.lag
        self._tasks = tasks
        evict_after = settings.evict_after
        self._evict_after = math.inf if evict_after is None else evict_after
        # A use on another instance is in the store when that instance has reported it.
        self._here_for = (AWAY_RESUMABLE if evict_after is None else evict_after) + activity.lag
        self.interval: Final = min(self._evict_after / 4, settings.end_within / 2, INTERVAL)
        """Seconds between two rounds, also after failures: what the store has not said is then decided without it."""

    async def evict_unused(self) -> None:
        """Evict copies that have been idle for a while, stop serving sessions whose life is over, end lost questions.

        Raises:
            SessionStoreError: The store did not say which clients are active elsewhere.
        """
        if self._evict_after < math.inf:
            self._registry.evict_idle(clock.now() - self._evict_after)
        self._ender.end_past_life()
        now = clock.now()
        if away := [session for session in self._registry if _is_away(session, now)]:
            await self._look(away)

    async def _look(self, away: Sequence[ResidentSession]) -> None:
        """Ask the store about clients that are away, and act on what it says."""
        try:
            with anyio.move_on_after(LOOK_TIMEOUT) as scope:
                for start in range(0, len(away), LOADS):
                    await self._ask(away[start : start + LOADS])
        finally:
            # Also where the store has not said anything: contact here then decides alone.
            now = clock.now()
            for session in away:
                session.looked_at = now
        if scope.cancelled_caught:
            raise StoreBusy(f"the store did not say within {LOOK_TIMEOUT:g} s which of {len(away)} clients are active")

    async def _ask(self, away: Sequence[ResidentSession]) -> None:
        began = clock.now()
        found: dict[ResidentSession, SessionRecord | None] = {}
        failures: list[Exception] = []

        async def load(session: ResidentSession, key: UUID) -> None:
            try:
                found[session] = await self._store.load(key)
            except RecordUnreadable:
                pass  # what is stored says nothing
            except Exception as error:
                failures.append(error)

        async with anyio.create_task_group() as loads:
            for session in away:
                assert session.record is not None
                loads.start_soon(load, session, session.record.key)
        for session, record in found.items():
            if record is not None and record.loaded_at is not None:
                self._learn(session, began - (record.loaded_at - record.last_seen_at).total_seconds(), began)
        if not_live := [one.record.key for one, record in found.items() if record is None and one.record is not None]:
            await self._ender.end_not_live(not_live)
        if failures:
            raise failures[0]

    def _learn(self, session: ResidentSession, used_at: float, began: float) -> None:
        """Take over when a session was last used anywhere, as the store knows it.

        Args:
            session: The session.
            used_at: That moment.
            began: Moment at which the store was asked.
        """
        if used_at > session.last_contact + SLACK:
            session.elsewhere_until = used_at + self._here_for
        last = max(used_at, session.last_contact)
        if began < last + self._here_for or self._evict_after == math.inf or not session.loop.asked:
            return
        if began < self._ender.changes.steady_since + self._lag or session.pins or session.answering:
            return  # after an outage other instances have to report first, and after a pause clients come back
        if session.in_flight:
            self._tasks.start_soon(self._end_questions, session, began - last)
        elif not session.stopping:
            # Not by errors, because a task that asks again and again would never let it come to rest.
            self._registry.evict_soon(session, IDLE)

    async def _end_questions(self, session: ResidentSession, away: float) -> None:
        """Have the questions of a copy be answered by errors, unless its client comes back."""
        message = f"the client has not been active for {away:.0f} seconds, and will not answer"
        error = ErrorData(code=CONNECTION_CLOSED, message=message)
        asked = list(session.loop.asked)
        assert session.record is not None
        logger.info("the session %s gets no answer to %d questions: %s", session.record.key, len(asked), message)
        with anyio.move_on_after(READ_TIMEOUT):
            for question_id in asked:
                if session.pins or session.stopping:
                    return
                if question_id in session.loop.asked:
                    answer = JSONRPCError(jsonrpc="2.0", id=question_id, error=error)
                    try:
                        await sdk.deliver(session.transport, answer, None)
                    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                        return  # the loop has ended, and its questions with it


def _is_away(session: ResidentSession, now: float) -> bool:
    """Return whether the store has to be asked about a client: it is away from a copy at work."""
    if session.pins or not session.at_work or session.record is None:
        return False
    noticed = session.last_contact + AWAY
    if now < noticed or now < session.elsewhere_until:
        return False
    return session.looked_at < noticed or now >= session.looked_at + LOOK_AGAIN
