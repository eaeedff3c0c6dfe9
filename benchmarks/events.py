"""What durable events cost: this package beside the drivers alone and beside mcp-persist, in one run.

    pip install 'mcp-persist[postgres,sqlite]>=2.2,<3'
    python -m benchmarks.events                            # SQLite in a temporary file
    python -m benchmarks.events postgresql://user@host/db  # and Postgres, on a database that may be filled

Of several Postgres databases each is measured, such as one of a server with `fsync` and one of a server without.
Two things are timed, with messages of 200 bytes and of 4 KiB:

* storing: JSON-RPC notifications, for one session and for 100 sessions at once, each of which waits for an event
  to be stored before it stores the next;
* replay: 10 000 events of one stream, from the database to messages that the SDK can send.

All begin with the same message of the SDK, make a text of it and end with a row that is committed; and the other way
round. This package and mcp-persist are called as the SDK's transport calls an event store, this package's log also
without what lies between the two. mcp-persist is as it is when nothing is configured; the drivers alone insert into a
table that has what a replay needs, and nothing else. What is written behind is acknowledged before it is committed, so
that a crash loses it: it stands there for comparison. mcp-persist and the driver alone have equally many connections
to Postgres, this package takes one for storing. On SQLite this package does not wait for the disk with each commit
(`synchronous=NORMAL`), and mcp-persist does (`FULL`): each is measured both ways. Nobody removes old events meanwhile.

Every round times all of them in turn, in random order; a ratio is taken round by round, so that a machine that is
slower for a while is slower for all. Printed are medians of the rounds, with the lowest and the highest. Garbage is
collected between what is timed, for all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiosqlite
import asyncpg
import sqlalchemy as sa
from mcp.server.streamable_http import GET_STREAM_KEY, EventMessage
from mcp_types import JSONRPCNotification, jsonrpc_message_adapter

from benchmarks.sweeping import percentile
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.adapter.streams.followers import Following
from mcp_session_store.adapter.streams.recorder import EventRecorder
from mcp_session_store.records import EventKind, NewEvent
from mcp_session_store.retention import EventPolicy
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session

try:
    from mcp_persist import BatchingEventStore, PostgresEventStore, SQLiteEventStore
except ImportError:
    sys.exit("mcp-persist is missing; run: pip install 'mcp-persist[postgres,sqlite]>=2.2,<3'")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    from mcp.server.streamable_http import EventCallback, EventStore
    from mcp_types import JSONRPCMessage

SIZES: Final = {"200 bytes": 200, "4 KiB": 4096}
"""Bytes of a message, as JSON text."""
SESSIONS: Final = 100
REPLAYED: Final = 10_000
"""Events that a replay reads."""
CONNECTIONS: Final = 10
"""To Postgres, of mcp-persist, whose pool has as many unless told otherwise, and of asyncpg alone."""
WARM_UP: Final = 4
"""Events of each session that are stored before those that are timed."""
WRITTEN_BEHIND: Final = 64
"""Events that mcp-persist gathers before it commits them: the default of its `BatchingEventStore`."""

KEEP_ALL: Final = EventPolicy(max_events_per_session=1_000_000, max_bytes_per_session=1024**3)

PEER: Final = "mcp-persist"
OURS: Final = "mcp-session-store"


class Stream(ABC):
    """A stream of a session of its own, where its events are kept."""

    @abstractmethod
    async def store(self, message: JSONRPCMessage) -> int | str:
        """Store an event; its id."""

    @abstractmethod
    async def replay(self, after: Any, send: EventCallback) -> None:
        """Send all events that follow the one with this id."""


class StoreStream(Stream):
    """One in an event store as the SDK's transport uses it, and gives it messages."""

    def __init__(self, store: EventStore, name: str) -> None:
        self._store = store
        self._name = name

    async def store(self, message: JSONRPCMessage) -> str:
        event_id = await self._store.store_event(self._name, message)
        assert event_id
        return event_id

    async def replay(self, after: str, send: EventCallback) -> None:
        await self._store.replay_events_after(after, send)


class LogStream(Stream):
    """One in this package's event log, which knows nothing of the SDK: there messages are texts."""

    def __init__(self, log: SqlEventLog, key: UUID) -> None:
        self._log = log
        self._key = key
        self._name = uuid.uuid4().hex
        self._positions = itertools.count()

    async def store(self, message: JSONRPCMessage) -> int:
        position = next(self._positions)
        event = NewEvent(
            stream=self._name,
            position=position,
            previous=position - 1,
            kind=EventKind.NOTIFICATION,
            message=text_of(message),
        )
        sequence = await self._log.append(self._key, [event])
        assert sequence is not None
        return sequence

    async def replay(self, after: int, send: EventCallback) -> None:
        more = True
        while more:
            page = await self._log.read(self._key, self._name, after=after)
            assert page is not None
            await send_rows([(event.sequence, event.message or "") for event in page.events], send)
            after = page.events[-1].sequence
            more = page.more


