"""What OpenTelemetry's SDK has recorded, read back from memory."""

from __future__ import annotations

import collections
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler, SamplingResult
from typing_extensions import override

from tests.support.asgi import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Measured", "Point", "Traced", "measuring", "tracing"]


class Point(NamedTuple):
    """One number, of one set of attributes."""

    value: float
    """Value of a counter; number of measurements of a histogram."""
    attributes: dict[str, Any]
    total: float
    """Sum of the measurements."""
    bounds: Sequence[float]


class Measured:
    """Metrics of this package, since they were read before."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.seen: set[str] = set()
        """Names of all instruments that ever had a value."""
        self.scopes: set[tuple[str, str | None]] = set()
        """Names and versions of their scopes."""

    def read(self) -> dict[str, list[Point]]:
        """Return what was recorded since the last time, by the name of the instrument."""
        found: dict[str, list[Point]] = {}
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                if scope.scope.name != "mcp_session_store":
                    continue
                self.scopes.add((scope.scope.name, scope.scope.version))
                for metric in scope.metrics:
                    points = [_point(point) for point in metric.data.data_points]
                    found.setdefault(metric.name, []).extend(point for point in points if point is not None)
        self.seen |= {name for name, points in found.items() if any(point.value for point in points)}
        return found

    def values(self, name: str) -> dict[tuple[tuple[str, Any], ...], float]:
        """Return the values of an instrument since the last time, by attributes without the namespace."""
        return {
            tuple(
                (key, value) for key, value in sorted(point.attributes.items()) if "namespace" not in key
            ): point.value
            for point in self.read().get(name, ())
        }

    async def reach(self, name: str, expected: Mapping[Any, float]) -> None:
        """Wait until the values of a counter since the last time are as expected, however many reads that takes."""
        found: collections.Counter[tuple[tuple[str, Any], ...]] = collections.Counter()

        def has_come() -> bool:
            found.update({attributes: int(value) for attributes, value in self.values(name).items()})
            return found == expected

        await until(has_come)


def _point(point: Any) -> Point | None:
    attributes = dict(point.attributes or {})
    if hasattr(point, "count"):
        return Point(point.count, attributes, point.sum, point.explicit_bounds) if point.count else None
    return Point(point.value, attributes, point.value, ())


class Traced:
    """Spans that have ended."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter

    def take(self) -> list[Any]:
        """Return the spans since the last time, in the order of their ends."""
        spans = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return spans


_measured: list[Measured] = []
_traced: list[Traced] = []
_is_on: list[bool] = []


def measuring() -> Measured:
    """Return the metrics of this process. The provider can be set once, and stays for all later tests."""
    if not _measured:
        delta = AggregationTemporality.DELTA
        reader = InMemoryMetricReader(preferred_temporality={Counter: delta, Histogram: delta})
        metrics.set_meter_provider(MeterProvider([reader], shutdown_on_exit=False))
        _measured.append(Measured(reader))
    _measured[0].read()
    _measured[0].seen.clear()
    return _measured[0]


@contextlib.contextmanager
def tracing() -> Iterator[Traced]:
    """Record the spans of this process. The provider stays, too, but later tests have no span that records."""
    if not _traced:

        class Switch(Sampler):
            """A sampler that can be turned off."""

            @override
            def should_sample(self, *arguments: Any, **named: Any) -> SamplingResult:
                return (ALWAYS_ON if _is_on else ALWAYS_OFF).should_sample(*arguments, **named)

            @override
            def get_description(self) -> str:
                return "switch"

        exporter = InMemorySpanExporter()
        switch: Any = Switch()
        provider = TracerProvider(sampler=switch, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        _traced.append(Traced(exporter))
    _traced[0].take()
    _is_on.append(True)
    try:
        yield _traced[0]
    finally:
        _is_on.clear()
