"""Measure the relay between instances with uvicorn processes, and print the table of its goals.

    python -m benchmarks.relay                                            # a few minutes; Postgres is a throw-away one
    python -m benchmarks.relay --only messages --seconds 600 --old-transaction
    python -m benchmarks.relay --only answers --scale 0.1

* `answers`: time from a client's answer, posted to another process than the one that asked, to the result of the call,
  HTTP included; beside it that of an answer to the process that asked;
* `rates`: elicitations a second that 16 clients answer elsewhere, as a share of those that they answer where asked;
* `messages`: see `benchmarks.messages`;
* `serving`: `tools/call` and handshakes with the relay, as a share of those without, and the same in function calls of
  the event loop's thread, which do not depend on the machine. One row is of sessions whose clients have a stream open;
* `notifications`: time from what a copy says outside of a call to the client's stream, which another process has;
* `opening`: streams opened at once, of sessions that a restart left, with the relay as a share of those without;
* `idle`: queries a second of a process with nothing to do, and its share of a core while a call of its own waits for an
  answer; two minutes in all.

Where nothing can be heard is SQLite, and Postgres by a URL with `pgbouncer=true`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import psutil
from sqlalchemy.engine import make_url

from benchmarks import messages, streams
from benchmarks.calls import Profiler, count_calls
from benchmarks.contenders import EVENTS, HANDSHAKE, JSON, STREAMED_CALL, TOOL_CALL, Contender, ours
from benchmarks.figures import percentile, ratios, table
from benchmarks.serving import Row, compared, time_rows
from benchmarks.trial import serving
from mcp_session_store.sql.listening import HEARTBEAT
from mcp_session_store.sql.schema import migrate
from tests.support.http import INITIALIZE_PARAMS, RawClient
from tests.support.postgres import PostgresServer
from tests.support.questions import serve_questions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from tests.support.http import Message
    from tests.support.servers import ServerProcess

POSTGRES: Final = "Postgres"
UNHEARD: Final = "Postgres, nothing heard"
SQLITE: Final = "SQLite"
PLACES: Final = (POSTGRES, UNHEARD, SQLITE)

CLIENTS: Final = 16

_PARAMS: Final = {**INITIALIZE_PARAMS, "capabilities": {"elicitation": {}}}


@dataclass
class Bench:
    """What all measurements share."""

    postgres: PostgresServer
    arguments: argparse.Namespace
    rows: list[list[str]] = field(default_factory=list)
    """Rows of the table: measurement, goal, result."""

    def count(self, number: int) -> int:
        return max(1, int(number * self.arguments.scale))

    def add(self, what: str, goal: str, result: str, *, reached: bool) -> None:
        self.rows.append([what, goal, result if reached else f"{result}: **missed**"])
        print(f"  {what}: {result}", file=sys.stderr, flush=True)

    @asynccontextmanager
    async def database(self, place: str, folder: Path) -> AsyncIterator[str]:
        """A migrated database at a place."""
        with ExitStack() as stack:
            if place == SQLITE:
                url = f"sqlite:///{folder / 'sessions.db'}"
                await migrate.upgrade(url)
            else:
                url = stack.enter_context(self.postgres.database())
                await migrate.upgrade(url)
                if place == UNHEARD:
                    pooled = make_url(url).update_query_dict({"pgbouncer": "true"})
                    url = pooled.render_as_string(hide_password=False)
            yield url

    @asynccontextmanager
    async def processes(self, place: str, number: int) -> AsyncIterator[tuple[list[ServerProcess], str]]:
        """So many processes on one database, and its URL."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            async with self.database(place, folder) as url:
                with ExitStack() as running:
                    serve = serving(running, folder)
                    notes = folder / "notes"
                    yield [serve_questions(serve, notes, url) for _ in range(number)], url


class Asked:
    """A client that answers questions of its calls.

    Args:
        client: In a session.
    """

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._numbers = itertools.count()

    async def answer(self, asking: ServerProcess, answering: ServerProcess, *, pause: float = 0.0) -> float:
        """Make a call, answer its question after a pause, and return the seconds from the answer to the result."""
        client = self._client
        said = f"elicit-{next(self._numbers)}"
        client.url = asking.mcp_url
        call = client.message("tools/call", {"name": "elicit", "arguments": {"token": said}})
        async with client.stream("POST", call) as stream:
            question = await stream.next()
            await asyncio.sleep(pause)
            client.url = answering.mcp_url
            began = time.perf_counter()
            answer = await client.respond(question["id"], {"action": "accept", "content": {"said": said}})
            if answer.status != 202:
                raise RuntimeError(f"the answer was answered {answer.status}")
            result = await stream.next()
            took = time.perf_counter() - began
        if _text(result) != said:
            raise RuntimeError(f"the call was answered {result}")
        return took


@asynccontextmanager
async def asked(server: ServerProcess) -> AsyncIterator[Asked]:
    """A client in a new session."""
    async with RawClient(server.mcp_url) as client:
        await client.handshake(_PARAMS)
        yield Asked(client)