class AsyncpgStream(Stream):
    """One in a table of its own on Postgres, with nothing but the driver.

    Args:
        connection: Perhaps that of other streams, too.
        turn: Held by the one that uses the connection.
    """

    TABLE: Final = "benchmark_asyncpg"
    CREATE: Final = f"""
        CREATE TABLE {TABLE} (
            stream text, id bigint GENERATED ALWAYS AS IDENTITY, message text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (stream, id)
        )
    """
    INSERT: Final = f"INSERT INTO {TABLE} (stream, message) VALUES ($1, $2) RETURNING id"
    SELECT: Final = f"SELECT id, message FROM {TABLE} WHERE stream = $1 AND id > $2 ORDER BY id"

    def __init__(self, connection: Any, turn: asyncio.Lock) -> None:
        self._connection = connection
        self._turn = turn
        self._name = uuid.uuid4().hex

    async def store(self, message: JSONRPCMessage) -> int:
        async with self._turn:
            stored: int = await self._connection.fetchval(self.INSERT, self._name, text_of(message))
        return stored

    async def replay(self, after: int, send: EventCallback) -> None:
        async with self._turn:
            rows = await self._connection.fetch(self.SELECT, self._name, after)
        await send_rows(rows, send)


class AiosqliteStream(Stream):
    """One in a file of its own, with nothing but the driver: one connection in autocommit, which takes turns."""

    CREATE: Final = """
        CREATE TABLE event (
            stream TEXT NOT NULL, id INTEGER PRIMARY KEY, message TEXT NOT NULL, created_at REAL NOT NULL
        )
    """
    INDEX: Final = "CREATE INDEX event_of_stream ON event (stream, id)"
    INSERT: Final = "INSERT INTO event (stream, message, created_at) VALUES (?, ?, julianday('now')) RETURNING id"
    SELECT: Final = "SELECT id, message FROM event WHERE stream = ? AND id > ? ORDER BY id"

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self._name = uuid.uuid4().hex

    async def store(self, message: JSONRPCMessage) -> int:
        ((stored,),) = await self._connection.execute_fetchall(self.INSERT, (self._name, text_of(message)))
        return int(stored)

    async def replay(self, after: int, send: EventCallback) -> None:
        rows = await self._connection.execute_fetchall(self.SELECT, (self._name, after))
        await send_rows([(row[0], row[1]) for row in rows], send)


async def send_rows(rows: Sequence[tuple[int, str]], send: EventCallback) -> None:
    for number, message in rows:
        await send(EventMessage(jsonrpc_message_adapter.validate_json(message), str(number)))


def text_of(message: JSONRPCMessage) -> str:
    # As mcp-persist does it.
    return message.model_dump_json(by_alias=True, exclude_none=True)


def message_of(size: int) -> JSONRPCMessage:
    """A notification that is so many bytes long: of words, because Postgres compresses long texts."""
    words = [word for word in (__doc__ or "").split() if word.isascii() and word.isalpha()]
    text = " ".join(random.Random(size).choices(words, k=size))

    def of(data: str) -> JSONRPCNotification:
        params = {"level": "info", "logger": "benchmark", "data": data}
        return JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params=params)

    return of(text[: size - len(text_of(of("")))])


async def _nothing() -> None:
    return


@dataclass(frozen=True)
class Contender:
    """One of those that are compared."""

    name: str
    open_stream: Callable[[], Awaitable[Stream]]
    beside: Sequence[str] = ()
    """With which others it is compared."""
    settle: Callable[[], Awaitable[object]] = _nothing
    """Commit what has been acknowledged and is not committed yet."""
    replays: bool = True
    """Whether its replay is another than that of those before."""


@dataclass
class Timings:
    """What the rounds of one contender took."""

    rates: list[float] = field(default_factory=list)
    """Events a second."""
    p50: list[float] = field(default_factory=list)
    """Milliseconds, as `p99`, in which an event was stored. Nothing for a replay."""
    p99: list[float] = field(default_factory=list)

    def shown(self) -> str:
        parts = [f"{spread(self.rates, 0)} events/s"]
        parts += [f"{name} {spread(times, 2)} ms" for name, times in (("p50", self.p50), ("p99", self.p99)) if times]
        return "   ".join(parts)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the lowest and the highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


