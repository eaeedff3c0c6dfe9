"""Count the function calls of each operation, with a profiler: unlike times, they do not depend on the machine.

    python -m benchmarks.calls                            # store in memory, and SQLite in a temporary file
    python -m benchmarks.calls postgresql://user@host/db  # and Postgres, on a database that may be migrated
    python -m benchmarks.calls --store sqlite --only restart --mode JSON --functions 40

The operations are those of `python -m benchmarks`, one at a time unless `--clients` says otherwise. Calls of Python
functions and of built-in ones count alike, each time that a coroutine goes on included, as in cProfile. Those of this
benchmark's own client do not count. The fewest of all rounds are printed, because work in the background, such as a
report of activity, falls into some rounds:

* all: in the thread of the event loop;
* ours: calls of this package's functions, and of built-in functions by them;
* SDK, database: the same of mcp, and of SQLAlchemy and the drivers;
* rest: of all others: asyncio, anyio, Starlette, pydantic;
* threads: beside those, in other threads, such as a connection's to SQLite.

The ratio is that of `all` to the stock SDK's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import mcp
import mcp_types

import mcp_session_store
from benchmarks.contenders import CLIENTS, MODES, OPERATIONS, Contender, Mode, Operation, has_peer, ours, peer, stock
from benchmarks.endpoint import garbage_kept
from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType, FrameType

STORES: Final = ("memory", "sqlite", "postgres")

_OWNERS: Final = ("ours", "SDK", "database", "rest")


def _folder_of(module: Any) -> str:
    return f"{Path(module.__file__).parent}/"


_BENCHMARKS: Final = f"{Path(__file__).parent}/"
_FOLDERS: Final = {
    _folder_of(mcp_session_store): "ours",
    _folder_of(mcp): "SDK",
    _folder_of(mcp_types): "SDK",
    "/sqlalchemy/": "database",
    "/asyncpg/": "database",
    "/aiosqlite/": "database",
    "/sqlite3/": "database",
}


class Profiler:
    """Counts of calls by the function that is called or, for a built-in function, that calls it.

    It serves a whole run, because anyio's worker threads live on from one server to the next.
    """

    def __init__(self) -> None:
        self.loop: Counter[CodeType] = Counter()
        self.threads: Counter[CodeType] = Counter()
        self._counting = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Profile the threads that are started meanwhile, and this one."""
        threading.setprofile(self._in_thread)
        sys.setprofile(self._in_loop)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def taken(self) -> tuple[Counter[CodeType], Counter[CodeType]]:
        """Return the counts since the last time."""
        counts = self.loop, self.threads
        self.loop, self.threads = Counter(), Counter()
        return counts

    def _in_loop(self, frame: FrameType, event: str, _: object) -> None:
        if self._counting and event in ("call", "c_call"):
            self.loop[frame.f_code] += 1

    def _in_thread(self, frame: FrameType, event: str, _: object) -> None:
        if self._counting and event in ("call", "c_call"):
            self.threads[frame.f_code] += 1


def owner_of(code: CodeType) -> str | None:
    """Return the owner of a function; `None` for this benchmark's client."""
    if code.co_filename.startswith(_BENCHMARKS):
        return None
    return next((owner for folder, owner in _FOLDERS.items() if folder in code.co_filename), "rest")


@dataclass(frozen=True)
class Calls:
    """Function calls of one operation."""

    by_owner: dict[str, float]
    threads: float

    @property
    def all(self) -> float:
        return sum(self.by_owner.values())