def _text(message: Message) -> Any:
    return message.get("result", {}).get("content", [{}])[0].get("text")


async def measure_answers(bench: Bench) -> None:
    for place in PLACES:
        async with bench.processes(place, 2) as ((asking, other), _):
            took: dict[str, list[float]] = {"elsewhere": [], "where asked": []}
            # Polls are to be met at any moment of their interval.
            at_once, longest_pause = (1, 0.0) if place == POSTGRES else (4, 0.3)

            async def answer(
                count: int, longest_pause: float = longest_pause, took: dict[str, list[float]] = took
            ) -> None:
                async with asked(asking) as client:
                    for _ in range(count):
                        pause = random.uniform(0.0, longest_pause)
                        took["elsewhere"].append(await client.answer(asking, other, pause=pause))
                        took["where asked"].append(await client.answer(asking, asking))

            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(answer(bench.count(400) // at_once))
        elsewhere = [1000 * one for one in took["elsewhere"]]
        here = statistics.median(1000 * one for one in took["where asked"])
        p50, p99, longest = statistics.median(elsewhere), percentile(elsewhere, 99), max(elsewhere)
        if place == POSTGRES:
            goal, reached = "median 10 ms, 99 % 50 ms", p50 <= 10 and p99 <= 50
        else:
            goal, reached = "median 100 ms, none above 500 ms", p50 <= 100 and longest <= 500
        result = f"median {p50:.1f} ms, 99 % {p99:.1f} ms, longest {longest:.0f} ms (where asked: {here:.1f} ms)"
        bench.add(f"answer elsewhere to result, {place}", goal, result, reached=reached)


async def measure_rates(bench: Bench) -> None:
    for place, wanted in ((POSTGRES, 0.8), (SQLITE, 0.5)):
        async with bench.processes(place, 2) as (servers, _):
            rates: dict[bool, list[float]] = {True: [], False: []}

            async def elicit(
                elsewhere: bool, number: int, count: int, servers: Sequence[ServerProcess] = servers
            ) -> None:
                # The processes are loaded alike, wherever the answers go.
                asking, other = servers if number % 2 else reversed(servers)
                async with asked(asking) as client:
                    for _ in range(count):
                        await client.answer(asking, other if elsewhere else asking)

            for turn in range(bench.arguments.rounds):
                for elsewhere in (True, False) if turn % 2 else (False, True):
                    count = bench.count(25)
                    began = time.perf_counter()
                    async with asyncio.TaskGroup() as group:
                        for number in range(CLIENTS):
                            group.create_task(elicit(elsewhere, number, count))
                    rates[elsewhere].append(CLIENTS * count / (time.perf_counter() - began))
        share = statistics.median(one / other for one, other in zip(rates[True], rates[False], strict=True))
        result = (
            f"{share:.2f} ({statistics.median(rates[True]):.0f} and {statistics.median(rates[False]):.0f} a second)"
        )
        bench.add(
            f"elicitations a second, elsewhere to where asked, {place}", f"{wanted}", result, reached=share >= wanted
        )


async def measure_messages(bench: Bench) -> None:
    arguments = bench.arguments
    async with bench.database(POSTGRES, Path()) as url:
        found = await messages.measure(
            url,
            database=psutil.Process(bench.postgres.pid),
            seconds=arguments.seconds * min(1.0, arguments.scale),
            old_transaction=arguments.old_transaction,
        )
    title = f"{messages.RATE} messages a second across {messages.INSTANCES} instances, {arguments.seconds:.0f} s"
    if arguments.old_transaction:
        goal, reached = "median 20 ms", found.p50 <= 20
        title += ", another transaction left open"
    else:
        goal, reached = "99 % 50 ms, database under 30 % of a core", found.p99 <= 50 and found.database_cpu < 0.3
    bench.add(title, goal, str(found), reached=reached)


async def measure_serving(bench: Bench) -> None:
    for place in (SQLITE, POSTGRES):
        with tempfile.TemporaryDirectory() as folder:
            async with bench.database(place, Path(folder)) as url:
                contenders = [ours("on", url), ours("off", url, relay=False)]
                for operation, mode in (
                    (TOOL_CALL, JSON),
                    (TOOL_CALL, EVENTS),
                    (STREAMED_CALL, JSON),
                    (HANDSHAKE, JSON),
                ):
                    row = Row(operation, mode, 800, 0.99, 0.99)
                    timings = (await time_rows([row], contenders, bench.arguments.rounds, bench.arguments.scale))[0]
                    share = statistics.median(compared(row, timings, "on", "off"))
                    on, off = [await _calls_of(contender, row) for contender in contenders]
                    result = f"{share:.2f} ({on:.0f} function calls to {off:.0f}: {off / on:.3f})"
                    bench.add(
                        f"{row.title}, relay on to off, {place}", "0.99", result, reached=max(share, off / on) >= 0.99
                    )


async def measure_notifications(bench: Bench) -> None:
    for place in PLACES:
        for events in (False, True):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                async with bench.database(place, folder) as url:
                    with ExitStack() as running:
                        serve = serving(running, folder)
                        speaking, holding = [streams.serve_talking(serve, url, events=events) for _ in range(2)]
                        count = bench.count(200)
                        took = await streams.measure_notifications(speaking, holding, count, pause=0.2)
            took = [1000 * one for one in took]
            wanted = (20 if events else 10) if place == POSTGRES else 100
            p50, p99 = statistics.median(took), percentile(took, 99)
            bench.add(
                f"notification elsewhere to the client's stream, {place}, events {'on' if events else 'off'}",
                f"median {wanted} ms",
                f"median {p50:.1f} ms, 99 % {p99:.1f} ms",
                reached=p50 <= wanted,
            )


async def measure_opening(bench: Bench) -> None:
    count = bench.count(streams.AT_ONCE)
    for place in (SQLITE, POSTGRES):
        with tempfile.TemporaryDirectory() as folder:
            async with bench.database(place, Path(folder)) as url:
                contenders = {"on": ours("on", url), "off": ours("off", url, relay=False)}
                took: dict[str, list[float]] = {"on": [], "off": []}
                for turn in range(min(bench.arguments.rounds, 3)):
                    for name in ("on", "off") if turn % 2 else ("off", "on"):
                        took[name].append(await streams.measure_opening(contenders[name], count))
        share = statistics.median(ratios(took["off"], took["on"]))
        result = f"{share:.2f} ({', '.join(f'{name} {statistics.median(took[name]):.2f} s' for name in took)})"
        bench.add(f"{count} streams opened at once, relay on to off, {place}", "0.9", result, reached=share >= 0.9)


async def _calls_of(contender: Contender, row: Row) -> float:
    profiler = Profiler()
    with profiler.installed():
        calls, _ = await count_calls(profiler, contender, row.operation, row.mode, rounds=20)
    return calls.all


async def measure_idle(bench: Bench) -> None:
    # Its transactions would be counted with those of the process.
    connection = await _connected(bench.postgres.url())
    await connection.execute("ALTER SYSTEM SET autovacuum = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()
    # All at once, because each of them does next to nothing, for a minute.
    found = await asyncio.gather(*(_idle(bench, place, waits=waits) for place in PLACES for waits in (False, True)))
    for (queries, cpu), (place, waits) in zip(found, itertools.product(PLACES, (False, True)), strict=True):
        said = "" if queries is None else f"{queries:.2f} queries a second, "
        result = f"{said}{100 * cpu:.1f} % of a core"
        if waits:
            bench.add(f"while a call waits for an answer, {place}", "3 % of a core", result, reached=cpu < 0.03)
        else:
            reached = queries is None or queries <= 1
            bench.add(f"with nothing to do, {place}", "1 query a second", result, reached=reached)


async def _idle(bench: Bench, place: str, *, waits: bool) -> tuple[float | None, float]:
    """Return the transactions a second of a process, which only Postgres counts, and its share of a core."""
    seconds = bench.arguments.idle_seconds
    async with bench.processes(place, 1) as ((server,), url), asked(server) as client:
        # What the handshake leaves to do; and what the connection that listens did at first, which Postgres
        # counts with its next statement, a sign of life.
        await asyncio.sleep(HEARTBEAT + 3)
        call = asyncio.create_task(client.answer(server, server, pause=seconds + 2)) if waits else None
        await asyncio.sleep(1)
        process = psutil.Process(server.pid)
        before, cpu_before = await _transactions(url), sum(process.cpu_times()[:2])
        await asyncio.sleep(seconds)
        cpu = (sum(process.cpu_times()[:2]) - cpu_before) / seconds
        after = await _transactions(url)
        if call is not None:
            await call
    return None if before is None or after is None else (after - before) / seconds, cpu


async def _connected(url: str) -> asyncpg.Connection:
    given = make_url(url).set(drivername="postgresql", query={})
    return await asyncpg.connect(given.render_as_string(hide_password=False))


async def _transactions(url: str) -> int | None:
    """Return the number of transactions so far in a Postgres database; `None` for SQLite."""
    given = make_url(url)
    if given.get_backend_name() == "sqlite":
        return None
    # Statistics are reported with a delay.
    await asyncio.sleep(1.5)
    # In another database, because those that count are counted.
    connection = await _connected(given.set(database="postgres").render_as_string(hide_password=False))
    try:
        found = await connection.fetchval(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1", given.database
        )
    finally:
        await connection.close()
    return int(found)


MEASUREMENTS: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "answers": measure_answers,
    "rates": measure_rates,
    "messages": measure_messages,
    "serving": measure_serving,
    "notifications": measure_notifications,
    "opening": measure_opening,
    "idle": measure_idle,
}


async def run(arguments: argparse.Namespace) -> None:
    with PostgresServer(fsync=True) as postgres:
        bench = Bench(postgres, arguments)
        for name, measure in MEASUREMENTS.items():
            if arguments.only in (None, name):
                await measure(bench)
    print(table(["", "goal", "measured"], bench.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASUREMENTS, help="measure one instead of all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of operations")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which messages are sent")
    parser.add_argument("--old-transaction", action="store_true", help="leave another transaction open meanwhile")
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
