"""Messages between processes that do nothing else, by way of a mailbox on Postgres; `benchmarks.relay` runs it.

Each process posts messages to the others at a steady rate, one call after the other, with what came due meanwhile, and
reads its own at a hint of new ones, both as rarely as an instance does. The time of a message is from the moment at
which it was due.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import asyncpg
from sqlalchemy.engine import make_url

from benchmarks.figures import percentile
from mcp_session_store.adapter.background import Pace
from mcp_session_store.adapter.relay.inbox import READ_INTERVAL
from mcp_session_store.adapter.relay.outbox import POST_INTERVAL
from mcp_session_store.mailbox import MessageKind, NewMessage, Presence
from mcp_session_store.sql import SqlMailbox, SqlSessionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import psutil

    from mcp_session_store.mailbox import Mailbox

INSTANCES: Final = 4
RATE: Final = 1000
"""Messages a second, of all instances together."""

_PADDING: Final = "." * 200
_FALLBACK: Final = 5.0
"""Seconds between two reads without a hint."""
_HEARTBEAT: Final = 10.0
"""Seconds between two heartbeats, as those of an instance are unless set."""


@dataclass(frozen=True)
class Found:
    """What the messages took."""

    messages: int
    lost: int
    p50: float
    """Milliseconds, as those that follow."""
    p99: float
    last: float
    """Median of the last tenth of the messages."""
    database_cpu: float
    """Share of a core that all processes of the database took."""

    def __str__(self) -> str:
        lost = f", {self.lost} LOST" if self.lost else ""
        return (
            f"median {self.p50:.1f} ms (at the end {self.last:.1f} ms), 99 % {self.p99:.1f} ms, database "
            f"{100 * self.database_cpu:.0f} % of a core, {self.messages} messages{lost}"
        )


async def measure(url: str, *, database: psutil.Process, seconds: float, old_transaction: bool) -> Found:
    """Have processes send messages for so many seconds.

    Args:
        url: Migrated Postgres database.
        database: The parent process of its server.
        seconds: Seconds in which messages are sent.
        old_transaction: Whether another transaction is open in the database all the time.
    """
    async with _old_transaction(url) if old_transaction else _nothing():
        workers = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.messages",
                json.dumps({"url": url, "number": number, "seconds": seconds}),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A result is one line.
                limit=2**30,
            )
            for number in range(1, INSTANCES + 1)
        ]
        for worker in workers:
            assert worker.stdout is not None
            await worker.stdout.readline()
        begins = time.time() + 1
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{begins}\n".encode())
        await asyncio.sleep(begins - time.time())
        before, began = _cpu_of(database), time.perf_counter()
        await asyncio.sleep(seconds)
        cpu = (_cpu_of(database) - before) / (time.perf_counter() - began)
        outputs = [(await worker.communicate())[0] for worker in workers]
    results = [json.loads(output) for output in outputs]
    took = [taken for result in results for taken in result["took"]]
    took.sort()
    times = [1000 * one for _, one in took]
    return Found(
        messages=len(times),
        lost=sum(result["sent"] for result in results) - len(times),
        p50=statistics.median(times),
        p99=percentile(times, 99),
        last=statistics.median(times[-max(1, len(times) // 10) :]),
        database_cpu=cpu,
    )


def _cpu_of(database: psutil.Process) -> float:
    """Return the CPU time of all processes of a server, those that have ended included."""
    total = 0.0
    for process in (database, *database.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _old_transaction(url: str) -> AsyncIterator[None]:
    """A transaction that holds up the removal of dead rows."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT txid_current()")
            yield
    finally:
        await connection.close()


class Worker:
    """One instance.

    Args:
        mailbox: The mailbox.
        number: Its number, from 1.
        seconds: Seconds in which it sends.
    """

    def __init__(self, mailbox: Mailbox, *, number: int, seconds: float) -> None:
        self._mailbox = mailbox
        self._number = number
        self._seconds = seconds
        self._instance = f"benchmark:{os.getpid()}:{uuid4().hex[:12]}"
        self._hint = asyncio.Event()
        self._sequence = time.time_ns() // 1000
        self._key = uuid4()
        self.sent = 0
        self.took: list[tuple[float, float]] = []
        """The moment at which each message was due, and the seconds that it took."""

    async def run(self) -> None:
        await self._beat()
        background = [
            asyncio.create_task(self._beat_again()),
            asyncio.create_task(self._mailbox.listen(self._hint.set, instance=self._instance, number=self._number)),
            asyncio.create_task(self._read()),
        ]
        print("ready", flush=True)
        # The moment at which all begin.
        begins = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.sleep(begins - time.time())
        await self._write(begins)
        # Others may write still.
        await asyncio.sleep(2)
        for task in background:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _beat(self) -> None:
        await self._mailbox.beat(Presence(instance=self._instance, number=self._number))

    async def _beat_again(self) -> None:
        # Nothing is posted to an instance whose last heartbeat is old.
        while True:
            await asyncio.sleep(_HEARTBEAT)
            await self._beat()

    async def _write(self, begins: float) -> None:
        others = [number for number in range(1, INSTANCES + 1) if number != self._number]
        interval = INSTANCES / RATE
        pace = Pace(POST_INTERVAL)
        due, ends = begins + random.uniform(0, interval), begins + self._seconds
        while due < ends:
            await asyncio.sleep(due - time.time())
            await pace.wait()
            messages = []
            while due <= time.time() and due < ends:
                messages.append(self._message(random.choice(others), due))
                due += interval
            if messages:
                await self._mailbox.post(messages)
                self.sent += len(messages)

    def _message(self, recipient: int, due: float) -> NewMessage:
        self._sequence += 1
        return NewMessage(
            recipient=recipient,
            sender=self._number,
            sequence=self._sequence,
            key=self._key,
            kind=MessageKind.ANSWER,
            body=json.dumps({"due": due, "padding": _PADDING}),
        )

    async def _read(self) -> None:
        delivered: dict[int, int] = {}
        pace = Pace(READ_INTERVAL)
        while True:
            more = True
            while more:
                page = await self._mailbox.receive(self._number, delivered=delivered)
                now = time.time()
                for message in page.messages:
                    due = json.loads(message.body)["due"]
                    self.took.append((due, now - due))
                    delivered[message.sender] = message.sequence
                more = page.more
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hint.wait(), _FALLBACK)
            await pace.wait()
            self._hint.clear()


async def work(url: str, **options: Any) -> None:
    async with SqlSessionStore(url) as store:
        worker = Worker(SqlMailbox(store), **options)
        await worker.run()
    print(json.dumps({"sent": worker.sent, "took": worker.took}))


if __name__ == "__main__":
    asyncio.run(work(**json.loads(sys.argv[1])))
