"""Listen for notifications of changes: hints, which may be late, duplicated or lost; and hold locks of instances."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from mcp_session_store.errors import StoreClosed, StoreUnavailable
from mcp_session_store.sql.database import spawn
from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.failures import failure_kind, summary_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.database import Attempt, Database

__all__ = ["EVENT_CHANNEL", "MAIL_CHANNELS", "SESSION_CHANNEL", "Listener"]

logger = logging.getLogger(__name__)

SESSION_CHANNEL: Final = NotificationChannel("mcp_session_change")
"""Channel for the ends of sessions and for their new revisions."""
EVENT_CHANNEL: Final = NotificationChannel("mcp_session_event")
"""Channel for the new events of sessions."""
MAIL_CHANNELS: Final = "mcp_session_mail_"
"""Name of the channels for new messages, each of which ends with the number of its only listener."""

HEARTBEAT: Final = 20.0
"""Seconds of silence after which a statement shows whether the listening connection still works."""
PROBE_TIMEOUT: Final = 3.0
"""Seconds within which the listener's own probe must arrive."""
DEAF_FOR: Final = (300.0, 600.0)
"""Least and most seconds until listening is tried again on a database through which no notifications arrive."""
WITHOUT_FOR: Final = (30.0, 60.0)
"""Least and most seconds until listening is tried again on a database that has no room for a connection more."""

