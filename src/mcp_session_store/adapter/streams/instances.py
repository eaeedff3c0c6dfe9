"""Heartbeats: this instance stores its own, and finds out from those of others which of them are dead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio

from mcp_session_store.adapter.streams.calls import INSTANCE_NAME
from mcp_session_store.records import instance_name

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import timedelta

    from mcp_session_store.event_log import EventLog

__all__ = ["Instances"]


class Instances:
    """This instance and the others that store events in the same log.

    Args:
        log: Log that holds the heartbeats.
        instance: Id of this instance.
        dead_after: Time without a heartbeat after which an instance is considered dead and its calls lost.
    """

    def __init__(self, log: EventLog, *, instance: str, dead_after: timedelta) -> None:
        self._log = log
        self._dead_after = dead_after
        self.reliable_since = math.inf
        """Since when our own heartbeats have succeeded, by anyio's clock: before, those of others may have failed.
        Infinite while the last one is not stored."""
        self.id = instance
        self.name = instance_name(instance)
        """Unique part of the id, with which the names of this instance's streams begin."""

    @property
    def check_interval(self) -> float:
        """Seconds between two checks of other instances, at least."""
        return self._dead_after.total_seconds() / 10

    async def beat(self) -> None:
        """Store a heartbeat of this instance.

        Raises:
            SessionStoreError: The log cannot be reached.
        """
        try:
            await self._log.beat(self.id)
        except BaseException:
            self.reliable_since = math.inf
            raise
        self.reliable_since = min(self.reliable_since, anyio.current_time())

    async def retire(self) -> None:
        """Store that this instance has stopped, so that its calls are lost at once."""
        await self._log.retire(self.id)

    async def find_dead(self, names: Collection[str]) -> list[str]:
        """Return which of these instances are dead.

        Args:
            names: Names of other instances.
        """
        # A log refuses all of them for one name that no instance can have, such as one with a NUL.
        beats = await self._log.last_beats([name for name in names if INSTANCE_NAME.fullmatch(name)])
        # After an outage of the database no heartbeat is young, and all instances run. A stopped one has none.
        is_certain = anyio.current_time() - self.reliable_since > self._dead_after.total_seconds()
        return [name for name in names if name not in beats or (is_certain and beats[name] > self._dead_after)]
