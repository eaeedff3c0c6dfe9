"""Counters of the adapter, through OpenTelemetry's API: they hold no payload and no session id."""

from __future__ import annotations

from opentelemetry import metrics

__all__ = [
    "background_failures",
    "created",
    "ended",
    "events",
    "evicted",
    "outages",
    "purged",
    "refused",
    "removed_events",
    "restored",
    "resumed",
    "waiting",
    "unreadable",
]

_meter = metrics.get_meter("mcp_session_store")

created = _meter.create_counter("mcp_session_store.sessions.created", description="Sessions opened and stored")
restored = _meter.create_counter("mcp_session_store.sessions.restored", description="Sessions restored by replay")
ended = _meter.create_counter("mcp_session_store.sessions.ended", description="Sessions ended, by reason")
evicted = _meter.create_counter("mcp_session_store.sessions.evicted", description="Copies that left memory")
purged = _meter.create_counter("mcp_session_store.sessions.purged", description="Ended sessions removed for good")
refused = _meter.create_counter("mcp_session_store.requests.refused", description="Requests refused, by reason")
unreadable = _meter.create_counter(
    "mcp_session_store.records.unreadable", description="Requests for sessions whose record cannot be read"
)
waiting = _meter.create_up_down_counter(
    "mcp_session_store.requests.waiting", description="Requests that wait because the store is away"
)
outages = _meter.create_counter("mcp_session_store.store.outages", description="Times that the store went away")
events = _meter.create_counter("mcp_session_store.events", description="Events of streams, by what became of them")
removed_events = _meter.create_counter("mcp_session_store.events.removed", description="Events that were swept")
resumed = _meter.create_counter("mcp_session_store.streams.resumed", description="Streams resumed, by how it ended")
background_failures = _meter.create_counter(
    "mcp_session_store.background.failures", description="Failures outside of any request, by task"
)