_PROBE: Final = "?"
"""First character of a payload that only shows whether notifications arrive."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """An instance whose lock is held while it listens."""

    name: str
    on_held: Callable[[], None] | None


class Listener:
    """Passes on the notifications of one channel as hints.

    While it listens, it has a connection of its own, beside those for queries, which come first: where the database has
    no room for one more after it, or refuses one for queries later, it goes without. Where the database has no
    notifications, it waits without a connection.

    Args:
        database: Database to listen to.
        channel: Channel to listen on.
        heartbeat: See `HEARTBEAT`.
        probe_timeout: See `PROBE_TIMEOUT`.
        deaf_for: See `DEAF_FOR`.
        without_for: See `WITHOUT_FOR`.
    """

    def __init__(
        self,
        database: Database,
        channel: NotificationChannel,
        *,
        heartbeat: float = HEARTBEAT,
        probe_timeout: float = PROBE_TIMEOUT,
        deaf_for: tuple[float, float] = DEAF_FOR,
        without_for: tuple[float, float] = WITHOUT_FOR,
    ) -> None:
        self._database = database
        self.channel = channel
        self.hears = False
        """Whether notifications arrive now."""
        self._heartbeat = heartbeat
        self._probe_timeout = probe_timeout
        self._deaf_for = deaf_for
        self.held: Final[set[str]] = set()
        """Instances whose locks are held while it listens."""
        self._without_for = without_for
        self._logged_without = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(
        self,
        on_hint: Callable[[Collection[UUID] | None], None],
        *,
        instance: str | None = None,
        on_held: Callable[[], None] | None = None,
    ) -> None:
        """See `Mailbox.listen`; `instance` is the unique part of its id."""
        self._database.bind()
        # A task of its own: however its caller is cancelled, it closes its connection in peace.
        task = spawn(self._listen(on_hint, None if instance is None else _Holder(instance, on_held)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if task.cancelled():
            raise StoreClosed("the session store was closed")
        task.result()

    async def aclose(self) -> None:
        """End all calls of `listen`."""
        if tasks := set(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=self._database.timeout)

    async def _listen(self, on_hint: Callable[[Collection[UUID] | None], None], holder: _Holder | None) -> None:
        if not self._database.supports_listen:
            with await self._lock_of_process(holder) as locked, self._holding(holder, locked):
                await asyncio.Event().wait()
            return
        while True:
            while self._database.connections.are_short:  # noqa: ASYNC110 - nothing sets an event when that is over
                await asyncio.sleep(random.uniform(*self._without_for))  # noqa: S311
            try:
                await self._listen_on_a_connection(on_hint, holder)
                reason, pause = "they are lost on the way, as behind PgBouncer in transaction mode", self._deaf_for
            except Exception as error:
                failure = self._database.translate(error)
                if failure_kind(error, self._database.dialect) is not FailureKind.NO_ROOM:
                    if failure is error:
                        raise
                    raise failure from error
                reason, pause = summary_of(error, self._database.dialect), self._without_for
            if not self._logged_without:
                self._logged_without = True
                logger.info(
                    "notifications of changes do not arrive from the database %s, and changes are found by polling: %s",
                    self._database.shown_url,
                    reason,
                )
            await asyncio.sleep(random.uniform(*pause))  # noqa: S311

    async def _lock_of_process(self, holder: _Holder | None) -> AbstractContextManager[bool]:
        if holder is None:
            return contextlib.nullcontext(False)
        name = holder.name
        async with self._database.lease(writes=False) as lease:
            return await lease.run(lambda attempt: self._database.dialect.lock_of_process(attempt.connection, name))

    async def _listen_on_a_connection(
        self, on_hint: Callable[[Collection[UUID] | None], None], holder: _Holder | None
    ) -> None:
        """Listen until the connection is lost or given up, or return when notifications do not arrive on it."""
        lost, arrived = asyncio.Event(), asyncio.Event()
        probe = f"{_PROBE}{uuid.uuid4()}"

        def receive(payload: str) -> None:
            if payload == probe:
                arrived.set()
            elif not payload.startswith(_PROBE):
                on_hint(self._keys(payload))

        connection: AsyncConnection | None = None
        try:
            connection = await self._connect()
            async with asyncio.timeout(self._database.timeout):
                await self.channel.listen(connection, on_payload=receive, on_loss=lost.set)
            if not await self._notifications_arrive(probe, arrived):
                if lost.is_set():
                    raise self._is_lost()
                return
            # Not before: a lock that a pooler takes stays on a connection of the server, which it lends to others.
            async with asyncio.timeout(self._database.timeout):
                locked = holder is not None and await self._database.dialect.lock_on_connection(connection, holder.name)
            with self._holding(holder, locked), self._database.connections.calling_when_short(lost.set):
                self.hears = True
                on_hint(None)  # because sessions may have changed before it listened
                while not lost.is_set():
                    try:
                        async with asyncio.timeout(self._heartbeat):
                            await lost.wait()
                    except TimeoutError:
                        async with asyncio.timeout(self._database.timeout):
                            await connection.exec_driver_sql("SELECT 1")
            if self._database.connections.are_short:
                raise StoreUnavailable(
                    f"the database {self._database.shown_url} has no room for a connection that listens for changes, "
                    "because one for queries was refused; changes are found by polling meanwhile"
                )
            raise self._is_lost()
        finally:
            self.hears = False
            if connection is not None:
                self._close(connection)

    async def _connect(self) -> AsyncConnection:
        """Return a connection beside those for queries, of which one is open before: requests come first."""
        async with self._database.lease(writes=False) as lease:
            await lease.run(_answers)
        async with asyncio.timeout(self._database.timeout):
            return await self._database.connections.connect_beside()

    @contextlib.contextmanager
    def _holding(self, holder: _Holder | None, locked: bool) -> Iterator[None]:
        if holder is None or not locked:
            yield
            return
        self.held.add(holder.name)
        if holder.on_held is not None:
            holder.on_held()
        try:
            yield
        finally:
            self.held.discard(holder.name)

    def _is_lost(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the connection to the database {self._database.shown_url} that listens for changes is lost"
        )

    async def _notifications_arrive(self, probe: str, arrived: asyncio.Event) -> bool:
        """Return whether a probe from another connection arrives: a pooler may accept LISTEN and forward nothing."""
        async with self._database.lease(writes=False) as lease:
            await lease.run(lambda attempt: attempt.connection.execute(self.channel.send, {"payload": probe}))
        try:
            async with asyncio.timeout(self._probe_timeout):
                await arrived.wait()
        except TimeoutError:
            return False
        return True

    def _keys(self, payload: str) -> list[UUID] | None:
        if payload == self.channel.ANY:
            return None
        try:
            return [UUID(key) for key in payload.split(",")]
        except ValueError:
            return None  # not a payload of this package: to look for changes is never wrong

    async def _end(self, connection: AsyncConnection) -> None:
        # Its error was raised where it was used. A connection whose other end is silent is dropped.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._database.timeout):
                await self._database.connections.close_beside(connection)

    def _close(self, connection: AsyncConnection) -> None:
        # In a task of its own, which the end of the database waits for.
        task = spawn(self._end(connection))
        self._database.closing.add(task)
        task.add_done_callback(self._database.closing.discard)


async def _answers(attempt: Attempt) -> None:
    await attempt.connection.exec_driver_sql("SELECT 1")
