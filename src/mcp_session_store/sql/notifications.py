"""Hints of changes as they come: one connection that listens, as long as it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from typing import TYPE_CHECKING, Final
from uuid import UUID

import sqlalchemy as sa

from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.sql.database import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.database import Database
    from mcp_session_store.sql.dialects.channel import HintChannel

__all__ = ["Listener"]

logger = logging.getLogger(__name__)

HEARTBEAT: Final = 20.0
"""Seconds after which a connection that says nothing is asked whether it lives."""
PROBE_TIMEOUT: Final = 3.0
"""Seconds within which a hint that we send ourselves must arrive."""
DEAF_FOR: Final = (300.0, 600.0)
"""Between how many seconds a database through which no hints arrive is left alone before it is tried again."""

_PROBE: Final = "?"
"""What the payload of a hint begins with that is sent only to see whether it arrives."""


class Listener:
    """Passes on the hints that a database sends.

    It takes a connection out of the engine's pool, for itself: the pool makes another in its place.

    Args:
        database: Where to listen.
        channel: On which; `None`: the database has none.
        heartbeat: Seconds after which a silent connection is asked whether it lives.
        probe_timeout: Seconds within which a hint of ours must arrive.
        deaf_for: Between how many seconds to wait when none does.
    """

    def __init__(
        self,
        database: Database,
        channel: HintChannel | None,
        *,
        heartbeat: float = HEARTBEAT,
        probe_timeout: float = PROBE_TIMEOUT,
        deaf_for: tuple[float, float] = DEAF_FOR,
    ) -> None:
        self._database = database
        self._channel = channel if database.hears else None
        self._heartbeat = heartbeat
        self._probe_timeout = probe_timeout
        self._deaf_for = deaf_for
        self._told_deaf = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        """See `SessionStore.listen`."""
        self._database.bind()
        # A task of its own: however its caller is cancelled, it closes its connection in peace.
        task = spawn(self._listen(on_hint))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        if task.cancelled():
            raise StoreUnavailable("the session store was closed")
        task.result()

    async def aclose(self) -> None:
        """End all who listen."""
        if tasks := set(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=self._database.timeout)

    async def _listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        channel = self._channel
        if channel is None:
            await asyncio.Event().wait()
            return
        while True:
            try:
                await self._listen_on_a_connection(channel, on_hint)
            except Exception as error:
                failure = self._database.ours(error)
                if failure is error:
                    raise
                raise failure from error
            if not self._told_deaf:
                self._told_deaf = True
                logger.info(
                    "hints of changes do not arrive from the database %s, as behind PgBouncer in transaction mode; "
                    "changes are found by polling",
                    self._database.shown_url,
                )
            await asyncio.sleep(random.uniform(*self._deaf_for))  # noqa: S311

    async def _listen_on_a_connection(
        self, channel: HintChannel, on_hint: Callable[[Collection[UUID] | None], None]
    ) -> None:
        """Listen until the connection is lost, or return when hints do not arrive on it."""
        lost, arrived = asyncio.Event(), asyncio.Event()
        probe = f"{_PROBE}{uuid.uuid4()}"

        def receive(payload: str) -> None:
            if payload == probe:
                arrived.set()
            elif not payload.startswith(_PROBE):
                on_hint(_keys(payload, channel))

        async with self._database.lease(writes=False) as lease:
            # It tries again where a connection of the pool is broken, and then the pool lets go of all of its age.
            await lease.run(lambda attempt: attempt.connection.exec_driver_sql("SELECT 1"))
        async with asyncio.timeout(self._database.timeout):
            connection = await self._database.autocommit.connect()
        try:
            # What happens to it from here on is no business of the pool, which has room for another.
            await connection.run_sync(sa.Connection.detach)
            async with asyncio.timeout(self._database.timeout):
                await channel.subscribe(connection, on_payload=receive, on_loss=lost.set)
            if not await self._hints_arrive(channel, probe, arrived):
                if lost.is_set():
                    raise self._is_lost()
                return
            on_hint(None)  # what changed while nobody listened
            while not lost.is_set():
                try:
                    async with asyncio.timeout(self._heartbeat):
                        await lost.wait()
                except TimeoutError:
                    async with asyncio.timeout(self._database.timeout):
                        await connection.exec_driver_sql("SELECT 1")
            raise self._is_lost()
        finally:
            self._close(connection)

    def _is_lost(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the connection to the database {self._database.shown_url} that listens for changes is lost"
        )

    async def _hints_arrive(self, channel: HintChannel, probe: str, arrived: asyncio.Event) -> bool:
        """Whether a hint arrives that another connection sends. A pooler may take LISTEN, and tell nothing."""
        async with self._database.lease(writes=False) as lease:
            await lease.run(lambda attempt: attempt.connection.execute(channel.send, {"payload": probe}))
        try:
            async with asyncio.timeout(self._probe_timeout):
                await arrived.wait()
        except TimeoutError:
            return False
        return True

    def _close(self, connection: AsyncConnection) -> None:
        # In a task of its own, that whoever closes the store waits for.
        task = spawn(_close(connection, self._database.timeout))
        self._database.returning.add(task)
        task.add_done_callback(self._database.returning.discard)


async def _close(connection: AsyncConnection, timeout: float) -> None:
    # What is wrong with it was said where it was used. A connection whose other end is silent is dropped.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(timeout):
            await connection.close()


def _keys(payload: str, channel: HintChannel) -> list[UUID] | None:
    if payload == channel.ANY:
        return None
    try:
        return [UUID(key) for key in payload.split(",")]
    except ValueError:
        return None  # not one of ours: whatever it is, to look is never wrong