async def count_calls(
    profiler: Profiler, contender: Contender, operation: Operation, mode: Mode, *, rounds: int, clients: int = 1
) -> tuple[Calls, dict[str, float]]:
    """Perform an operation in rounds of `clients` at once, and return its function calls.

    Returns:
        The fewest calls of all rounds by owner, and the mean of all rounds by function, those in threads included.
    """
    found: list[Calls] = []
    functions: Counter[str] = Counter()
    async with operation.prepared(contender, mode, (1 + rounds) * clients) as perform:
        with garbage_kept():
            for number in range(1 + rounds):
                numbers = range(number * clients, (number + 1) * clients)
                with profiler.counting():
                    await (asyncio.gather(*map(perform, numbers)) if clients > 1 else perform(number))
                in_loop, in_threads = profiler.taken()
                if not number:
                    # What an operation leaves to do counts in the next, of which this is the first.
                    continue
                counts: Counter[str | None] = Counter()
                for code, calls in in_loop.items():
                    counts[owner_of(code)] += calls
                    functions[_shown(code, "")] += calls
                for code, calls in in_threads.items():
                    functions[_shown(code, "  (thread)")] += calls
                found.append(Calls({owner: counts[owner] / clients for owner in _OWNERS}, in_threads.total() / clients))
    performed = rounds * clients
    fewest = Calls(
        {owner: min(calls.by_owner[owner] for calls in found) for owner in _OWNERS},
        min(calls.threads for calls in found),
    )
    return fewest, {name: calls / performed for name, calls in functions.most_common()}


def _shown(code: CodeType, suffix: str) -> str:
    place = code.co_filename
    for root in ("site-packages/", "/src/", f"/python{sys.version_info.major}.{sys.version_info.minor}/"):
        place = place.rpartition(root)[2]
    return f"{place}:{code.co_firstlineno} {code.co_qualname}{suffix}"


async def compare(profiler: Profiler, contenders: Sequence[Contender], arguments: argparse.Namespace) -> None:
    columns = ("all", *_OWNERS, "threads", "ratio")
    for operation in arguments.operations:
        for mode in arguments.modes:
            print(f"{operation.name}, {mode.name:<16} {''.join(f'{column:>10}' for column in columns)}")
            of_stock = 0.0
            for contender in contenders:
                calls, by_function = await count_calls(
                    profiler, contender, operation, mode, rounds=arguments.rounds, clients=arguments.clients
                )
                of_stock = of_stock or calls.all
                values = (calls.all, *calls.by_owner.values(), calls.threads)
                numbers = "".join(f"{value:10.0f}" for value in values)
                print(f"  {contender.name:<30}{numbers}{calls.all / of_stock:10.2f}", flush=True)
                for name, of_function in itertools.islice(by_function.items(), arguments.functions):
                    print(f"    {of_function:8.1f}  {name}")


async def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        urls = {"sqlite": f"sqlite:///{folder}/ours.db", "postgres": arguments.postgres}
        contenders = [stock("stock SDK")]
        for store in arguments.stores:
            if store == "memory":
                contenders.append(ours("ours, memory", None))
            elif (url := urls[store]) is not None:
                await migrate.upgrade(url)
                contenders.append(ours(f"ours, {store}", url))
                if has_peer() and not arguments.without_peer:
                    contenders.append(peer(f"mcp-persist, {store}", url.replace("ours.db", "peer.db")))
        profiler = Profiler()
        with profiler.installed():
            await compare(profiler, contenders, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="?", help="URL of a Postgres database that may be migrated")
    parser.add_argument("--store", choices=STORES, help="use one store instead of all")
    parser.add_argument("--only", choices=OPERATIONS, help="count one operation instead of all")
    parser.add_argument("--mode", choices=[mode.name for mode in MODES], help="use one mode instead of all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=1, help=f"operations at once; rates are measured with {CLIENTS}")
    parser.add_argument("--functions", type=int, default=0, help="print so many functions with the most calls")
    parser.add_argument("--without-peer", action="store_true", help="leave mcp-persist out")
    arguments = parser.parse_args()
    arguments.stores = [arguments.store] if arguments.store else STORES
    arguments.operations = [OPERATIONS[arguments.only]] if arguments.only else list(OPERATIONS.values())
    arguments.modes = [mode for mode in MODES if arguments.mode in (None, mode.name)]
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
