"""Measure the cost of durable events beside mcp-persist and beside the drivers alone, in one run.

    pip install 'mcp-persist[postgres,sqlite]>=2.2,<3'
    python -m benchmarks.events                            # SQLite in a temporary file
    python -m benchmarks.events postgresql://user@host/db  # and Postgres, on a database that may be filled

Of several Postgres databases each is measured, such as one on a server with `fsync` and one on a server without.
Two operations are timed, with messages of 200 bytes and of 4 KiB:

* storing: JSON-RPC notifications, for one session and for 100 sessions at once, each of which waits for an event
  to be stored before it stores the next;
* replay: the response to a GET with `Last-Event-ID`, at the ASGI boundary, until the client has 5 000 events of
  one stream.

Storing begins with the same message of the SDK and ends with a row that is committed. This package and mcp-persist are
called as the SDK's transport calls an event store; this package's log is also timed without what lies between the two.
The drivers alone insert into a table that has what a replay needs, and nothing else: each row in a commit of its own,
or in batches, which is about the most that a log of such rows can reach. On a Postgres that knows LZ4 their table
compresses long messages by it, as this package's does; mcp-persist's has the server's default. What is written
behind is acknowledged before it is committed, so that a crash loses it: it is shown for comparison.

A replay is what a client gets: this package serves it under `durable_app(..., events=log)`, mcp-persist under the app
of an `MCPServer` with `event_store=`. The drivers alone answer no GET, so they take no part. The events of each replay
are compared with those stored, text by text and in order.

mcp-persist has its default configuration. mcp-persist and the driver alone have equally many connections to Postgres;
this package takes one for storing. On SQLite this package does not wait for the disk with each commit
(`synchronous=NORMAL`), and mcp-persist does (`FULL`): each is measured both ways. No old events are removed meanwhile.

Each round times all of them in random order. The ratio is taken round by round, so that a machine that is slower for a
while is slower for all. The median, lowest and highest of the rounds are printed. Garbage is collected between the
timings, for all alike.
"""

from __future__ import annotations

import argparse
import asyncio
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
from mcp.server.mcpserver import MCPServer
from mcp.server.streamable_http import GET_STREAM_KEY
from mcp_types import JSONRPCNotification

from benchmarks.drivers import Batches, insert_on_postgres, insert_on_sqlite
from benchmarks.endpoint import Endpoint, garbage_kept
from benchmarks.figures import in_random_order, percentile, ratios, spread, table
from mcp_session_store import durable_app, session_key
from mcp_session_store.adapter.instances import Instances
from mcp_session_store.adapter.question_ids import QuestionIds
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.adapter.streams.followers import Followers
from mcp_session_store.adapter.streams.recorder import EventRecorder
from mcp_session_store.event_log import STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent
from mcp_session_store.retention import EventPolicy
from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore
from mcp_session_store.sql.schema import migrate
from mcp_session_store.testing import new_session

try:
    from mcp_persist import BatchingEventStore, PostgresEventStore, SQLiteEventStore
except ImportError:
    sys.exit("mcp-persist is missing; run: pip install 'mcp-persist[postgres,sqlite]>=2.2,<3'")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
    from uuid import UUID

    from mcp.server.streamable_http import EventStore
    from mcp_types import JSONRPCMessage

OPERATIONS: Final = ("storing", "replay")
SIZES: Final = {"200 bytes": 200, "4 KiB": 4096}
"""Bytes of a message as JSON text."""
SESSIONS: Final = 100
REPLAYED: Final = 5_000
"""Number of events that a replay sends."""
CONNECTIONS: Final = 10
"""Connections to Postgres of mcp-persist, whose pool has as many by default, and of asyncpg alone."""
WARM_UP: Final = 4
"""Number of events of each session that are stored before the timed ones."""
WRITTEN_BEHIND: Final = 64
"""Number of events that mcp-persist gathers before it commits them: the default of its `BatchingEventStore`."""
STORED_TOGETHER: Final = 100
"""Number of events that are stored together in preparation of a replay, because that is faster."""

AS_THEY_COME: Final = {
    "SQLite": ("mcp-session-store, NORMAL", "mcp-persist, FULL", "aiosqlite alone in batches, NORMAL"),
    "Postgres": ("mcp-session-store", "mcp-persist", "asyncpg alone in batches"),
}
"""Names, by the database, of this package, mcp-persist and the driver alone in batches, without configuration, except
that this package's log keeps all events."""

