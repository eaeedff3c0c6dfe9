"""Measure what events cost a call at least: the SDK with a store that only inserts them, beside this package.

    python -m benchmarks.floor                               # SQLite in a temporary file
    python -m benchmarks.floor postgresql://user@host/db     # and Postgres, on a database that may be filled

That store inserts messages by the driver alone, those that wait in one commit, into a table from which no stream could
be resumed. All else is as in `python -m benchmarks`: the throughput of tool calls with SSE as a multiple of that of the
stock SDK, which has no events, and in brackets what the same CPU time does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import aiosqlite
import asyncpg
import sqlalchemy as sa
from mcp.server.streamable_http import EventStore

from benchmarks.contenders import EVENTS, TOOL_CALL, Contender, make_server, ours, stock
from benchmarks.drivers import Batches, insert_on_postgres, insert_on_sqlite
from benchmarks.figures import in_random_order, table
from benchmarks.serving import SQLITE, STOCK, Databases, Row, Timings, compared, cpu_compared, time_operation
from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from mcp_types import JSONRPCMessage
    from starlette.applications import Starlette

    from benchmarks.contenders import Mode

    Insert: TypeAlias = Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[int]]]

TABLE: Final = "benchmark_floor"
CREATE_ON_POSTGRES: Final = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} (id bigserial PRIMARY KEY, stream text, message text, "
    "created_at timestamptz DEFAULT now())"
)
CREATE_ON_SQLITE: Final = "CREATE TABLE event (id INTEGER PRIMARY KEY, stream TEXT, message TEXT, created_at REAL)"


class InsertingStore(EventStore):
    """Event store that inserts messages, and gives priming events an id without storing anything."""

    def __init__(self) -> None:
        self.batches: Batches | None = None
        self._primed = 0

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        if message is None:
            self._primed += 1
            return f"p{self._primed}"
        assert self.batches is not None
        return str(await self.batches.store(stream_id, message.model_dump_json(by_alias=True, exclude_unset=True)))

    async def replay_events_after(self, last_event_id: str, send_callback: object) -> None:
        raise NotImplementedError


def inserting(name: str, connected: Callable[[], AbstractAsyncContextManager[Insert]]) -> Contender:
    """Return the SDK with a store that only inserts."""

    def make_app(_: Mode) -> Starlette:
        store = InsertingStore()
        app = make_server().streamable_http_app(event_store=store)
        lifespan = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def connected_lifespan(of: Starlette) -> AsyncIterator[Any]:
            async with connected() as insert, lifespan(of) as state:
                store.batches = Batches(insert)
                yield state

        app.router.lifespan_context = connected_lifespan
        return app

    return Contender(name, make_app, restores=False)


@contextlib.asynccontextmanager
async def on_postgres(url: str) -> AsyncIterator[Insert]:
    dsn = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(CREATE_ON_POSTGRES)
        yield insert_on_postgres(connection, TABLE)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def on_sqlite(folder: Path) -> AsyncIterator[Insert]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        async with aiosqlite.connect(Path(own) / "floor.db", isolation_level=None) as connection:
            for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", CREATE_ON_SQLITE):
                await connection.execute(statement)
            yield insert_on_sqlite(connection)


async def run(postgres: str | None, rounds: int, scale: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        databases = Databases(Path(folder), postgres)
        contenders = [stock(STOCK)]
        for name, url in databases.urls.items():
            await migrate.upgrade(url)
            connected = (
                (lambda: on_sqlite(databases.folder)) if name == SQLITE else (lambda: on_postgres(str(postgres)))
            )
            contenders += [ours(name, url), inserting(f"{name}, only inserted", connected)]
        row = Row(TOOL_CALL, EVENTS, 400, 0.85, 0.85)
        timings: Timings = {contender.name: [] for contender in contenders}
        for contender in contenders:
            await time_operation(contender, row, 0.0)
        gc.collect()
        gc.freeze()
        for contender in in_random_order(contenders, rounds):
            timings[contender.name].append(await time_operation(contender, row, scale))
        names = [contender.name for contender in contenders[1:]]
        cells = [
            f"{statistics.median(compared(row, timings, name, STOCK)):.2f} ({cpu_compared(timings, name, STOCK):.2f})"
            for name in names
        ]
        print(table(["", *names], [[row.title, *cells]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="?", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of calls in a round")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments.postgres, arguments.rounds, arguments.scale))


if __name__ == "__main__":
    main()