async def store_all(streams: Sequence[Stream], message: JSONRPCMessage, count: int) -> list[float]:
    """Store so many events, each stream one after the other; how long each took, in seconds."""
    numbers, took = iter(range(count)), []

    async def client(stream: Stream) -> None:
        for _ in numbers:
            began = time.perf_counter()
            await stream.store(message)
            took.append(time.perf_counter() - began)

    await asyncio.gather(*map(client, streams))
    return took


async def time_storing(
    contender: Contender, timings: Timings, *, sessions: int, message: JSONRPCMessage, count: int
) -> None:
    streams = await asyncio.gather(*(contender.open_stream() for _ in range(sessions)))
    await store_all(streams, message, WARM_UP * sessions)
    await contender.settle()
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        took = await store_all(streams, message, count)
        await contender.settle()
        seconds = time.perf_counter() - began
    finally:
        gc.enable()
    timings.rates.append(count / seconds)
    timings.p50.append(1000 * percentile(took, 50))
    timings.p99.append(1000 * percentile(took, 99))


async def time_replay(stream: Stream, first: int | str, timings: Timings, *, count: int) -> None:
    sent: list[EventMessage] = []

    async def send(event: EventMessage) -> None:
        sent.append(event)

    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        await stream.replay(first, send)
        seconds = time.perf_counter() - began
    finally:
        gc.enable()
    if len({event.event_id for event in sent}) != count:
        raise RuntimeError(f"{type(stream).__name__}: {len(sent)} events of {count} were replayed")
    timings.rates.append(count / seconds)


def show(title: str, contenders: Sequence[Contender], timings: dict[str, Timings]) -> None:
    print(title)
    for contender in contenders:
        mine = timings[contender.name]
        print(f"  {contender.name:<42} {mine.shown()}")
        for name in contender.beside:
            pairs = zip(mine.rates, timings[name].rates, strict=True)
            print(f"      {spread([ours / theirs for ours, theirs in pairs], 2)} times {name}")
    sys.stdout.flush()


async def compare(contenders: Sequence[Contender], rounds: int, scale: float) -> None:
    for size_name, size in SIZES.items():
        message = message_of(size)
        for sessions, count in ((1, int(500 * scale)), (SESSIONS, int(3000 * scale))):
            timings = {contender.name: Timings() for contender in contenders}
            for _ in range(rounds):
                for contender in random.sample(contenders, len(contenders)):
                    await time_storing(
                        contender, timings[contender.name], sessions=sessions, message=message, count=count
                    )
            show(f"storing, sessions: {sessions}, {size_name}", contenders, timings)
        await compare_replays([contender for contender in contenders if contender.replays], rounds, scale, size_name)


async def compare_replays(contenders: Sequence[Contender], rounds: int, scale: float, size_name: str) -> None:
    count = int(REPLAYED * scale)
    message = message_of(SIZES[size_name])
    streams = {}
    for contender in contenders:
        stream = await contender.open_stream()
        streams[contender.name] = stream, await stream.store(message)
        # Many at a time, only because that is faster.
        await store_all([stream] * SESSIONS, message, count)
        await time_replay(*streams[contender.name], Timings(), count=count)
    timings = {contender.name: Timings() for contender in contenders}
    for _ in range(rounds):
        for contender in random.sample(contenders, len(contenders)):
            await time_replay(*streams[contender.name], timings[contender.name], count=count)
    show(f"replay of {count} events, {size_name}", contenders, timings)


