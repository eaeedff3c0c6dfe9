"""Try the relay at its full size: real clients, whose answers and cancellations go to processes picked at random.

    python -m benchmarks.trial                            # 500 calls of each kind, on SQLite and Postgres
    python -m benchmarks.trial --each 100 --kill-every 0  # no process is killed
    python -m benchmarks.trial --cut 30 --only on-postgres
    python -m benchmarks.trial --before REVISION          # in a git checkout: deploy the present one and take it back

Three uvicorn processes stand behind a load balancer that picks one for each request. The official Python client and
FastMCP's call tools that elicit, sample, ask for roots, get progress, or run until they are cancelled; each answer
carries a token of its own. Every few seconds a process is killed and started again, and Postgres, a throw-away server,
is restarted twice meanwhile. The SDK alone and this package without the relay are tried on the same.

For each kind it prints how many calls `arrived` (the answer came to the call, or the call was cancelled) of those that
were made, and how many were `lost`: the client got 202, and the process that was waiting lived. Others are excused:
their process was killed, or their client got no 202.

With another revision, its processes are replaced one after the other by present ones while calls are made, and then put
back. Answers that a process without the relay accepts for another one, or is to get from another one, are lost, as they
were before; nothing may be `wrong` or `repeated`, and clients go on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from sqlalchemy.engine import make_url

from benchmarks.figures import table
from mcp_session_store.sql.schema import migrate
from tests.support.faults import FaultProxy
from tests.support.postgres import PostgresServer
from tests.support.proxy import RoundRobinProxy
from tests.support.questions import serve_questions
from tests.support.servers import ROOT, ServerProcess, uvicorn_server
from tests.support.trial import KINDS, Faults, Trial, meanwhile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from typing import Self

    from tests.support.servers import ServeFunction
    from tests.support.trial import Tally

SDK: Final = "SDK alone"
CONTENDERS: Final = {
    "sdk": SDK,
    "off-sqlite": "relay off, SQLite",
    "off-postgres": "relay off, Postgres",
    "on-sqlite": "relay on, SQLite",
    "on-postgres": "relay on, Postgres",
}
"""Names by their options."""
OFF: Final = {"MCP_SESSION_STORE_RELAY": "false"}


def serving(stack: ExitStack, folder: Path, source: Path | None = None) -> ServeFunction:
    """Return what `tests.support.questions` takes for the fixture `serve`.

    Args:
        stack: Ends the processes.
        folder: Folder of their logs.
        source: Folder of another revision's package, in place of the present one.
    """
    numbers = itertools.count()

    def serve(app: str, *, environment: Mapping[str, str] | None = None, **more: Any) -> ServerProcess:
        log = folder / f"server-{time.monotonic_ns()}-{next(numbers)}.log"
        # Calls whose answers are lost would hold up the end of a process for ever.
        more["options"] = [*more["options"], "--timeout-graceful-shutdown", "2"]
        if source is None:
            return stack.enter_context(uvicorn_server(app, log=log, environment=environment, **more))
        # A forked process has imported the present package.
        command = [sys.executable, "-m", "uvicorn", app, "--port", "{port}", *more["options"]]
        paths = {"PYTHONPATH": f"{source}:{ROOT}"}
        server = ServerProcess(command, log=log, environment={**(environment or {}), **paths}, port=more["port"])
        return stack.enter_context(server)

    return serve


class Bed:
    """Processes of one contender on a database, and the calls that are made.

    Args:
        name: The contender.
        postgres: Server for a database, where it needs one.
        arguments: Of the command line.
    """

    proxy_type: type[RoundRobinProxy] = RoundRobinProxy

    def __init__(self, name: str, postgres: PostgresServer, arguments: argparse.Namespace) -> None:
        self.name = name
        self.arguments = arguments
        self.dice = random.Random(arguments.seed)
        self.servers: list[ServerProcess] = []
        self.balancer: RoundRobinProxy
        self._postgres = postgres
        self._stack = AsyncExitStack()

    @property
    def relays(self) -> bool:
        return self.name.startswith("relay on")

    @property
    def options(self) -> dict[str, Any]:
        """Options of the processes."""
        return {"events": True} if self.arguments.events else {}

    async def __aenter__(self) -> Self:
        stack, arguments = self._stack, self.arguments
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.url: str | None = None
        if self.name.endswith("Postgres"):
            self.url = stack.enter_context(self._postgres.database())
        elif self.name != SDK:
            self.url = f"sqlite:///{self.folder / 'sessions.db'}"
        if self.url is not None:
            await migrate.upgrade(self.url)
        server_url = self.url
        if arguments.pgbouncer and self.name.endswith("Postgres"):
            sys.path.append(str(ROOT / ".ci"))
            from interop_tests.pgbouncer import PgBouncer

            server_url = stack.enter_context(PgBouncer(str(self.url))).url_of(str(self.url))
        urls = [server_url] * 3
        self.network: FaultProxy | None = None
        if arguments.cut and self.name.endswith("Postgres"):
            given = make_url(str(self.url))
            self.network = await stack.enter_async_context(FaultProxy(str(given.host), int(given.port or 5432)))
            through = given.set(host="127.0.0.1", port=self.network.port)
            urls[2] = through.render_as_string(hide_password=False)
        self._processes = stack.enter_context(ExitStack())
        for url in urls:
            self.servers.append(await self.start(url))
        ports = [server.port for server in self.servers]
        self.balancer = await stack.enter_async_context(self.proxy_type(ports, dice=self.dice))
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def start(self, url: str | None, *, source: Path | None = None, port: int | None = None) -> ServerProcess:
        """Start a process."""
        serve = serving(self._processes, self.folder, source)
        start = partial(
            serve_questions,
            serve,
            self.folder / "notes",
            url,
            environment={} if self.relays else OFF,
            port=port,
            **({} if url is None else self.options),
        )
        # In a thread, because proxies run in this event loop.
        return await anyio.to_thread.run_sync(start)

    def trial(self) -> Trial:
        patience = 40.0 if self.relays else 3.0
        return Trial(self.balancer.mcp_url, self.folder / "notes", self.dice, patience=patience)

    async def run(self, trial: Trial) -> tuple[dict[str, Tally], float]:
        """Make the calls of a trial, and return what became of them, and the seconds that they took."""
        began = time.perf_counter()
        await trial.run(
            dict.fromkeys(KINDS, self.arguments.each),
            clients=self.arguments.clients,
            client_kinds=("official", "official", "fastmcp"),
        )
        seconds = time.perf_counter() - began
        return await trial.tallies(within=30.0 if self.relays else 0.0), seconds

    def faults(self, trial: Trial) -> Iterable[Callable[[], Awaitable[None]]]:
        """Yield faults: kills without an end, and two restarts of the database among the first of them."""
        faults = Faults(trial, self.dice, longest_pause=self.arguments.kill_every)
        kill = partial(faults.kill, self.servers[: 2 if self.network is not None else 3])
        if self.name.endswith("Postgres"):
            for _ in range(self.arguments.restarts):
                if self.arguments.kill_every:
                    yield from [kill] * 4
                yield partial(faults.restart_database, self._postgres, seconds=3.0)
        if self.arguments.kill_every:
            yield from itertools.repeat(kill)

    def cuts(self, trial: Trial) -> Iterable[Callable[[], Awaitable[None]]]:
        """Yield the cut of one process from the database, where it is wanted."""
        if self.network is not None:
            yield partial(Faults(trial, self.dice, longest_pause=2.0).cut, self.network, seconds=self.arguments.cut)


async def try_contender(name: str, postgres: PostgresServer, arguments: argparse.Namespace) -> dict[str, Tally]:
    async with Bed(name, postgres, arguments) as bed:
        trial = bed.trial()
        async with meanwhile(bed.faults(trial)), meanwhile(bed.cuts(trial)):
            tallies, seconds = await bed.run(trial)
        show(f"{name}: {seconds:.0f} s, {len(trial.killed)} processes killed", tallies, trial, bed.servers)
        return tallies


async def deploy(revision: str, postgres: PostgresServer, arguments: argparse.Namespace) -> None:
    """Replace processes of another revision by present ones under load, and put them back."""
    for name in ("relay on, SQLite", "relay on, Postgres"):
        async with Bed(name, postgres, arguments) as bed:
            source = bed.folder / "before"
            source.mkdir()
            archive = subprocess.run(
                ["git", "archive", revision, "src", "migrations"], cwd=ROOT, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
            old = source / "src"

            async def replace(source: Path | None) -> None:
                for number, before in enumerate(list(bed.servers)):
                    await anyio.to_thread.run_sync(before.terminate)
                    bed.servers[number] = await bed.start(bed.url, source=source, port=before.port)

            await replace(old)
            for title, target in (("deployed", None), ("taken back", old)):
                trial = bed.trial()
                async with anyio.create_task_group() as group:
                    group.start_soon(replace, target)
                    tallies, seconds = await bed.run(trial)
                show(f"{name}, {title} while calls were made: {seconds:.0f} s", tallies, trial, bed.servers)


def show(title: str, tallies: Mapping[str, Tally], trial: Trial, servers: Sequence[ServerProcess]) -> None:
    print(f"\n{title}")
    for kind, tally in sorted(tallies.items()):
        print(f"  {kind:<9} {tally}")
    for failure, count in trial.failures.most_common(5):
        print(f"  raised {count} times by a client: {failure}")
    logs = [log for server in servers if "Traceback" in (log := server.log())]
    if logs:
        print(f"  a traceback in the logs of {len(logs)} processes; the first:")
        print(logs[0][logs[0].index("Traceback") :][:3000])
    sys.stdout.flush()


def summary(results: Mapping[str, Mapping[str, Tally]]) -> str:
    """Return what arrived, and in brackets what was lost of that which was accepted, as a table."""
    rows = [
        [
            kind,
            *(
                f"{tallies[kind].arrived} of {tallies[kind].asked} ({tallies[kind].lost})"
                for tallies in results.values()
            ),
        ]
        for kind in KINDS
    ]
    return table(["arrived (lost)", *results], rows)


async def run(arguments: argparse.Namespace) -> None:
    with PostgresServer(fsync=True) as postgres:
        if arguments.before is not None:
            await deploy(arguments.before, postgres, arguments)
            return
        names = [CONTENDERS[arguments.only]] if arguments.only else CONTENDERS.values()
        results = {name: await try_contender(name, postgres, arguments) for name in names}
    print(f"\n{summary(results)}")
    faulty = [tally for tallies in results.values() for tally in tallies.values() if tally.wrong or tally.repeated]
    lost = [
        tally
        for name, tallies in results.items()
        if name.startswith("relay on")
        for tally in tallies.values()
        if tally.lost
    ]
    if faulty or lost:
        raise SystemExit("something was lost, went astray or came twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONTENDERS, help="try one instead of all")
    parser.add_argument("--each", type=int, default=500, help="calls of each kind")
    parser.add_argument("--clients", type=int, default=30, help="clients at once")
    parser.add_argument(
        "--kill-every", type=float, default=5.0, help="seconds from one kill to the next at most; 0: none"
    )
    parser.add_argument("--restarts", type=int, default=2, help="of Postgres")
    parser.add_argument("--cut", type=float, default=0.0, help="seconds for which one process is cut from Postgres")
    parser.add_argument("--pgbouncer", action="store_true", help="put PgBouncer, in transaction mode, in between")
    parser.add_argument("--events", action="store_true", help="store events")
    parser.add_argument("--before", metavar="REVISION", help="try a rolling deploy from this revision, both ways")
    parser.add_argument("--seed", type=int, default=16)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
