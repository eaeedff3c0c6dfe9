"""Changes that other instances made to sessions of this one: found by polling, and sooner by notifications."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from mcp_session_store.adapter.background import Wake
from mcp_session_store.adapter.clock import now
from mcp_session_store.retention import MIN_TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from datetime import datetime
    from uuid import UUID

    from mcp_session_store.records import Change
    from mcp_session_store.store import SessionStore

__all__ = ["ChangeWatch"]

logger = logging.getLogger(__name__)

JUMP: Final = 1.0
"""Seconds that the store's clock is put forward at most without all sessions in memory being verified."""
TICKS: Final = 4
"""Number of times within `end_within` that the watch notes that this process runs."""
BREAK: Final = 30.0
"""Seconds without a poll, or twice `end_within` where that is more, that are an outage or a pause."""
GATHERING: Final = 0.02
"""Seconds in which notifications gather before the store is asked."""
LONGEST_GAP: Final = MIN_TOMBSTONE.total_seconds() / 2
"""Seconds between two polls after which the tombstone of a session that ended meanwhile may be purged."""


class ChangeWatch:
    """Polls the store for changes: one query for all sessions, however many there are.

    A process that was paused, as by SIGSTOP or with its host, cannot know what ended meanwhile. So it notes that it
    runs, several times within `within`. A request that finds the last of these moments too long ago looks its session
    up in the store first, and so do all until a poll has succeeded that began after the pause. The same holds where no
    poll has succeeded for `unverified_for`.

    When the store's clock is put forward sessions expire at once, which no instance can foresee. So the time that each
    poll returns is compared with this process's clock, and after a jump all sessions in memory are verified.

    Args:
        store: The store that keeps the sessions.
        concerns: Returns whether the session with a key is resident or being restored.
        learn: Called with each change of such a session; the same change may come again.
        verify: Called when changes may have been missed: after an outage, at the first poll, and when the store's clock
            was put forward.
        within: Seconds after which copies are verified that could not be meanwhile, because the process was paused.
        unverified_for: Seconds for which copies are served while the store cannot be asked; `None`: for ever.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        concerns: Callable[[UUID], bool],
        learn: Callable[[Change], None],
        verify: Callable[[], Awaitable[None]],
        within: float = math.inf,
        unverified_for: float | None = None,
    ) -> None:
        self._store = store
        self._concerns = concerns
        self._learn = learn
        self._verify = verify
        self._within = within
        self._unverified_for = math.inf if unverified_for is None else unverified_for
        self._since: datetime | None = None
        self._offset = math.inf
        """Seconds of the store's clock before this process's, at most, when all was last verified."""
        self._ticked_at = self._polled_at = now()
        self._resumed_at = -math.inf
        """When the process was last found to have been paused."""
        self.verified_until = self._ticked_at + within
        """Moment, by `clock`, up to which a copy is served without a look into the store."""
        self.steady_since = self._ticked_at
        """Moment, by `clock`, since which this process runs and reaches the store without a long break."""
        self.wake: Final = Wake(gathering=GATHERING)

    @property
    def verified(self) -> bool:
        """Whether a copy is served now without a look into the store."""
        return now() <= self.verified_until

    async def tick(self) -> None:
        """Note that the process runs, or that it was paused."""
        self._tick()

    def _tick(self) -> None:
        moment = now()
        if moment - self._ticked_at > self._within:
            logger.info(
                "this process did not run for %.1f s, and verifies each session in its memory before it is served",
                moment - self._ticked_at,
            )
            self._resumed_at = moment
            self.wake.set()
        self._ticked_at = moment
        if self._polled_at < self._resumed_at:
            self.verified_until = -math.inf
        else:
            self.verified_until = min(moment + self._within, self._polled_at + self._unverified_for)

    async def poll(self) -> None:
        """Ask the store once."""
        began = now()
        found = await self._store.changes(self._since)
        for change in found.changes:
            if self._concerns(change.key):
                self._learn(change)
        if self._since is None or began - self._polled_at > LONGEST_GAP or self._is_ahead(found.until, began):
            # If it fails, so does this: the next poll begins where this one did.
            await self._verify()
            self._offset = found.until.timestamp() - began
        self._since = found.until
        # The answer may have been on its way before a pause.
        self._tick()
        if began - self._polled_at > max(BREAK, 2 * self._within):
            self.steady_since = began
        self._polled_at = began
        self._tick()

    def _is_ahead(self, store_time: datetime, began: float) -> bool:
        """Return whether the store's clock was put forward since all was last verified.

        Args:
            store_time: Time that a poll returned.
            began: When the poll began.
        """
        time = store_time.timestamp()
        if time - now() > self._offset + JUMP:
            return True
        # Put back, or drifting: nothing expires early by that.
        self._offset = min(self._offset, time - began)
        return False

    async def listen(self) -> None:
        """Poll as soon as the store notifies of a change that concerns this instance."""
        await self._store.listen(self._on_notification)

    def _on_notification(self, keys: Collection[UUID] | None) -> None:
        if keys is None or any(map(self._concerns, keys)):
            self.wake.set()
