"""Metrics and spans, through OpenTelemetry's API: they hold no payload and no session id, whatever a convention says.

Without a provider, which the application installs, the instruments are the API's own, which do nothing.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter as Tally
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Observation
from opentelemetry.trace import INVALID_SPAN, Link, StatusCode, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mcp_session_store.installed import installed_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from uuid import UUID

    from opentelemetry.metrics import CallbackOptions, Counter, Histogram
    from opentelemetry.trace import Span

__all__ = [
    "ERROR",
    "INSTRUMENTS",
    "KEY",
    "NAMESPACE",
    "REPLAYED",
    "SCOPE",
    "STATES",
    "VERSION",
    "Instrument",
    "Observed",
    "appended",
    "background_failures",
    "begin_span",
    "created",
    "delivered_messages",
    "deliveries",
    "dropped_messages",
    "ended",
    "events",
    "evicted",
    "fail_span",
    "handshakes",
    "observing",
    "of",
    "of_operation",
    "outages",
    "purged",
    "refused",
    "removed_events",
    "restored",
    "restores",
    "resumed",
    "resumptions",
    "sent_messages",
    "session_duration",
    "statement_bytes",
    "statement_items",
    "statement_waits",
    "statements",
    "unreadable",
    "within",
    "without_trace",
]

SCOPE: Final = "mcp_session_store"
"""Name of the instrumentation scope of all instruments and spans; its version is the package's."""
NAMESPACE: Final = "mcp_session_store.namespace"
"""Attribute for the namespace. Not `namespace`, which Prometheus sets itself for what it finds in Kubernetes."""
KEY: Final = "mcp_session_store.session.key"
"""Attribute of spans for the key of the session."""
REPLAYED: Final = "mcp_session_store.replayed"
"""Attribute of the spans around replayed messages, whose children are the spans that the SDK makes of them."""

ERROR: Final = "error.type"
"""Attribute for the name of the error that something failed with."""

STATES: Final = ("starting", "ready", "degraded", "not_ready", "stopping")
"""States of an instance."""

