"""What the benchmarks make of their measurements."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_T = TypeVar("_T")


def in_random_order(values: Sequence[_T], rounds: int) -> Iterator[_T]:
    """Yield all values in each round, in random order."""
    for _ in range(rounds):
        yield from random.sample(values, len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Return the ratio of each round, so that a machine that is slower for a while is slower for both."""
    return [one / other for one, other in zip(of, to, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median with the lowest and the highest value, as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