KEEP_ALL: Final = EventPolicy(max_events_per_session=1_000_000, max_bytes_per_session=1024**3)

PEER: Final = "mcp-persist"
OURS: Final = "mcp-session-store"


class Stream(ABC):
    """Stream that stores its events somewhere, in a session of its own."""

    @abstractmethod
    async def store(self, message: JSONRPCMessage) -> int | str:
        """Store an event, and return its id."""


class StoreStream(Stream):
    """Stream in an event store, called with messages as the SDK's transport calls it."""

    def __init__(self, store: EventStore, name: str) -> None:
        self._store = store
        self._name = name

    async def store(self, message: JSONRPCMessage) -> str:
        event_id = await self._store.store_event(self._name, message)
        assert event_id
        return event_id


class LogStream(Stream):
    """Stream in this package's event log, which knows nothing of the SDK: its messages are texts."""

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


class AsyncpgStream(Stream):
    """Stream in a table on Postgres, with nothing but the driver.

    Args:
        connection: Connection that other streams may use, too.
        turn: Lock that is held while the connection is used.
    """

    TABLE: Final = "benchmark_asyncpg"
    CREATE: Final = f"""
        CREATE TABLE {TABLE} (
            stream text, id bigint GENERATED ALWAYS AS IDENTITY, message text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (stream, id)
        )
    """
    HAS_LZ4: Final = "SELECT 1 FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)"
    COMPRESS: Final = f"ALTER TABLE {TABLE} ALTER COLUMN message SET COMPRESSION lz4"
    INSERT: Final = f"INSERT INTO {TABLE} (stream, message) VALUES ($1, $2) RETURNING id"

    def __init__(self, connection: Any, turn: asyncio.Lock) -> None:
        self._connection = connection
        self._turn = turn
        self._name = uuid.uuid4().hex

    async def store(self, message: JSONRPCMessage) -> int:
        async with self._turn:
            stored: int = await self._connection.fetchval(self.INSERT, self._name, text_of(message))
        return stored


class AiosqliteStream(Stream):
    """Stream in a SQLite file, with nothing but the driver: one connection in autocommit, which takes turns."""

    CREATE: Final = """
        CREATE TABLE event (
            stream TEXT NOT NULL, id INTEGER PRIMARY KEY, message TEXT NOT NULL, created_at REAL NOT NULL
        )
    """
    INDEX: Final = "CREATE INDEX event_of_stream ON event (stream, id)"
    INSERT: Final = "INSERT INTO event (stream, message, created_at) VALUES (?, ?, julianday('now')) RETURNING id"

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self._name = uuid.uuid4().hex

    async def store(self, message: JSONRPCMessage) -> int:
        ((stored,),) = await self._connection.execute_fetchall(self.INSERT, (self._name, text_of(message)))
        return int(stored)


