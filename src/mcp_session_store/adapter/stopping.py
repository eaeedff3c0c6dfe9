"""The stop of a manager: what is still to be written is written, within bounds, and open responses end whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.session_log import STOPPING

if TYPE_CHECKING:
    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.relay.relay import Relay
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.streams.recorder import EventRecorder
    from mcp_session_store.store import Store

__all__ = ["close", "retire", "shut_down"]

SHUTDOWN_TIMEOUT: Final = 5.0
"""Seconds for all that is still to be written when the manager stops."""
LAST_TRY: Final = 1.0
"""Seconds of them for the row of an instance that has just not been able to write it."""
ANSWERS_TIMEOUT: Final = 6.0
"""Seconds that a stop waits for answers on their way to the event log: by default longer than a log tries to store."""


async def shut_down(
    registry: Registry, activity: ActivityReporter, instances: Instances | None, relay: Relay | None
) -> None:
    """Evict all copies, and store what is known of them, before the tasks of the manager are cancelled."""
    registry.log.stopping(registry.resident)
    with anyio.move_on_after(ANSWERS_TIMEOUT + SHUTDOWN_TIMEOUT, shield=True):
        activity.gather(everything=True)
        # Concurrently, so that a slow store leaves no stream open, and no client leaves activity unreported.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_report_all, activity, registry.log.namespace)
            if instances is not None:
                tasks.start_soon(_leave, instances)
            if relay is not None:
                tasks.start_soon(_post_all, relay)
            # Closed streams let open responses end whole, instead of being cut when the tasks are cancelled.
            for session in registry:
                tasks.start_soon(_evict, registry, session)


async def retire(instances: Instances, recorder: EventRecorder | None, namespace: str) -> None:
    """Store the last events, and that the instance is no longer there."""
    with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True) as scope:
        if recorder is not None:
            await recorder.retire()
        if not instances.is_reachable:
            # A store that does not answer holds up the stop once, and not twice. The others miss the heartbeats.
            scope.deadline = min(scope.deadline, anyio.current_time() + LAST_TRY)
        try:
            await instances.retire()
        except Exception as error:
            report_failure("heartbeat", error, namespace=namespace)


async def close(closed: Store) -> None:
    """Close a store, an event log or a mailbox."""
    with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True):
        await closed.aclose()


async def _evict(registry: Registry, session: ResidentSession) -> None:
    if session.events is not None:
        # Wait also for an answer of a call that is over which waits behind others.
        with anyio.move_on_after(ANSWERS_TIMEOUT):
            await session.events.recorded()
    with anyio.move_on_after(SHUTDOWN_TIMEOUT):
        await registry.evict(session, STOPPING)
        if session.events is not None:
            # Or the tasks are cancelled before clients elsewhere can learn that their calls are lost.
            await session.events.abandoned.wait()


async def _leave(instances: Instances) -> None:
    with anyio.move_on_after(SHUTDOWN_TIMEOUT):
        await instances.leave()


async def _post_all(relay: Relay) -> None:
    with anyio.move_on_after(SHUTDOWN_TIMEOUT):
        await relay.outbox.close()
    relay.outbox.abandon()


async def _report_all(activity: ActivityReporter, namespace: str) -> None:
    try:
        with anyio.move_on_after(SHUTDOWN_TIMEOUT):
            await activity.report(everything=True)
    except Exception as error:
        report_failure("activity", error, namespace=namespace)
