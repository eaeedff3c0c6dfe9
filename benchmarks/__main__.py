"""Measure sessions and events beside the stock SDK and mcp-persist, and print the tables of docs/measurements.md.

    pip install 'mcp-persist[postgres,sqlite]>=2.2,<3'
    python -m benchmarks                                     # SQLite in a temporary file
    python -m benchmarks postgresql://user@host/db           # and Postgres, on a database that may be filled
    python -m benchmarks --stored 1000000 --resident 1000    # under load, beside the same without

All servers run in this process, and are called at the ASGI boundary: there is no HTTP server and no client library in
between, with which the differences are smaller. Every answer is checked. 16 clients send requests, each of which waits
for an answer before the next; in one row, a single client. Each round gives each server its turn, in random order, on a
new app that has answered some requests already. A ratio is taken round by round, so that a machine that is slower for a
while is slower for all, and its median is printed. Before the first round the objects of the start-up are frozen
(`gc.freeze()`), as `mcp-session-store serve` does; garbage is collected before each timing, and as usual meanwhile.

* `tools/call`: calls of a small tool on sessions that are in memory;
* handshake: `initialize` and `notifications/initialized`;
* first call after a restart: the first call of every session to a server that holds none of them in memory. The session
  is restored. Clients of the stock SDK initialize anew and call; the 404 that makes them do so is not counted;
* restore, one at a time: the first `ping` of a session after a restart, beside a handshake of the stock SDK's;
* storing and replay: see `benchmarks.events`, which also measures other configurations. Here each store is as it comes,
  except that this package's log keeps all events;
* sweeping: see `benchmarks.sweeping`, here with fewer sessions. Neither of the other servers has sessions to sweep.

Events are on for this package and for mcp-persist alone. mcp-persist has durable sessions and is otherwise as it comes;
without events and for JSON its session manager is set accordingly.

Under load, this package has so many sessions in its tables, and each server so many idle ones in memory. mcp-persist
takes no part.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
from pathlib import Path

from benchmarks import serving, sweeping
from benchmarks.contenders import OPERATIONS, has_peer

EVENTS = ("storing", "replay")
SWEEPING = "sweeping"
SWEPT = 200_000
"""Sessions in the table that is swept; half of them have expired."""


async def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        databases = serving.Databases(Path(folder), arguments.postgres)
        rows = [row for row in serving.ROWS if arguments.only in (None, row.operation.option)]
        if arguments.stored or arguments.resident:
            load = {"stored": arguments.stored, "residents": arguments.resident}
            await serving.compare_loaded(databases, rows, arguments.rounds, arguments.scale, **load)
            return
        if rows:
            await serving.compare(databases, rows, arguments.rounds, arguments.scale)
        operations = [name for name in EVENTS if arguments.only in (None, name)]
        if operations and has_peer():
            # It cannot be imported without mcp-persist.
            from benchmarks.events import compare_as_they_come

            with tempfile.TemporaryDirectory() as other:
                await compare_as_they_come(
                    Path(other), arguments.postgres, arguments.rounds, arguments.scale, operations
                )
        if arguments.only in (None, SWEEPING):
            print("\nRequests beside a sweep:\n")
            expired = max(1, int(SWEPT / 2 * arguments.scale))
            given = f"--rows {2 * expired} --expired {expired} --rounds {min(arguments.rounds, 3)}"
            given = f"{given} --seconds {5 * min(1.0, arguments.scale)}"
            await sweeping.run(sweeping.parser().parse_args([*filter(None, [arguments.postgres]), *given.split()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="?", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--only", choices=[*OPERATIONS, *EVENTS, SWEEPING], help="time one operation instead of all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of operations in a round")
    parser.add_argument("--stored", type=int, default=0, help="sessions in the tables")
    parser.add_argument("--resident", type=int, default=0, help="idle sessions in memory")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