class BatchedStream(Stream):
    """Stream in the same table as that of the driver alone, whose rows share commits with those of other streams."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._name = uuid.uuid4().hex

    async def store(self, message: JSONRPCMessage) -> int:
        return await self._batches.store(self._name, text_of(message))


def text_of(message: JSONRPCMessage) -> str:
    # The arguments of mcp-persist.
    return message.model_dump_json(by_alias=True, exclude_none=True)


def message_of(size: int) -> JSONRPCNotification:
    """Return a notification of that many bytes. Its text is words, because Postgres compresses long texts."""
    words = [word for word in (__doc__ or "").split() if word.isascii() and word.isalpha()]
    text = " ".join(random.Random(size).choices(words, k=size))

    def of(data: str) -> JSONRPCNotification:
        params = {"level": "info", "logger": "benchmark", "data": data}
        return JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params=params)

    return of(text[: size - len(text_of(of("")))])


def numbered(message: JSONRPCNotification, count: int) -> list[JSONRPCNotification]:
    """Return that many messages like this one, each of which ends with its number."""
    params = message.params or {}
    data = params["data"][: -len(f"{0:08}")]
    return [message.model_copy(update={"params": params | {"data": f"{data}{number:08}"}}) for number in range(count)]


async def _nothing() -> None:
    return


@dataclass(frozen=True)
class Resumption:
    """Stream that a client comes back for."""

    endpoint: Endpoint
    session_id: bytes
    last_event_id: bytes
    missed: list[str]
    """Texts of the messages that follow."""


@dataclass(frozen=True)
class Contender:
    """Way to store events, and perhaps to replay them, to compare with the others."""

    name: str
    open_stream: Callable[[], Awaitable[Stream]]
    beside: Sequence[str] = ()
    """Names of the contenders that it is compared with."""
    settle: Callable[[], Awaitable[object]] = _nothing
    """Commits what was acknowledged and is not committed yet."""
    open_resumption: Callable[[JSONRPCNotification, int], Awaitable[Resumption]] | None = None
    """Stores a stream of that many events for a client to come back for; `None` if it serves none of its own."""


@dataclass
class Timings:
    """Results of the rounds of one contender."""

    rates: list[float] = field(default_factory=list)
    """Events per second."""
    p50: list[float] = field(default_factory=list)
    """Milliseconds in which an event was stored, like `p99`. Empty for a replay."""
    p99: list[float] = field(default_factory=list)

    def shown(self) -> str:
        parts = [f"{spread(self.rates, 0)} events/s"]
        parts += [f"{name} {spread(times, 2)} ms" for name, times in (("p50", self.p50), ("p99", self.p99)) if times]
        return "   ".join(parts)


async def store_all(streams: Sequence[Stream], message: JSONRPCMessage, count: int) -> list[float]:
    """Store that many events, one at a time in each stream, and return the seconds that each took."""
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
    with garbage_kept():
        began = time.perf_counter()
        took = await store_all(streams, message, count)
        await contender.settle()
        seconds = time.perf_counter() - began
    timings.rates.append(count / seconds)
    timings.p50.append(1000 * percentile(took, 50))
    timings.p99.append(1000 * percentile(took, 99))


async def time_replay(resumption: Resumption, timings: Timings) -> None:
    count = len(resumption.missed)
    response = await resumption.endpoint.get_events(resumption.session_id, resumption.last_event_id, count=count)
    if len(set(response.ids)) != count:
        raise RuntimeError(f"{len(set(response.ids))} events of {count} were replayed")
    if [event.partition(b"data: ")[2].decode() for event in response.events] != resumption.missed:
        raise RuntimeError("other messages than those stored were replayed, or in another order")
    timings.rates.append(count / response.seconds)


def show(title: str, contenders: Sequence[Contender], timings: dict[str, Timings]) -> None:
    print(title)
    for contender in contenders:
        mine = timings[contender.name]
        print(f"  {contender.name:<42} {mine.shown()}")
        for name in [name for name in contender.beside if name in timings]:
            print(f"      {spread(ratios(mine.rates, timings[name].rates), 2)} times {name}")
    sys.stdout.flush()


async def compare(
    contenders: Sequence[Contender], rounds: int, scale: float, operations: Collection[str]
) -> AsyncIterator[tuple[str, dict[str, Timings]]]:
    """Yield the title of each comparison, and its timings by the contenders' names."""
    for size_name, size in SIZES.items():
        message = message_of(size)
        if "storing" in operations:
            for sessions, count in ((1, int(500 * scale)), (SESSIONS, int(3000 * scale))):
                title = f"storing, sessions: {sessions}, {size_name}"
                yield title, await compare_storing(contenders, rounds, message, sessions=sessions, count=count)
        if "replay" in operations:
            count = int(REPLAYED * scale)
            yield f"replay of {count} events, {size_name}", await compare_replays(contenders, rounds, message, count)


async def compare_and_show(
    contenders: Sequence[Contender], rounds: int, scale: float, operations: Collection[str]
) -> None:
    async for title, timings in compare(contenders, rounds, scale, operations):
        show(title, [contender for contender in contenders if contender.name in timings], timings)


async def compare_storing(
    contenders: Sequence[Contender], rounds: int, message: JSONRPCMessage, *, sessions: int, count: int
) -> dict[str, Timings]:
    timings = {contender.name: Timings() for contender in contenders}
    for contender in in_random_order(contenders, rounds):
        await time_storing(contender, timings[contender.name], sessions=sessions, message=message, count=count)
    return timings


