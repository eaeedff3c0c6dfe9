"""The sweeps of what sessions leave in stores: their events and their state."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio

from mcp_session_store import telemetry
from mcp_session_store.event_log import EVENT_SWEEP_LIMIT, LEAST_EVENT_SWEEP
from mcp_session_store.retention import SweepPace
from mcp_session_store.state_store import LEAST_STATE_SWEEP, STATE_SWEEP_LIMIT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.sessions.ending import Ender
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.state_store import StateStore

__all__ = ["sweeps"]


def sweeps(
    ender: Ender, instances: Instances | None, event_log: EventLog | None, state_store: StateStore | None
) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """Return the sweeps of a manager by name, each for a task of its own."""
    yield "sweep", ender.sweep
    if instances is not None:
        yield "mailbox sweep", instances.sweep
    if event_log is not None:
        # In a task of its own: where many events are stored there may always be more that are too old.
        yield "event sweep", partial(sweep_events, event_log)
    if state_store is not None:
        yield "state sweep", partial(sweep_state, state_store)


async def sweep_events(log: EventLog) -> None:
    """Remove the events that the log's policy wants removed, step by step."""
    pace = SweepPace(EVENT_SWEEP_LIMIT, least=LEAST_EVENT_SWEEP)
    with telemetry.within(telemetry.begin_span("event_sweep", log.namespace)) as span:
        try:
            while True:
                began = anyio.current_time()
                report = await log.sweep(limit=pace.limit)
                if report.removed:
                    telemetry.removed_events.add(report.removed, telemetry.of(log.namespace))
                if not report.more:
                    return
                await anyio.sleep(pace.pause_after(report, anyio.current_time() - began))
        except Exception as error:
            telemetry.fail_span(span, error)
            raise


async def sweep_state(store: StateStore) -> None:
    """Remove the values that nothing reads any more, step by step."""
    pace = SweepPace(STATE_SWEEP_LIMIT, least=LEAST_STATE_SWEEP)
    with telemetry.within(telemetry.begin_span("state_sweep", store.namespace)) as span:
        try:
            while True:
                began = anyio.current_time()
                report = await store.sweep(limit=pace.limit)
                if not report.more:
                    return
                await anyio.sleep(pace.pause_after(report, anyio.current_time() - began))
        except Exception as error:
            telemetry.fail_span(span, error)
            raise
