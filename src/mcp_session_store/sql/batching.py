"""Share statements: calls that arrive while a statement runs share the next one."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from mcp_session_store import telemetry
from mcp_session_store.errors import InvalidValue, StoreBusy, StoreClosed
from mcp_session_store.sql.database import spawn
from mcp_session_store.sql.failures import error_of_one_call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from mcp_session_store.sql.database import Attempt, Database, Lease

__all__ = ["Batcher", "Lane"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_T = TypeVar("_T")

MAX_BATCH: Final = 500
"""Number of items that share a statement at most."""
MAX_BATCH_BYTES: Final = 1024**2
"""Bytes of clients' data that share a statement at most; an item that has more goes alone.

So many also make a busy batcher return its connection, because on SQLite all that write wait for it.
"""
MAX_WAITING: Final = 10_000
"""Number of items that may wait for a statement; beyond it calls fail."""
BATCHES_PER_LEASE: Final = 50
"""Number of statements after which a busy batcher returns its connection; at once where calls wait for one."""


class Batcher(Generic[_Item, _Result]):
    """Runs one kind of statement for all items that wait at the time.

    A lone item goes at once. While its statement runs others gather, and share the next statement: under load
    the cost of a round trip and of a commit is divided among them, and one connection serves them all.

    A caller waits for the database's timeout at most, may be cancelled, and may bring an item that the database
    refuses, without an effect on the other callers.

    Args:
        database: Database to run statements on.
        execute: Runs the statement for some items, and returns their results in the same order. It may run again
            with the same items.
        of: Attributes of its metrics: the operation and the namespace.
        writes: Whether the statement changes anything.
        max_batch: See `MAX_BATCH`.
        max_waiting: See `MAX_WAITING`.
        weigh: Returns the bytes of clients' data that an item has, where they are many; see `MAX_BATCH_BYTES`.
        patient: Whether a caller waits longer than the timeout while items before its own are served.
    """

    def __init__(
        self,
        database: Database,
        execute: Callable[[Attempt, Sequence[_Item]], Awaitable[Sequence[_Result]]],
        of: Mapping[str, str],
        *,
        writes: bool,
        max_batch: int = MAX_BATCH,
        max_waiting: int = MAX_WAITING,
        weigh: Callable[[_Item], int] | None = None,
        patient: bool = False,
    ) -> None:
        self._database = database
        self._execute = execute
        self._of = of
        self._writes = writes
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._weigh = weigh
        self._patient = patient
        self._progress_at = -math.inf
        # In the order of arrival; by future, so that the item of a cancelled call is easily removed.
        self._waiting: dict[asyncio.Future[_Result], _Item] = {}
        self._served: dict[asyncio.Future[_Result], _Item] = {}
        self._drain_task: asyncio.Task[None] | None = None
        # All wait equally long, so that the first to come is the first to time out: one timer serves all.
        self._deadlines: deque[tuple[float, asyncio.Future[_Result]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, item: _Item) -> _Result:
        """Run the statement for an item, together with others, and return its result.

        Raises:
            StoreBusy: Too many items wait already.
            StoreUnavailable: No answer came within the timeout.
            SessionStoreError: `execute` raised it for this item.
        """
        loop = self._database.bind()
        if len(self._waiting) >= self._max_waiting:
            raise StoreBusy(
                f"{self._max_waiting} calls already wait for the database {self._database.shown_url}; try again later"
            )
        future: asyncio.Future[_Result] = loop.create_future()
        self._waiting[future] = item
        self._deadlines.append((loop.time() + self._database.timeout, future))
        if self._timer is None:
            self._time_out()
        if self._drain_task is None:
            self._drain_task = spawn(self._drain())
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    @property
    def busy(self) -> bool:
        """Whether there are `pending` items."""
        return self._drain_task is not None

    def pending(self) -> Iterator[_Item]:
        """Return the items that wait, and those whose statement runs, though the caller may have left."""
        return chain(self._served.values(), self._waiting.values())

    def _time_out(self) -> None:
        """Fail the calls that have waited for the timeout, and set the timer for the next one."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._deadlines:
            deadline, future = self._deadlines[0]
            if not future.done():
                if self._patient:
                    deadline = max(deadline, self._progress_at + self._database.timeout)
                if deadline > loop.time():
                    self._timer = loop.call_at(deadline, self._time_out)
                    return
                _fail(future, self._database.silent())
            self._deadlines.popleft()

    async def aclose(self) -> None:
        """Fail all waiting calls, and stop."""
        for future in (*self._waiting, *self._served):
            _fail(future, StoreClosed("the session store was closed"))
        self._waiting.clear()
        self._deadlines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (task := self._drain_task) is not None:
            await self._database.stop(task)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                async with self._database.lease(writes=self._writes) as lease:
                    carried = 0
                    for _ in range(BATCHES_PER_LEASE):
                        taken = self._take()
                        if not self._served:
                            break
                        carried += taken
                        self._count(taken)
                        try:
                            await self._serve(lease, self._served)
                        finally:
                            self._served = {}
                        while self._deadlines and self._deadlines[0][1].done():
                            self._deadlines.popleft()
                        if carried >= MAX_BATCH_BYTES or self._database.connections.wanted:
                            break
                        # A caller that was answered may have its next call ready, and finds the connection open.
                        await asyncio.sleep(0)
        finally:
            self._drain_task = None

    def _take(self) -> int:
        """Take the items that share the next statement, in the order of their arrival, and return their bytes."""
        batch: dict[asyncio.Future[_Result], _Item]
        carried = 0
        if self._weigh is None:
            batch = dict(islice(self._waiting.items(), self._max_batch))
        else:
            batch = {}
            for future, item in islice(self._waiting.items(), self._max_batch):
                weight = self._weigh(item)
                if batch and carried + weight > MAX_BATCH_BYTES:
                    break
                carried += weight
                batch[future] = item
        for future in batch:
            del self._waiting[future]
        self._served = batch
        return carried

    def _count(self, taken: int) -> None:
        """Record what shares the next statement, and for how long the first of it has waited."""
        telemetry.statement_items.record(len(self._served), self._of)
        if self._weigh is not None:
            telemetry.statement_bytes.record(taken, self._of)
        while self._deadlines and self._deadlines[0][1].done():
            self._deadlines.popleft()
        if self._deadlines:
            waited = asyncio.get_running_loop().time() - self._deadlines[0][0] + self._database.timeout
            telemetry.statement_waits.record(waited, self._of)

    async def _serve(self, lease: Lease, batch: dict[asyncio.Future[_Result], _Item]) -> None:
        items = list(batch.values())
        began = time.monotonic()
        failure = ""
        try:
            try:
                results = await lease.run(lambda attempt: self._execute(attempt, items))
            except BaseException as error:
                failure = type(error).__qualname__
                raise
            finally:
                attributes = {**self._of, telemetry.ERROR: failure} if failure else self._of
                telemetry.statements.record(time.monotonic() - began, attributes)
        except InvalidValue as error:
            if len(batch) > 1:
                await self._serve_halves(lease, batch)
            else:
                _fail_all(batch, error)
        except Exception as error:
            _fail_all(batch, error)
        except BaseException:
            _fail_all(batch, StoreClosed("the session store was closed"))
            raise
        else:
            if self._patient:
                self._progress_at = asyncio.get_running_loop().time()
            for future, result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _serve_halves(self, lease: Lease, batch: dict[asyncio.Future[_Result], _Item]) -> None:
        entries = list(batch.items())
        halves = [dict(entries[: len(entries) // 2]), dict(entries[len(entries) // 2 :])]
        while halves:
            try:
                await self._serve(lease, halves.pop(0))
            except BaseException:
                for half in halves:
                    _fail_all(half, StoreClosed("the session store was closed"))
                raise


def _fail_all(batch: dict[asyncio.Future[_Result], _Item], error: Exception) -> None:
    for future in batch:
        _fail(future, error)


def _fail(future: asyncio.Future[_Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error_of_one_call(error))


class Lane(Batcher["Callable[[Attempt], Awaitable[Any]]", Any]):
    """Runs calls of several kinds, each with statements of its own, one after the other.

    Args:
        database: See `Batcher`.
        of: See `Batcher`.
        writes: Whether a call may change anything.
    """

    def __init__(self, database: Database, of: Mapping[str, str], *, writes: bool) -> None:
        super().__init__(database, _run_each, of, writes=writes, max_batch=1)

    async def run(self, call: Callable[[Attempt], Awaitable[_T]]) -> _T:
        """Run a call when those before it are done, and return its result.

        Raises:
            SessionStoreError: See `submit`.
        """
        return cast("_T", await self.submit(call))


async def _run_each(attempt: Attempt, calls: Sequence[Callable[[Attempt], Awaitable[Any]]]) -> list[Any]:
    return [await call(attempt) for call in calls]