async def compare_replays(
    contenders: Sequence[Contender], rounds: int, message: JSONRPCNotification, count: int
) -> dict[str, Timings]:
    resumptions = {}
    for contender in contenders:
        if contender.open_resumption is not None:
            resumptions[contender.name] = await contender.open_resumption(message, count)
            await time_replay(resumptions[contender.name], Timings())
    timings = {name: Timings() for name in resumptions}
    for name in in_random_order(list(resumptions), rounds):
        await time_replay(resumptions[name], timings[name])
    return timings


async def compare_as_they_come(
    folder: Path, postgres: str | None, rounds: int, scale: float, operations: Collection[str]
) -> None:
    """Print a table of this package beside mcp-persist, and of the driver alone, as they come (see `AS_THEY_COME`)."""
    rows: dict[str, list[str]] = {}
    head = [""]
    for database, (mine, of_peer, alone) in AS_THEY_COME.items():
        async with AsyncExitStack() as stack:
            if database == "SQLite":
                contenders = await open_sqlite(stack, folder)
            elif postgres is not None:
                contenders = await open_postgres(stack, postgres)
            else:
                continue
            head += [database, f"{database}, the driver alone"]
            chosen = [contender for contender in contenders if contender.name in (mine, of_peer, alone)]
            async for title, timings in compare(chosen, rounds, scale, operations):
                rates = timings[of_peer].rates
                multiples = ratios(timings[mine].rates, rates)
                limits = ratios(timings[alone].rates, rates) if alone in timings else []
                goal = min([goal_of(title), *([statistics.median(limits)] if limits else [])])
                missed = ": **missed**" if statistics.median(multiples) < goal else ""
                rows.setdefault(title, []).extend(
                    [f"{spread(multiples, 2)}{missed}", spread(limits, 2) if limits else ""]
                )
    print("\nThroughput of events as a multiple of mcp-persist's, with the lowest and the highest:\n")
    head.append("goal, or the driver's limit where lower")
    print(table(head, [[title, *cells, f"{goal_of(title):g}"] for title, cells in rows.items()]), flush=True)


def goal_of(title: str) -> float:
    return 3.0 if f"sessions: {SESSIONS}" in title else 1.0


class _Empty:
    """A memory without sessions."""

    resident = streams = 0


