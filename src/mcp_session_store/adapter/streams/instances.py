"""Which instances are dead: by their heartbeats, and at once by the release of what each holds while it lives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter.background import Wake, report_failure
from mcp_session_store.adapter.streams.calls import INSTANCE_NAME
from mcp_session_store.records import instance_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from datetime import timedelta
    from uuid import UUID

    from mcp_session_store.event_log import EventLog

__all__ = ["MAX_PAUSE", "Instances"]

MAX_PAUSE: Final = 1.0
"""Most seconds between two tries to hold something, and to store that it is held or no longer is."""
LOOK: Final = 1.0
"""Seconds between two looks at other instances, at most."""
LOOK_AGAIN: Final = 0.2
"""Seconds between two looks while something is released."""
RELEASED_FOR: Final = 2.5
"""Seconds for which something is released that only a death releases. A connection breaks in a living instance, too,
which then stores a heartbeat within that time."""


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
        self._leaving = False
        self._looked_at = -math.inf
        self._released_for: dict[str, float] = {}
        """Seconds for which was seen that something is released, by the name of its instance."""
        self.wake: Final = Wake(gathering=0)
        """Starts a heartbeat before its time, because something is held now, or no longer is."""
        self.reliable_since = math.inf
        """Since when our own heartbeats have succeeded, by anyio's clock: before, those of others may have failed.
        Infinite while the last one is not stored."""
        self.id = instance
        self.name = instance_name(instance)
        """Unique part of the id, with which the names of this instance's streams begin."""

    @property
    def check_interval(self) -> float:
        """Seconds between two checks of other instances, at least."""
        return LOOK_AGAIN if self._released_for else min(self._dead_after.total_seconds() / 10, LOOK)

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        """Pass on the log's hints, and hold meanwhile what the death of this instance releases, until cancelled.

        Raises:
            SessionStoreError: Nothing is held any more.
        """
        try:
            await self._log.listen(on_hint, instance=self.id, on_held=self.wake.set)
        finally:
            # At once, because others take a release for a death unless a heartbeat follows.
            self.wake.set()

    async def leave(self) -> None:
        """Store that nothing is held any more, because the end of this instance's tasks releases it. Raises nothing.

        It is dead when it retires, after it has stored the last answers of its calls.
        """
        self._leaving = True
        try:
            await self.beat()
        except Exception as error:
            report_failure("heartbeat", error, namespace=self._log.namespace)

    async def beat(self) -> None:
        """Store a heartbeat of this instance.

        Raises:
            SessionStoreError: The log cannot be reached.
        """
        try:
            await self._log.beat(self.id, held=not self._leaving)
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
        released_for = self._note_released({name for name, beat in beats.items() if beat.released})
        return [
            name
            for name in names
            if (beat := beats.get(name)) is None
            or (is_certain and beat.ago > self._dead_after)
            or min(released_for.get(name, 0.0), beat.ago.total_seconds()) > RELEASED_FOR
        ]

    def _note_released(self, released: Collection[str]) -> dict[str, float]:
        """Note a look at other instances; return for how many seconds each has been seen to hold nothing any more."""
        now = anyio.current_time()
        passed, self._looked_at = now - self._looked_at, now
        # What was seen before a longer gap, as no client waited, may have been over since.
        before = self._released_for if passed <= RELEASED_FOR else {}
        # No longer than that, because nothing is known of a pause of this process, or of an outage.
        passed = min(passed, LOOK)
        self._released_for = {name: before[name] + passed if name in before else 0.0 for name in released}
        return self._released_for
