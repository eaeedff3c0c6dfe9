"""The one connection that listens to a database, and holds the locks of instances."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final
from uuid import UUID

from mcp_session_store.errors import StoreClosed, StoreUnavailable
from mcp_session_store.sql.database import spawn
from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.failures import error_of_one_call, failure_kind, summary_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.database import Attempt, Database

__all__ = ["PROBE_CHANNEL", "PROBE_TIMEOUT", "Listening", "Subscription"]

logger = logging.getLogger(__name__)

PROBE_CHANNEL: Final = NotificationChannel("mcp_session_probe")
"""Channel on which a connection hears only whether notifications arrive on it."""

HEARTBEAT: Final = 20.0
"""Seconds of silence after which a statement shows whether the listening connection still works."""
PROBE_TIMEOUT: Final = 3.0
"""Seconds within which the listener's own probe must arrive."""
DEAF_FOR: Final = (300.0, 600.0)
"""Least and most seconds until listening is tried again on a database through which no notifications arrive."""
WITHOUT_FOR: Final = (30.0, 60.0)
"""Least and most seconds until listening is tried again on a database that has no room for a connection more."""


@dataclass(eq=False, slots=True)
class Subscription:
    """One call of `listen`."""

    channel: NotificationChannel
    on_hint: Callable[[Collection[UUID] | None], None]
    name: str | None
    """Unique part of the id of the instance whose lock is to be held."""
    on_held: Callable[[], None] | None
    ended: asyncio.Future[Exception]
    """Error with which the call ends."""
    hears: bool = False
    """Whether its notifications arrive now."""
    held: bool = False
    """Whether the lock is held now."""
    task: asyncio.Task[None] | None = None
    """Task that holds the lock, where the database has no notifications."""

    def hold(self) -> None:
        self.held = True
        if self.on_held is not None:
            self._call(self.on_held)

    def begin(self) -> None:
        self.hears = True
        self.hint(None)  # because there may have been changes before it listened

    def hint(self, keys: Collection[UUID] | None) -> None:
        self._call(partial(self.on_hint, keys))

    def stop(self) -> None:
        self.hears = self.held = False

    def end(self, error: Exception) -> None:
        self.stop()
        if not self.ended.done():
            self.ended.set_result(error)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:  # raised by the call whose callback this is, and by no other
            self.end(error)


