"""The sweep of events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from mcp_session_store import telemetry
from mcp_session_store.event_log import EVENT_SWEEP_LIMIT, LEAST_EVENT_SWEEP
from mcp_session_store.retention import SweepPace

if TYPE_CHECKING:
    from mcp_session_store.event_log import EventLog

__all__ = ["sweep_events"]


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
