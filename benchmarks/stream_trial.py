"""Try the clients' own streams at their full size: processes speak outside of calls while the streams break and move.

    python -m benchmarks.stream_trial                        # 500 messages of each kind, four times
    python -m benchmarks.stream_trial --only on-postgres     # events on
    python -m benchmarks.stream_trial --kill-every 0         # no process is killed
    python -m benchmarks.stream_trial --restarts 2           # Postgres, a throw-away server, is restarted, too

Three uvicorn processes stand behind a load balancer that picks one for each request. The official Python client and
FastMCP's have them say on their streams that lists have changed and resources were updated, log, and ask for roots
outside of a call; each message carries a token of its own. Half of the clients lose their streams again and again, and
come back for them; of half of these connections the process learns only later, as behind a proxy that holds them open.
Every few seconds a process is killed and started again.

For each kind it prints how many messages `arrived` of those that were said. With events, nothing may be missing but
what was said by a process that was killed within a second (`died`). Without, messages are missing, too, that were given
to a connection that had broken at that moment (`broken`). Nothing may be `lost`, `repeated` or `wrong`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from typing import Any, Final

from benchmarks.figures import table
from benchmarks.trial import Bed
from tests.support.postgres import PostgresServer
from tests.support.stream_proxy import StreamProxy
from tests.support.stream_trial import STREAM_KINDS, StreamTally, StreamTrial
from tests.support.trial import meanwhile

CONTENDERS: Final = {
    "off-sqlite": "events off, SQLite",
    "off-postgres": "events off, Postgres",
    "on-sqlite": "events on, SQLite",
    "on-postgres": "events on, Postgres",
}
"""Names by their options."""


class StreamBed(Bed):
    """Processes on a database, and what they say on streams."""

    proxy_type = StreamProxy

    @property
    def relays(self) -> bool:
        return True

    @property
    def options(self) -> dict[str, Any]:
        return {"events": True, "retry_interval": 200} if self.name.startswith("events on") else {}

    def stream_trial(self) -> StreamTrial:
        assert isinstance(self.balancer, StreamProxy)
        return StreamTrial(
            self.balancer,
            self.folder / "notes",
            self.dice,
            has_events=bool(self.options),
            pause=self.arguments.pause,
        )


async def try_contender(name: str, postgres: PostgresServer, arguments: argparse.Namespace) -> dict[str, StreamTally]:
    async with StreamBed(name, postgres, arguments) as bed:
        trial = bed.stream_trial()
        began = time.perf_counter()
        async with meanwhile(bed.faults(trial)):
            counts = dict.fromkeys(STREAM_KINDS, arguments.each)
            await trial.run(counts, clients=arguments.clients, client_kinds=("official", "official", "fastmcp"))
        tallies = await trial.tallies()
        seconds = time.perf_counter() - began
        print(f"\n{name}: {seconds:.0f} s, {len(trial.killed)} processes killed, {trial.cuts} streams cut, of", end=" ")
        kept = trial.kept_open()
        print(
            f"{len(trial.proxy.openings)}; {len(kept)} kept open, {trial.given_up} clients failed or gave up their ",
            end="",
        )
        print(f"streams ({trial.deaf}), {trial.disordered()} messages out of order")
        for kind, tally in sorted(tallies.items()):
            print(f"  {kind:<9} {tally}")
        for failure, count in trial.failures.most_common(5):
            print(f"  raised {count} times by a client: {failure}")
        for verdict in ("lost", "repeated", "wrong", *arguments.explain):
            for story in trial.verdicts(verdict)[:5]:
                print(f"  {verdict}: {story}")
        for line in kept[:5]:
            print(f"  kept open: {line}")
        for server in bed.servers:
            if "Traceback" in (log := server.log()):
                print(f"  a traceback in a log: {log[log.index('Traceback') :][:3000]}")
        sys.stdout.flush()
        return tallies


async def run(arguments: argparse.Namespace) -> None:
    with PostgresServer(fsync=True) as postgres:
        names = [CONTENDERS[arguments.only]] if arguments.only else CONTENDERS.values()
        results = {name: await try_contender(name, postgres, arguments) for name in names}
    rows = [
        [
            kind,
            *(
                f"{tally.arrived} of {tally.asked} ({tally.lost})"
                for tallies in results.values()
                if (tally := tallies[kind])
            ),
        ]
        for kind in STREAM_KINDS
    ]
    print(f"\n{table(['arrived (lost)', *results], rows)}")
    tallies = [tally for of_kind in results.values() for tally in of_kind.values()]
    if any(tally.lost or tally.wrong or tally.repeated for tally in tallies):
        raise SystemExit("something was lost, went astray or came twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONTENDERS, help="try one instead of all")
    parser.add_argument("--each", type=int, default=500, help="messages of each kind")
    parser.add_argument("--clients", type=int, default=30, help="clients at once")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds at most between two messages of a client")
    parser.add_argument(
        "--kill-every", type=float, default=5.0, help="seconds from one kill to the next at most; 0: none"
    )
    parser.add_argument("--restarts", type=int, default=0, help="of Postgres")
    parser.add_argument("--pgbouncer", action="store_true", help="put PgBouncer, in transaction mode, in between")
    parser.add_argument("--explain", nargs="*", default=(), help="verdicts of which some stories are told, too")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    arguments.cut = 0
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