_TIMES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
"""Bounds of buckets for what takes a statement or a few: from a lone one to the longest wait in an outage."""
_ITEMS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""Up to the most items that share a statement."""
_BYTES: Final = (256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0)
_LIVES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Those of the semantic conventions for MCP; and some more, because these sessions outlive a process."""
_LONG_LIVES: Final = (*_LIVES, 1800.0, 7200.0, 28800.0, 86400.0, 604800.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is known of an instrument when it is made, for the documentation."""

    name: str
    kind: str
    unit: str
    description: str
    attributes: tuple[str, ...]
    """Names of its attributes."""


INSTRUMENTS: Final[list[Instrument]] = []
"""All instruments, in the order of the documentation."""


VERSION: Final = installed_version("mcp-session-store") or ""
"""Version of this package; empty where it is run from a folder, without an installation."""

_meter = metrics.get_meter(SCOPE, VERSION)
_tracer = trace.get_tracer(SCOPE, VERSION or None)
_NOTHING: Final = contextlib.nullcontext(INVALID_SPAN)
_traces: Final = TraceContextTextMapPropagator()
_OF_A_TRACE: Final = frozenset({"traceparent", "tracestate", "baggage"})
"""Names under which clients send the context of their trace, in `_meta` (SEP-414)."""


def _describe(name: str, kind: str, unit: str, description: str, attributes: tuple[str, ...]) -> str:
    INSTRUMENTS.append(Instrument(name, kind, unit, description, attributes))
    return name


def _counter(name: str, unit: str, description: str, *attributes: str) -> Counter:
    name = _describe(name, "counter", unit, description, (*attributes, NAMESPACE))
    return _meter.create_counter(name, unit, description)


def _histogram(name: str, unit: str, bounds: tuple[float, ...], description: str, *attributes: str) -> Histogram:
    name = _describe(name, "histogram", unit, description, (*attributes, NAMESPACE))
    return _meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)


class Observed(Protocol):
    """A running manager, as the gauges show it."""

    @property
    def namespace(self) -> str:
        """Namespace of its sessions."""

    @property
    def resident(self) -> int:
        """Number of sessions in memory that requests find."""

    @property
    def busy(self) -> int:
        """Number of those that are busy."""

    @property
    def restoring(self) -> int:
        """Number of restores under way."""

    @property
    def streams(self) -> int:
        """Number of open GET streams."""

    @property
    def waiting(self) -> int:
        """Number of requests that wait for the store."""

    @property
    def state(self) -> str:
        """One of `STATES`."""


_observed: tuple[tuple[int, weakref.ref[Observed]], ...] = ()
"""Managers that run, by process. Replaced and never changed, because readers of metrics run in threads of their own."""


@contextlib.contextmanager
def observing(observed: Observed) -> Iterator[None]:
    """Show a manager in the gauges, until the block ends or the manager is no more."""
    global _observed
    entry = os.getpid(), weakref.ref(observed)
    del observed
    _observed = (*_observed, entry)
    try:
        yield
    finally:
        _observed = tuple(other for other in _observed if other is not entry and other[1]() is not None)


def _shown() -> list[Observed]:
    """Return the managers that run in this process; those of its parent do not run in a child that was forked."""
    return [shown for pid, reference in _observed if pid == os.getpid() and (shown := reference()) is not None]


def _gauge(name: str, unit: str, description: str, read: Callable[[Observed], Mapping[str, int]], *by: str) -> None:
    """Make a gauge of the numbers that `read` returns, by the values of an attribute; without one of a lone number."""

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        totals: Tally[tuple[str, str]] = Tally()
        for observed in _shown():
            for value, number in read(observed).items():
                totals[observed.namespace, value] += number
        return [
            Observation(total, {**dict.fromkeys(by, value), NAMESPACE: of}) for (of, value), total in totals.items()
        ]

    name = _describe(name, "up-down counter", unit, description, (*by, NAMESPACE))
    _meter.create_observable_up_down_counter(name, [observe], unit, description)


# Sessions

_gauge("mcp_session_store.sessions.resident", "{session}", "Sessions in memory", lambda one: {"": one.resident})
_gauge(
    "mcp_session_store.sessions.busy",
    "{session}",
    "Sessions in memory with an open request or stream, or a call that runs",
    lambda one: {"": one.busy},
)
_gauge("mcp_session_store.sessions.restoring", "{session}", "Restores under way", lambda one: {"": one.restoring})
created: Final = _counter("mcp_session_store.sessions.created", "{session}", "Sessions opened and stored")
restored: Final = _counter("mcp_session_store.sessions.restored", "{session}", "Sessions restored by replay")
evicted: Final = _counter(
    "mcp_session_store.sessions.evicted", "{session}", "Copies that left memory, by reason", "reason"
)
ended: Final = _counter("mcp_session_store.sessions.ended", "{session}", "Sessions ended, by reason", "reason")
purged: Final = _counter("mcp_session_store.sessions.purged", "{session}", "Ended sessions removed for good")
session_duration: Final = _histogram(
    "mcp.server.session.duration",
    "s",
    _LONG_LIVES,
    "Time from the opening of a session to its end, on whichever instances it lived",
    "mcp.protocol.version",
    "network.protocol.name",
    "network.transport",
)
restores: Final = _histogram(
    "mcp_session_store.restore.duration",
    "s",
    _TIMES,
    "Time that requests wait for a restore, from the load of the record on, by outcome",
    "outcome",
)
handshakes: Final = _histogram(
    "mcp_session_store.handshake.duration",
    "s",
    _TIMES,
    "Time from the receipt of `initialize` until it is handled and stored, by outcome",
    "outcome",
)
unreadable: Final = _counter(
    "mcp_session_store.records.unreadable", "{request}", "Requests for sessions whose record cannot be read"
)

# Requests

_gauge(
    "mcp_session_store.requests.waiting",
    "{request}",
    "Requests that wait because the store is away",
    lambda one: {"": one.waiting},
)
refused: Final = _counter("mcp_session_store.requests.refused", "{request}", "Requests refused, by reason", "reason")

# Messages of clients to copies of their sessions, on whichever instances these are

sent_messages: Final = _counter(
    "mcp_session_store.messages.sent", "{message}", "Messages of clients posted to other instances, by kind", "kind"
)
delivered_messages: Final = _counter(
    "mcp_session_store.messages.delivered",
    "{message}",
    "Messages of clients that came from other instances and were read by a copy of their session, by kind",
    "kind",
)
deliveries: Final = _histogram(
    "mcp_session_store.message.delivery.duration",
    "s",
    _TIMES,
    "Time from the post of a message to another instance until a copy of its session has read it, by kind",
    "kind",
)
dropped_messages: Final = _counter(
    "mcp_session_store.messages.dropped",
    "{message}",
    "Messages that reached no copy of their session, or no stream of their client, by kind and reason",
    "kind",
    "reason",
)

# The store

_gauge(
    "mcp_session_store.instance.state",
    "{instance}",
    "1 for the state that the instance is in, and 0 for each other",
    lambda one: {state: state == one.state for state in STATES},
    "state",
)
outages: Final = _counter("mcp_session_store.store.outages", "{outage}", "Times that the store went away")
statements: Final = _histogram(
    "mcp_session_store.statement.duration",
    "s",
    _TIMES,
    "Time of a statement, the wait for a connection included, by operation",
    "operation",
    ERROR,
)
statement_waits: Final = _histogram(
    "mcp_session_store.statement.wait",
    "s",
    _TIMES,
    "Time that the first of the calls which share a statement has waited for it",
    "operation",
)
statement_items: Final = _histogram(
    "mcp_session_store.statement.items", "{call}", _ITEMS, "Calls that share a statement", "operation"
)
statement_bytes: Final = _histogram(
    "mcp_session_store.statement.size", "By", _BYTES, "Data of clients in a statement that stores some", "operation"
)
background_failures: Final = _counter(
    "mcp_session_store.background.failures", "{failure}", "Failures outside of any request, by task", "task"
)

# Streams and their events

_gauge("mcp_session_store.streams.open", "{stream}", "Open GET streams", lambda one: {"": one.streams})
resumed: Final = _counter(
    "mcp_session_store.streams.resumed", "{stream}", "Streams resumed, by how it ended", "outcome"
)
resumptions: Final = _histogram(
    "mcp_session_store.resumption.duration",
    "s",
    _TIMES,
    "Time until a client that resumes a stream is answered, a turn at reading included",
)
events: Final = _counter("mcp_session_store.events", "{event}", "Events of streams, by what became of them", "outcome")
appended: Final = _histogram("mcp_session_store.event.append.duration", "s", _TIMES, "Time to store an event")
removed_events: Final = _counter("mcp_session_store.events.removed", "{event}", "Events that were swept")


def of(namespace: str, **attributes: str) -> dict[str, str]:
    """Return the attributes of a measurement."""
    attributes[NAMESPACE] = namespace
    return attributes


def of_operation(namespace: str, operation: str) -> dict[str, str]:
    """Return the attributes of the statements that do one kind of thing."""
    return of(namespace, operation=operation)


def begin_span(
    name: str,
    namespace: str,
    *,
    key: UUID | None = None,
    links: Sequence[Link] = (),
    attributes: Mapping[str, str | int | bool] | None = None,
) -> Span:
    """Begin a span, a child of the current one, which does not become the current one itself.

    Args:
        name: Name of the span, without the scope's.
        namespace: Namespace of the sessions.
        key: Key of the session.
        links: Links to other spans.
        attributes: Other attributes.
    """
    span = _tracer.start_span(f"{SCOPE}.{name}", attributes={NAMESPACE: namespace}, links=links)
    if span.is_recording():
        if key is not None:
            span.set_attribute(KEY, str(key))
        if attributes is not None:
            span.set_attributes(attributes)
    return span


def within(span: Span, *, ends: bool = True) -> AbstractContextManager[Span]:
    """Return a context manager in which a span is the current one.

    Args:
        span: The span.
        ends: Whether it ends with the context.
    """
    if span is INVALID_SPAN:
        # There is no provider. To make it the current one would cost a handshake a hundredth.
        return _NOTHING
    # Not with the error that the block raises: its message may hold what a client sent.
    return use_span(span, end_on_exit=ends, record_exception=False, set_status_on_exception=False)


def fail_span(span: Span, error: BaseException) -> None:
    """Note on a span that what it stands for has failed; of the error only its name."""
    span.set_attribute(ERROR, type(error).__qualname__)
    span.set_status(StatusCode.ERROR)


def without_trace(params: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Link]]:
    """Return params without the trace that their client began long ago, and a link to it.

    Otherwise the SDK makes the span of a replayed message a child of that trace, as if the message were sent again.
    """
    meta = params["_meta"]
    if not isinstance(meta, dict) or not isinstance(meta.get("traceparent"), str):
        return params, ()
    texts = {name: text for name, text in meta.items() if name in _OF_A_TRACE and isinstance(text, str)}
    origin = get_current_span(_traces.extract(texts, Context())).get_span_context()
    untraced = {name: value for name, value in meta.items() if name not in _OF_A_TRACE}
    return {**params, "_meta": untraced}, [Link(origin)] if origin.is_valid else ()