async def open_ours(
    stack: AsyncExitStack, url: str, name: str, beside: Sequence[str], *, waits_for_disk: bool = False
) -> list[Contender]:
    """This package: as the SDK sees it, and its log alone.

    Args:
        stack: Closes what is opened.
        url: The database.
        name: What it is called in the output.
        beside: With which others it is compared.
        waits_for_disk: On SQLite: whether a commit returns when it is on the disk.
    """
    await migrate.upgrade(url)
    store = SqlSessionStore(url)
    if waits_for_disk:

        @sa.event.listens_for(store.database.engine.sync_engine, "connect")
        def set_up(connection: Any, _: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.close()

    await stack.enter_async_context(store)
    log = await stack.enter_async_context(SqlEventLog(store, policy=KEEP_ALL))
    recorder = EventRecorder(log, Following(log, gone_after=timedelta(minutes=1)), instance="benchmark")
    await recorder.recover()

    async def open_stream() -> Stream:
        key = (await store.create(new_session())).key
        events = SessionEvents(key, recorder)
        events.active = True
        return StoreStream(events, GET_STREAM_KEY)

    async def open_in_log() -> Stream:
        return LogStream(log, (await store.create(new_session())).key)

    return [Contender(name, open_stream, beside), Contender(f"{name}, its log alone", open_in_log, beside[:1])]


def opens_peer(store: EventStore) -> Callable[[], Awaitable[Stream]]:
    async def open_stream() -> Stream:
        return StoreStream(store, uuid.uuid4().hex)

    return open_stream


async def open_postgres(stack: AsyncExitStack, url: str) -> list[Contender]:
    dsn = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connections = []
    for _ in range(CONNECTIONS):
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        connections.append((connection, asyncio.Lock()))
    settings = ("server_version", "fsync", "synchronous_commit")
    shown = [f"{name}={await connection.fetchval('SELECT current_setting($1)', name)}" for name in settings]
    print(f"Postgres, {', '.join(shown)}", flush=True)
    table = "benchmark_mcp_persist"
    for name in (AsyncpgStream.TABLE, table, f"{table}_forks"):
        await connection.execute(f"DROP TABLE IF EXISTS {name}")
    await connection.execute(AsyncpgStream.CREATE)
    peer = await stack.enter_async_context(
        PostgresEventStore.create(dsn, table_name=table, min_size=CONNECTIONS, max_size=CONNECTIONS)
    )
    batching = BatchingEventStore(peer, flush_max_events=WRITTEN_BEHIND)
    stack.push_async_callback(batching.aclose)
    await migrate.upgrade(url)

    shares = itertools.cycle(connections)

    async def open_alone() -> Stream:
        return AsyncpgStream(*next(shares))

    return [
        Contender(PEER, opens_peer(peer)),
        Contender("asyncpg alone", open_alone, [PEER]),
        *await open_ours(stack, url, OURS, [PEER, "asyncpg alone"]),
        Contender(f"{PEER}, written behind", opens_peer(batching), [PEER], settle=batching.flush, replays=False),
    ]


async def open_sqlite(stack: AsyncExitStack, folder: Path) -> list[Contender]:
    """Each in a file of its own, the same twice: FULL, as mcp-persist is, and NORMAL, as this package is."""
    print(f"SQLite {aiosqlite.sqlite_version}; an fsync takes {1000 * time_of_fsync(folder):.2f} ms there", flush=True)
    contenders = []
    for synchronous in ("FULL", "NORMAL"):

        async def connect(name: str, synchronous: str = synchronous, **options: Any) -> aiosqlite.Connection:
            path = folder / f"{name}-{synchronous}.db"
            connection = await stack.enter_async_context(aiosqlite.connect(path, **options))
            await connection.execute("PRAGMA journal_mode=WAL")
            await connection.execute(f"PRAGMA synchronous={synchronous}")
            return connection

        as_it_comes = synchronous == "FULL"
        if as_it_comes:
            peer = await stack.enter_async_context(SQLiteEventStore.create(str(folder / "peer.db")))
        else:
            peer = SQLiteEventStore(await connect("peer"))
            await peer.initialize()
        connection = await connect("behind")
        behind = SQLiteEventStore(connection, commit_interval=0.05, commit_max_pending=WRITTEN_BEHIND)
        await behind.initialize()
        stack.push_async_callback(behind.aclose)
        alone = await connect("alone", isolation_level=None)
        await alone.execute(AiosqliteStream.CREATE)
        await alone.execute(AiosqliteStream.INDEX)

        async def open_alone(alone: aiosqlite.Connection = alone) -> Stream:
            return AiosqliteStream(alone)

        peer_name, alone_name = f"{PEER}, {synchronous}", f"aiosqlite alone, {synchronous}"
        url = f"sqlite:///{folder / f'ours-{synchronous}.db'}"
        # Both as they come, too.
        beside = [peer_name, alone_name, *([] if as_it_comes else [f"{PEER}, FULL"])]
        contenders += [
            Contender(peer_name, opens_peer(peer)),
            Contender(alone_name, open_alone, [peer_name]),
            *await open_ours(stack, url, f"{OURS}, {synchronous}", beside, waits_for_disk=as_it_comes),
            Contender(
                f"{peer_name}, written behind", opens_peer(behind), [peer_name], connection.commit, replays=False
            ),
        ]
    return contenders


def time_of_fsync(folder: Path) -> float:
    """Seconds that it takes until 4 KiB are on the disk, median."""
    took = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(50):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)


async def run(postgres: Sequence[str], rounds: int, scale: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            await compare(await open_sqlite(stack, Path(folder)), rounds, scale)
    for url in postgres:
        async with AsyncExitStack() as stack:
            await compare(await open_postgres(stack, url), rounds, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="*", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies how many events there are in a round")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments.postgres, arguments.rounds, arguments.scale))


if __name__ == "__main__":
    main()
