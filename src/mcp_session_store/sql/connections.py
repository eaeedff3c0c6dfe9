"""Connections for queries: a few, opened as they are needed, which calls take and give back, and wait for."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

from mcp_session_store.sql.room import GROW_AGAIN, RETRY, Room
from mcp_session_store.sql.shown import url_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Connections", "PoolOfEngine", "spawn"]

_T = TypeVar("_T")

GROW_AFTER: Final = 0.02
"""Seconds that a call waits for an open connection to come free, before another one is opened."""
STOPS_OPENING_AFTER: Final = 0.5
"""Seconds that a stop waits for a connection that is being opened."""
NEEDED_FOR: Final = 10.0
"""Seconds after which connections that were not used at once any more are closed, all but one."""


class _WithRoom:
    """What is known of the room for connections, whichever pool they come from."""

    def __init__(self, engine: AsyncEngine, dialect: Dialect) -> None:
        self._engine = engine
        self._room = Room(dialect, url_of(engine))

    @property
    def are_short(self) -> bool:
        """Whether the database has refused a connection for want of room a short time ago."""
        return self._room.is_short

    def refusal(self, *, within: float) -> str | None:
        """Return the reason for which the database refused a connection, if it did so in the last seconds."""
        return self._room.refusal(within=within)

    def calling_when_short(self, callback: Callable[[], None]) -> AbstractContextManager[None]:
        """Return a context in which a callback is called when the database refuses a connection for want of room."""
        return self._room.calling(callback)


class Connections(_WithRoom):
    """The connections of one process for its queries.

    A call that finds none free waits for the first that comes free, in line with others. One more is opened when that
    takes longer than `GROW_AFTER`. When the database refuses one for want of room no call fails: it waits for one that
    is open, or for room. The caller bounds its wait.

    Args:
        engine: Engine that opens them, without a pool.
        dialect: Dialect of the database.
        most: Number of connections at most.
    """

    def __init__(self, engine: AsyncEngine, dialect: Dialect, *, most: int) -> None:
        super().__init__(engine, dialect)
        self._most = most
        self._opened: dict[AsyncConnection, float] = {}
        """When each was opened: those in use, idle, or being closed."""
        self._closing = 0
        self._idle: list[AsyncConnection] = []
        self._waiting: deque[asyncio.Future[AsyncConnection]] = deque()
        self._opening: asyncio.Task[None] | None = None
        self._dropping: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._broken_at = -math.inf
        self._peak = self._peak_before = 0
        """Most connections in use at once, in this period of `NEEDED_FOR` and in the one before."""
        self._period_ends = -math.inf

    @property
    def in_use(self) -> int:
        """Number of connections that calls have taken."""
        return self._kept - len(self._idle)

    @property
    def idle(self) -> Collection[AsyncConnection]:
        """Connections that are open, and that no call uses."""
        return self._idle

    @property
    def wanted(self) -> bool:
        """Whether calls wait for one, so that a call that can do so gives its own back."""
        return bool(self._waiting)

    def take_idle(self) -> AsyncConnection | None:
        """Return a connection as `take` does, if one is idle."""
        if not self._idle:
            return None
        connection = self._idle.pop()
        self._peak = max(self._peak, self.in_use)
        return connection

    async def take(self) -> AsyncConnection:
        """Return a connection, to be given back by `give_back` or `close`.

        Raises:
            Exception: None is open, and none could be opened, for another reason than want of room.
        """
        connection = self._idle.pop() if self._idle else await self._wait()
        self._peak = max(self._peak, self.in_use)
        return connection

    def give_back(self, connection: AsyncConnection) -> bool:
        """Keep a connection for other calls; return whether it is kept, and need not be closed."""
        if self._is_surplus(connection):
            return False
        self._hand_on(connection)
        return True

    async def close(self, connection: AsyncConnection, *, broken: bool) -> None:  # noqa: ARG002
        """Close a connection."""
        self._closing += 1
        try:
            # As a broken one: so SQLAlchemy ends one whose other end is silent, after two seconds and without a word.
            await _close(connection, broken=True)
        finally:
            self._closing -= 1
            self._opened.pop(connection, None)

    def note_break(self) -> list[AsyncConnection]:
        """Let no call use what was opened before now, because the database has ended a connection.

        Returns:
            Those that were idle, to be closed.
        """
        self._broken_at = asyncio.get_running_loop().time()
        idle, self._idle = self._idle, []
        return idle

    async def connect_beside(self) -> AsyncConnection:
        """Return a connection that does not count, and that its caller closes, if the database has room for another.

        That other one is left to the queries of this process or of others.
        """
        connection = await self._engine.connect()
        try:
            await (await self._engine.connect()).close()
        except BaseException:
            with contextlib.suppress(Exception):
                await connection.invalidate()
            await connection.close()
            raise
        return connection

    async def close_beside(self, connection: AsyncConnection) -> None:
        """Close a connection of `connect_beside`."""
        await _close(connection, broken=True)

    async def aclose(self, *, timeout: float) -> None:
        """Close the connections that are idle. All calls must have ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (opening := self._opening) is not None:
            # No call waits for it any more, and its other end may be silent.
            _, silent = await asyncio.wait({opening}, timeout=STOPS_OPENING_AFTER)
            if silent:
                opening.cancel()
                await asyncio.wait(silent, timeout=STOPS_OPENING_AFTER)
            self._opening = None
        idle, self._idle = self._idle, []
        if tasks := {spawn(self.close(connection, broken=False)) for connection in idle}:
            _, silent = await asyncio.wait(tasks, timeout=timeout)
            # To close a connection whose other end is silent never ends. Cancelled, it is dropped.
            for task in silent:
                task.cancel()
            if silent:
                await asyncio.wait(silent, timeout=0.1)
        self._forget()

    def abandon(self) -> None:
        """Drop all connections without a word to the database, because the event loop that they belong to is closed."""
        for connection in self._opened:
            if connection.sync_connection is not None:
                with contextlib.suppress(Exception):
                    connection.sync_connection.detach()
        self._idle.clear()
        self._waiting.clear()
        self._dropping.clear()
        self._opening = self._timer = None
        self._closing = 0
        self._forget()

    def _forget(self) -> None:
        self._opened.clear()
        self._broken_at = self._period_ends = -math.inf
        self._room.forget()

    @property
    def _kept(self) -> int:
        return len(self._opened) - self._closing

    async def _wait(self) -> AsyncConnection:
        future: asyncio.Future[AsyncConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._grow()
        try:
            return await future
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._waiting.remove(future)
            if not future.cancelled() and future.exception() is None and not self.give_back(future.result()):
                dropping = spawn(self.close(future.result(), broken=True))
                self._dropping.add(dropping)
                dropping.add_done_callback(self._dropping.discard)
            raise

    def _hand_on(self, connection: AsyncConnection) -> None:
        if (future := self._next()) is None:
            self._idle.append(connection)
        else:
            future.set_result(connection)

    def _next(self) -> asyncio.Future[AsyncConnection] | None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                return future
        return None

    def _grow(self, *, at_once: bool = False) -> None:
        """Open a connection for the calls that wait, now or later."""
        if self._timer is not None or self._opening is not None or not self._waiting:
            return
        pause = self._room.pause if self._room.is_short else GROW_AFTER if self._opened and not at_once else 0.0
        if pause > 0 or len(self._opened) >= self._most:
            self._timer = asyncio.get_running_loop().call_later(max(pause, GROW_AFTER), self._grow_now)
        else:
            self._opening = spawn(self._open())

    def _grow_now(self) -> None:
        self._timer = None
        self._grow(at_once=True)

    async def _open(self) -> None:
        """Open a connection, in a task of its own, because what the call that wants it needs may come free earlier."""
        loop = asyncio.get_running_loop()
        failed = True
        try:
            connection = await self._engine.connect()
            failed = False
        except Exception as error:
            if not self._room.is_wanting(error, others=len(self._opened)) and (future := self._next()) is not None:
                future.set_exception(error)
        finally:
            self._opening = None
            if not failed:
                self._opened[connection] = loop.time()
                self._room.note_opened()
                self._hand_on(connection)
            self._grow(at_once=failed)

    def _is_surplus(self, connection: AsyncConnection) -> bool:
        """Return whether a connection that comes back should be closed."""
        now = asyncio.get_running_loop().time()
        opened_at = self._opened.get(connection, -math.inf)
        if opened_at <= self._broken_at:
            return True
        if now >= self._period_ends:
            self._peak_before, self._peak = self._peak, self.in_use
            self._period_ends = now + NEEDED_FOR
        if self._room.is_short:
            return self._kept > 1 and (not self._waiting or now - opened_at > GROW_AGAIN)
        return self._kept > max(self._peak, self._peak_before)


class PoolOfEngine(_WithRoom):
    """The same in front of an engine with a pool of its own, which the application may use as well.

    Its pool says how many there are. Only a connection that the database refuses for want of room is waited for here.
    """

    def __init__(self, engine: AsyncEngine, dialect: Dialect) -> None:
        super().__init__(engine, dialect)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_use = 0

    wanted = False
    idle: Collection[AsyncConnection] = ()

    def take_idle(self) -> None:
        return

    async def take(self) -> AsyncConnection:
        while True:
            try:
                connection = await self._engine.connect()
            except Exception as error:
                if not self._room.is_wanting(error, others=self.in_use):
                    raise
            else:
                self.in_use += 1
                return connection
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            try:
                async with asyncio.timeout(RETRY):
                    await future
            except TimeoutError:
                pass
            finally:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(future)

    def give_back(self, connection: AsyncConnection) -> bool:  # noqa: ARG002
        return False

    async def close(self, connection: AsyncConnection, *, broken: bool) -> None:
        """Give a connection back to the pool, or close it when it is broken."""
        try:
            await _close(connection, broken=broken)
        finally:
            self.in_use -= 1
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_result(None)
                    break

    def note_break(self) -> list[AsyncConnection]:
        return []

    async def connect_beside(self) -> AsyncConnection:
        """Take a connection out of the pool, which no longer counts it, and has room for another."""
        pool = self._engine.pool
        # Beside another one: the pool keeps that one where the database takes no more connections.
        held = await self.take() if isinstance(pool, QueuePool) and pool.size() > 1 else None
        try:
            connection = await self._working()
            await connection.run_sync(sa.Connection.detach)
            return connection
        finally:
            if held is not None:
                await self.close(held, broken=False)

    async def _working(self) -> AsyncConnection:
        connection = await self._engine.connect()
        try:
            await connection.exec_driver_sql("SELECT 1")
        except BaseException as error:
            await _close(connection, broken=True)
            if not isinstance(error, Exception):
                raise
            # When SQLAlchemy meets a broken connection, its pool drops all that are as old: the next one is new.
            return await self._engine.connect()
        return connection

    async def close_beside(self, connection: AsyncConnection) -> None:
        await connection.close()

    async def aclose(self, *, timeout: float) -> None:  # noqa: ARG002
        self._room.forget()

    def abandon(self) -> None:
        self._waiting.clear()
        self.in_use = 0
        self._room.forget()


async def _close(connection: AsyncConnection, *, broken: bool) -> None:
    # The error of a broken connection was raised where it was used.
    with contextlib.suppress(Exception):
        if broken and not connection.closed:
            await connection.invalidate()
    with contextlib.suppress(Exception):
        await connection.close()


def spawn(coroutine: Coroutine[object, object, _T]) -> asyncio.Task[_T]:
    """Start a task that belongs to no request: it inherits no context variables."""
    return asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