async def open_ours(
    stack: AsyncExitStack, url: str, name: str, beside: Sequence[str], *, waits_for_disk: bool = False
) -> list[Contender]:
    """Return this package, as the SDK and its clients see it, and its log alone.

    Args:
        stack: Stack that closes what is opened here.
        url: URL of the database.
        name: Name in the output.
        beside: Names of the contenders that it is compared with.
        waits_for_disk: Whether, on SQLite, a commit returns when it is on the disk.
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
    mailbox = await stack.enter_async_context(SqlMailbox(store))
    instances = Instances(
        mailbox,
        QuestionIds(),
        _Empty(),
        instance="benchmark",
        server="",
        dead_after=timedelta(minutes=1),
        relay=False,
    )
    recorder = EventRecorder(log, Followers(log, instances), instances)
    await recorder.recover()

    async def open_stream() -> Stream:
        key = (await store.create(new_session())).key
        events = SessionEvents(key, recorder)
        events.active = True
        return StoreStream(events, GET_STREAM_KEY)

    async def open_in_log() -> Stream:
        return LogStream(log, (await store.create(new_session())).key)

    app = durable_app(MCPServer("benchmark"), store, events=log, evict_after=None, sweep_interval=None)
    await stack.enter_async_context(app.router.lifespan_context(app))
    endpoint = Endpoint(app)

    async def open_resumption(message: JSONRPCNotification, count: int) -> Resumption:
        session_id = await endpoint.open_session()
        (last_event_id,) = (await endpoint.get_events(session_id, None, count=1)).ids
        key, texts = session_key(session_id.decode()), list(map(text_of, numbered(message, count)))
        events = [
            NewEvent(stream=STANDALONE_STREAM, position=position, kind=EventKind.NOTIFICATION, message=text)
            for position, text in enumerate(texts)
        ]
        for start in range(0, count, STORED_TOGETHER):
            await log.append(key, events[start : start + STORED_TOGETHER])
        return Resumption(endpoint, session_id, last_event_id, texts)

    return [
        Contender(name, open_stream, beside, open_resumption=open_resumption),
        Contender(f"{name}, its log alone", open_in_log, beside[:1]),
    ]


async def open_peer(stack: AsyncExitStack, store: EventStore, name: str) -> Contender:
    """Return mcp-persist with one of its event stores."""
    app = MCPServer("benchmark").streamable_http_app(event_store=store)
    await stack.enter_async_context(app.router.lifespan_context(app))
    endpoint = Endpoint(app)

    async def open_resumption(message: JSONRPCNotification, count: int) -> Resumption:
        session_id = await endpoint.open_session()
        stream = StoreStream(store, uuid.uuid4().hex)
        first = await stream.store(message)
        messages = numbered(message, count)
        ids: list[str] = []
        for start in range(0, count, STORED_TOGETHER):
            ids += await asyncio.gather(*map(stream.store, messages[start : start + STORED_TOGETHER]))
        # Those that are stored together have no other order.
        in_order = sorted(zip(ids, messages, strict=True), key=lambda stored: int(stored[0]))
        return Resumption(endpoint, session_id, first.encode(), [text_of(stored) for _, stored in in_order])

    return Contender(name, opens_peer(store), open_resumption=open_resumption)


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
    if await connection.fetchval(AsyncpgStream.HAS_LZ4):
        await connection.execute(AsyncpgStream.COMPRESS)
    peer = await stack.enter_async_context(
        PostgresEventStore.create(dsn, table_name=table, min_size=CONNECTIONS, max_size=CONNECTIONS)
    )
    batching = BatchingEventStore(peer, flush_max_events=WRITTEN_BEHIND)
    stack.push_async_callback(batching.aclose)
    await migrate.upgrade(url)

    shares = itertools.cycle(connections)
    of_batches = await asyncpg.connect(dsn)
    stack.push_async_callback(of_batches.close)
    batches = Batches(insert_on_postgres(of_batches, AsyncpgStream.TABLE))

    async def open_alone() -> Stream:
        return AsyncpgStream(*next(shares))

    async def open_batched() -> Stream:
        return BatchedStream(batches)

    return [
        await open_peer(stack, peer, PEER),
        Contender("asyncpg alone", open_alone, [PEER]),
        Contender("asyncpg alone in batches", open_batched, [PEER]),
        *await open_ours(stack, url, OURS, [PEER, "asyncpg alone in batches"]),
        Contender(f"{PEER}, written behind", opens_peer(batching), [PEER], settle=batching.flush),
    ]


async def open_sqlite(stack: AsyncExitStack, folder: Path) -> list[Contender]:
    """Return each contender twice, in a file of its own: FULL, the default of mcp-persist, and NORMAL, ours."""
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

        async def open_batched(batches: Batches = Batches(insert_on_sqlite(alone))) -> Stream:  # noqa: B008 - of the loop
            return BatchedStream(batches)

        peer_name, alone_name = f"{PEER}, {synchronous}", f"aiosqlite alone, {synchronous}"
        batched_name = f"aiosqlite alone in batches, {synchronous}"
        url = f"sqlite:///{folder / f'ours-{synchronous}.db'}"
        # The defaults of both, too.
        beside = [peer_name, batched_name, *([] if as_it_comes else [f"{PEER}, FULL"])]
        contenders += [
            await open_peer(stack, peer, peer_name),
            Contender(alone_name, open_alone, [peer_name]),
            Contender(batched_name, open_batched, [peer_name]),
            *await open_ours(stack, url, f"{OURS}, {synchronous}", beside, waits_for_disk=as_it_comes),
            Contender(f"{peer_name}, written behind", opens_peer(behind), [peer_name], connection.commit),
        ]
    return contenders


def time_of_fsync(folder: Path) -> float:
    """Return the seconds until 4 KiB are on the disk, as a median."""
    took = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(50):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)


async def run(postgres: Sequence[str], rounds: int, scale: float, operations: Collection[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            await compare_and_show(await open_sqlite(stack, Path(folder)), rounds, scale, operations)
    for url in postgres:
        async with AsyncExitStack() as stack:
            await compare_and_show(await open_postgres(stack, url), rounds, scale, operations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="*", help="URL of a Postgres database that may be migrated and filled")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of events of a round")
    parser.add_argument("--only", choices=OPERATIONS, help="time one operation instead of both")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(
        run(arguments.postgres, arguments.rounds, arguments.scale, [arguments.only] if arguments.only else OPERATIONS)
    )


if __name__ == "__main__":
    main()