@dataclass(eq=False, slots=True)
class _Run:
    """One try to listen, with its connection."""

    woken: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the subscriptions change, and when the connection is lost."""
    lost: bool = False
    """Whether the connection is lost or must be given up."""
    task: asyncio.Task[None] | None = None
    channels: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    """Channels that the connection listens to, by name, with what ends that."""
    locks: dict[str, bool] = field(default_factory=dict)
    """Instances whose locks were tried, and whether each is held."""
    begun: set[Subscription] = field(default_factory=set)
    """Subscriptions that hear."""

    def lose(self) -> None:
        self.lost = True
        self.woken.set()


class Listening:
    """Hears all notifications that are wanted of one database, on one connection.

    The first subscription opens the connection, beside those for queries, which come first: where the database has no
    room for one more after it, or refuses one for queries later, listening goes without. The last subscription closes
    it. Between them, one task has it listen to the channels that are wanted, and hold the locks of the instances, one
    statement at a time. A lost connection ends all subscriptions.

    Where the database has no notifications, no connection is taken.

    Args:
        database: Database to listen to.
        heartbeat: See `HEARTBEAT`.
        probe_timeout: See `PROBE_TIMEOUT`.
        deaf_for: See `DEAF_FOR`.
        without_for: See `WITHOUT_FOR`.
    """

    def __init__(
        self,
        database: Database,
        *,
        heartbeat: float = HEARTBEAT,
        probe_timeout: float = PROBE_TIMEOUT,
        deaf_for: tuple[float, float] = DEAF_FOR,
        without_for: tuple[float, float] = WITHOUT_FOR,
    ) -> None:
        self.database: Final = database
        self._heartbeat = heartbeat
        self._probe_timeout = probe_timeout
        self._deaf_for = deaf_for
        self._without_for = without_for
        self._logged_without = False
        self._subscriptions: set[Subscription] = set()
        self._run: _Run | None = None
        self.tasks: Final[set[asyncio.Task[None]]] = set()
        """Tasks that listen or hold a lock, and those that are about to end."""

    def subscribe(self, subscription: Subscription) -> None:
        """Begin to hear for a subscription, and to hold the lock of its instance."""
        self._subscriptions.add(subscription)
        if not self.database.supports_listen:
            if subscription.name is not None:
                subscription.task = self._spawn(self._hold(subscription, subscription.name))
        elif self._run is None:
            run = self._run = _Run()
            run.task = self._spawn(self._listen(run))
        else:
            self._run.woken.set()

    def unsubscribe(self, subscription: Subscription) -> asyncio.Task[None] | None:
        """Hear no more for a subscription; return the task that ends therefore, if one does."""
        subscription.stop()
        self._subscriptions.discard(subscription)
        task, run = subscription.task, self._run
        subscription.task = None
        if run is not None:
            if self._subscriptions:
                run.woken.set()
            else:
                self._run, task = None, run.task
        if task is not None:
            task.cancel()
        return task

    async def end(self, subscriptions: Collection[Subscription]) -> None:
        """End subscriptions, because what made them is closed."""
        ending = set()
        for subscription in tuple(subscriptions):
            subscription.end(_closed())
            if (task := self.unsubscribe(subscription)) is not None and not task.done():
                ending.add(task)
        if ending:
            await asyncio.wait(ending, timeout=self.database.timeout)

    async def aclose(self) -> None:
        """End all subscriptions, because the database is closed."""
        await self.end(self._subscriptions)
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=self.database.timeout)

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        # A task of its own: however the caller is cancelled, it closes its connection in peace.
        task = spawn(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _hold(self, subscription: Subscription, name: str) -> None:
        """Hold the lock of an instance where no connection can."""
        try:
            async with self.database.lease(writes=False) as lease:
                lock = await lease.run(lambda attempt: self.database.dialect.lock_of_process(attempt.connection, name))
            with lock as locked:
                if locked:
                    subscription.hold()
                await asyncio.Event().wait()
        except Exception as error:  # raised by the call that listens
            subscription.end(error)
        except asyncio.CancelledError:
            subscription.end(_closed())
            raise

    async def _listen(self, run: _Run) -> None:
        try:
            await self._listen_until_lost(run)
        except Exception as error:  # raised by each call that listens
            self._fail(run, error)
        except asyncio.CancelledError:
            self._fail(run, _closed())  # where the event loop is stopped: otherwise there are no subscriptions
            raise

    def _fail(self, run: _Run, error: Exception) -> None:
        if self._run is run:
            self._run = None
            for subscription in self._subscriptions:
                subscription.end(error_of_one_call(error))
            self._subscriptions.clear()

    async def _listen_until_lost(self, run: _Run) -> None:
        while True:
            while self.database.connections.are_short:  # noqa: ASYNC110 - nothing sets an event when that is over
                await asyncio.sleep(random.uniform(*self._without_for))  # noqa: S311
            try:
                await self._listen_on_a_connection(run)
                reason, pause = "they are lost on the way, as behind PgBouncer in transaction mode", self._deaf_for
            except Exception as error:
                failure = self.database.translate(error)
                if failure_kind(error, self.database.dialect) is not FailureKind.NO_ROOM:
                    if failure is error:
                        raise
                    raise failure from error
                reason, pause = summary_of(error, self.database.dialect), self._without_for
            if not self._logged_without:
                self._logged_without = True
                logger.info(
                    "notifications of changes do not arrive from the database %s, and changes are found by polling: %s",
                    self.database.shown_url,
                    reason,
                )
            await asyncio.sleep(random.uniform(*pause))  # noqa: S311

    async def _listen_on_a_connection(self, run: _Run) -> None:
        """Listen until the connection is lost or given up, or return when notifications do not arrive on it."""
        run.lost = False
        connection: AsyncConnection | None = None
        try:
            connection = await self._connect()
            if not await self._notifications_arrive(connection, run):
                if run.lost:
                    raise self._is_lost()
                return
            with self.database.connections.calling_when_short(run.lose):
                while not run.lost:
                    run.woken.clear()
                    await self._settle(connection, run)
                    try:
                        async with asyncio.timeout(self._heartbeat):
                            await run.woken.wait()
                    except TimeoutError:
                        async with asyncio.timeout(self.database.timeout):
                            await connection.exec_driver_sql("SELECT 1")
            if self.database.connections.are_short:
                raise StoreUnavailable(
                    f"the database {self.database.shown_url} has no room for a connection that listens for changes, "
                    "because one for queries was refused; changes are found by polling meanwhile"
                )
            raise self._is_lost()
        finally:
            for subscription in run.begun:
                subscription.stop()
            run.begun.clear()
            run.channels.clear()
            run.locks.clear()
            if connection is not None:
                self._close(connection)

    async def _connect(self) -> AsyncConnection:
        """Return a connection beside those for queries, of which one is open before: requests come first."""
        async with self.database.lease(writes=False) as lease:
            await lease.run(_answers)
        async with asyncio.timeout(self.database.timeout):
            return await self.database.connections.connect_beside()

    async def _notifications_arrive(self, connection: AsyncConnection, run: _Run) -> bool:
        """Return whether a probe from another connection arrives: a pooler may accept LISTEN and forward nothing."""
        arrived, probe = asyncio.Event(), str(uuid.uuid4())

        def receive(payload: str) -> None:
            if payload == probe:
                arrived.set()

        async with asyncio.timeout(self.database.timeout):
            stop = await PROBE_CHANNEL.listen(connection, on_payload=receive, on_loss=run.lose)
        async with self.database.lease(writes=False) as lease:
            await lease.run(lambda attempt: attempt.connection.execute(PROBE_CHANNEL.send, {"payload": probe}))
        try:
            async with asyncio.timeout(self._probe_timeout):
                await arrived.wait()
        except TimeoutError:
            return False
        async with asyncio.timeout(self.database.timeout):
            await stop()
        return True

    async def _settle(self, connection: AsyncConnection, run: _Run) -> None:
        """Have the connection listen to what is wanted, and hold the locks that are, one statement at a time.

        No lock is taken before the probe has arrived, because one that a pooler takes stays on a connection of the
        server, which it lends to others.
        """
        dialect = self.database.dialect
        while True:
            self._begin(run)
            wanted = {one.channel.name: one.channel for one in self._subscriptions}
            names = {one.name for one in self._subscriptions if one.name is not None}
            async with asyncio.timeout(self.database.timeout):
                if missing := wanted.keys() - run.channels.keys():
                    channel = wanted[missing.pop()]
                    run.channels[channel.name] = await channel.listen(
                        connection, on_payload=partial(self._pass_on, run, channel), on_loss=run.lose
                    )
                elif unlocked := names - run.locks.keys():
                    name = unlocked.pop()
                    run.locks[name] = await dialect.lock_on_connection(connection, name)
                elif unwanted := run.channels.keys() - wanted.keys():
                    await run.channels.pop(unwanted.pop())()
                elif locked := run.locks.keys() - names:
                    name = locked.pop()
                    if run.locks.pop(name):
                        await dialect.unlock_on_connection(connection, name)
                else:
                    return

    def _begin(self, run: _Run) -> None:
        """Begin with the subscriptions that have all that they want."""
        for subscription in self._subscriptions - run.begun:
            name = subscription.name
            if subscription.channel.name in run.channels and (name is None or name in run.locks):
                run.begun.add(subscription)
                if name is not None and run.locks[name]:
                    subscription.hold()
                subscription.begin()
        run.begun &= self._subscriptions

    def _pass_on(self, run: _Run, channel: NotificationChannel, payload: str) -> None:
        keys = _keys(payload)
        for subscription in run.begun & self._subscriptions:
            if subscription.channel.name == channel.name:
                subscription.hint(keys)

    def _is_lost(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the connection to the database {self.database.shown_url} that listens for changes is lost"
        )

    async def _end(self, connection: AsyncConnection) -> None:
        # Its error was raised where it was used. A connection whose other end is silent is dropped.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self.database.timeout):
                await self.database.connections.close_beside(connection)

    def _close(self, connection: AsyncConnection) -> None:
        # In a task of its own, which the end of the database waits for.
        task = spawn(self._end(connection))
        self.database.closing.add(task)
        task.add_done_callback(self.database.closing.discard)


def _keys(payload: str) -> list[UUID] | None:
    if payload == NotificationChannel.ANY:
        return None
    try:
        return [UUID(key) for key in payload.split(",")]
    except ValueError:
        return None  # not a payload of this package: to look for changes is never wrong


def _closed() -> StoreClosed:
    return StoreClosed("the session store was closed")


async def _answers(attempt: Attempt) -> None:
    await attempt.connection.exec_driver_sql("SELECT 1")
