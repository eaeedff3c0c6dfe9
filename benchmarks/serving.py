"""Time what clients ask of a server: the stock SDK, this package and mcp-persist side by side, in one run."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from benchmarks.contenders import (
    CLIENTS,
    EVENTS,
    HANDSHAKE,
    JSON,
    RESTART,
    RESTORE,
    SSE,
    TOOL_CALL,
    Contender,
    Mode,
    Operation,
    has_peer,
    ours,
    peer,
    stock,
)
from benchmarks.figures import in_random_order, percentile, ratios, table
from benchmarks.sweeping import fill
from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

STOCK: Final = "stock SDK"
PEER: Final = "mcp-persist"
SQLITE: Final = "SQLite"
POSTGRES: Final = "Postgres"
LOADED: Final = "loaded"
"""Schema of the tables that are filled, and the end of the names of contenders that have them."""


@dataclass(frozen=True)
class Row:
    """Row of the table, with the goals of its ratios."""

    operation: Operation
    mode: Mode
    count: int
    """Number of operations that are timed together."""
    sqlite: float
    postgres: float
    beats_peer: bool = False
    """Whether this package is to be ahead of mcp-persist, too."""
    lone: bool = False
    """Whether one client is alone. Then latencies are compared, of which lower is better, and else throughputs."""

    @property
    def title(self) -> str:
        return f"{self.operation.name}, one at a time, p50" if self.lone else f"{self.operation.name}, {self.mode.name}"

    def goal(self, database: str) -> float:
        return self.sqlite if database == SQLITE else self.postgres


ROWS: Final = (
    Row(TOOL_CALL, JSON, 800, 0.97, 0.97),
    Row(TOOL_CALL, EVENTS, 800, 0.85, 0.85),
    Row(HANDSHAKE, JSON, 400, 0.90, 0.85),
    Row(HANDSHAKE, EVENTS, 400, 0.88, 0.88),
    Row(RESTART, JSON, 400, 1.3, 1.3, beats_peer=True),
    Row(RESTART, SSE, 400, 1.6, 1.4, beats_peer=True),
    Row(RESTART, EVENTS, 400, 1.3, 1.1, beats_peer=True),
    Row(RESTORE, JSON, 200, 1.0, 1.0, lone=True),
)


@dataclass(frozen=True)
class Timing:
    """What one round of one contender took."""

    rate: float
    """Operations per second."""
    cpu: float
    """CPU time of this process for each of them, in seconds, all threads included."""
    p50: float
    """Milliseconds, like `p99`."""
    p99: float


Timings: TypeAlias = dict[str, list[Timing]]
"""The rounds of each contender, by its name."""


@dataclass(frozen=True)
class Databases:
    """Databases that may be migrated and filled."""

    folder: Path
    """Folder of files for SQLite."""
    postgres: str | None = None

    @property
    def urls(self) -> dict[str, str]:
        urls = {SQLITE: self.sqlite("ours")}
        if self.postgres is not None:
            urls[POSTGRES] = self.postgres
        return urls

    def sqlite(self, name: str) -> str:
        return f"sqlite:///{self.folder / f'{name}.db'}"


async def time_operation(contender: Contender, row: Row, scale: float) -> Timing:
    clients = 1 if row.lone else CLIENTS
    count = max(clients, int(row.count * scale))
    took: list[float] = []
    numbers = iter(range(count))
    async with row.operation.prepared(contender, row.mode, count) as perform:

        async def client() -> None:
            for number in numbers:
                began = time.perf_counter()
                await perform(number)
                took.append(time.perf_counter() - began)

        gc.collect()
        began, cpu_began = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return Timing(count / seconds, cpu / count, 1000 * percentile(took, 50), 1000 * percentile(took, 99))


async def time_rows(rows: Sequence[Row], contenders: Sequence[Contender], rounds: int, scale: float) -> list[Timings]:
    """Time each row in rounds, in each of which every contender has its turn, in random order."""
    for contender in contenders:
        # Modules that are imported late are part of what a server has loaded when it has started.
        await time_operation(replace(contender, residents=0), ROWS[0], 0.0)
    gc.collect()
    gc.freeze()
    results = []
    for row in rows:
        print(f"  {row.title}", file=sys.stderr, flush=True)
        timings: Timings = {contender.name: [] for contender in contenders}
        for contender in in_random_order(contenders, rounds):
            timings[contender.name].append(await time_operation(contender, row, scale))
        results.append(timings)
    gc.unfreeze()
    return results


def compared(row: Row, timings: Timings, name: str, to: str) -> list[float]:
    """Return the ratios of latencies, if the row is of a client alone, or of throughputs."""
    if row.lone:
        return ratios([timing.p50 for timing in timings[name]], [timing.p50 for timing in timings[to]])
    return ratios([timing.rate for timing in timings[name]], [timing.rate for timing in timings[to]])


def cpu_compared(timings: Timings, name: str, to: str) -> float:
    """Return how many times as much can be done with the CPU time, as a median."""
    return statistics.median(ratios([timing.cpu for timing in timings[to]], [timing.cpu for timing in timings[name]]))


def shown_goal(row: Row, timings: Timings, databases: Sequence[str]) -> str:
    """Return the goal of a row as text, with the databases on which it is missed."""
    ahead: Callable[[float, float], bool] = (lambda a, b: a <= b) if row.lone else (lambda a, b: a >= b)
    missed = []
    for database in databases:
        reached = ahead(statistics.median(compared(row, timings, database, STOCK)), row.goal(database))
        of_peer = peer_on(database)
        if row.beats_peer and of_peer in timings:
            reached = reached and statistics.median(compared(row, timings, database, of_peer)) > 1
        if not reached:
            missed.append(database)
    goals = dict.fromkeys(f"{row.goal(database):g}" for database in databases)
    text = f"{'at most ' if row.lone else ''}{' / '.join(goals)}{', and ahead of the peer' if row.beats_peer else ''}"
    return f"{text}: **missed** on {' and '.join(missed)}" if missed else text


def shown_latencies(timings: Sequence[Timing]) -> str:
    p50 = statistics.median(timing.p50 for timing in timings)
    p99 = statistics.median(timing.p99 for timing in timings)
    return f"{p50:.2f} / {p99:.2f}"


def peer_on(database: str) -> str:
    return f"{PEER}, {database}"


async def compare(databases: Databases, rows: Sequence[Row], rounds: int, scale: float) -> None:
    """Print the ratios to the stock SDK, and the latencies."""
    contenders = [stock(STOCK)]
    for name, url in databases.urls.items():
        await migrate.upgrade(url)
        contenders.append(ours(name, url))
        if has_peer():
            contenders.append(peer(peer_on(name), url if name == POSTGRES else databases.sqlite("peer")))
    results = await time_rows(rows, contenders, rounds, scale)
    names = [contender.name for contender in contenders]
    ratio_rows, latency_rows = [], []
    for row, timings in zip(rows, results, strict=True):
        cells = [
            f"{statistics.median(compared(row, timings, name, STOCK)):.2f} ({cpu_compared(timings, name, STOCK):.2f})"
            for name in names[1:]
        ]
        ratio_rows.append([row.title, *cells, shown_goal(row, timings, list(databases.urls))])
        latency_rows.append([row.title, *(shown_latencies(timings[name]) for name in names)])
    print("\nThroughput as a multiple of the stock SDK's (in brackets: operations for the same CPU time):\n")
    print(table(["", *names[1:], "goal"], ratio_rows))
    print("\nLatency, p50 / p99 in ms:\n")
    print(table(["", *names], latency_rows), flush=True)


async def compare_loaded(
    databases: Databases, rows: Sequence[Row], rounds: int, scale: float, *, stored: int, residents: int
) -> None:
    """Print what becomes of the ratios with many sessions stored and in memory."""
    loaded = {name: f"{name}, {LOADED}" for name in (STOCK, *databases.urls)}
    contenders = [stock(STOCK), replace(stock(loaded[STOCK]), residents=residents)]
    for name, url in databases.urls.items():
        schema = LOADED if name == POSTGRES else None
        url_loaded = url if name == POSTGRES else databases.sqlite(LOADED)
        await migrate.upgrade(url)
        await migrate.upgrade(url_loaded, schema=schema)
        began = time.perf_counter()
        await fill(url_loaded, stored, 0, schema=schema)
        print(f"  {name}: {stored} sessions in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        contenders += [ours(name, url), replace(ours(loaded[name], url_loaded, schema=schema), residents=residents)]
    results = await time_rows(rows, contenders, rounds, scale)
    shown = []
    for row, timings in zip(rows, results, strict=True):
        cells: list[str] = []
        missed = []
        for name in databases.urls:
            plain = compared(row, timings, name, STOCK)
            with_load = compared(row, timings, loaded[name], loaded[STOCK])
            kept = statistics.median(ratios(plain, with_load) if row.lone else ratios(with_load, plain))
            cpu_kept = cpu_compared(timings, loaded[name], loaded[STOCK]) / cpu_compared(timings, name, STOCK)
            cells += [f"{statistics.median(plain):.2f}", f"{statistics.median(with_load):.2f}"]
            cells.append(f"{kept:.2f} ({cpu_kept:.2f})")
            if kept < 0.9:
                missed.append(name)
        shown.append([row.title, *cells, f"**missed** on {' and '.join(missed)}" if missed else ""])
    head = [text for name in databases.urls for text in (name, f"{name}, {LOADED}", "share that is left")]
    print(
        f"\nThe same with {stored} sessions stored and {residents} in memory, of which the stock SDK has as many "
        "(goal: 0.9 is left; in brackets, of what the same CPU time does):\n"
    )
    print(table(["", *head, ""], shown), flush=True)
