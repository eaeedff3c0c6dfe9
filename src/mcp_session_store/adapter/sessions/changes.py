"""Changes that other instances made to sessions of this one: found by polling, and sooner by notifications."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter.background import Wake
from mcp_session_store.retention import MIN_TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from datetime import datetime
    from uuid import UUID

    from mcp_session_store.records import Change
    from mcp_session_store.store import SessionStore

__all__ = ["ChangeWatch"]

GATHERING: Final = 0.02
"""Seconds in which notifications gather before the store is asked."""
LONGEST_GAP: Final = MIN_TOMBSTONE.total_seconds() / 2
"""Seconds between two polls after which the tombstone of a session that ended meanwhile may be purged."""


class ChangeWatch:
    """Polls the store for changes: one query for all sessions, however many there are.

    Args:
        store: The store that keeps the sessions.
        concerns: Returns whether the session with a key is resident or being restored.
        learn: Called with each change of such a session; the same change may come again.
        verify: Called when changes may have been missed: after an outage, and at the first poll.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        concerns: Callable[[UUID], bool],
        learn: Callable[[Change], None],
        verify: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._concerns = concerns
        self._learn = learn
        self._verify = verify
        self._since: datetime | None = None
        self._polled_at = anyio.current_time()
        self.wake: Final = Wake(gathering=GATHERING)

    async def poll(self) -> None:
        """Ask the store once."""
        now = anyio.current_time()
        found = await self._store.changes(self._since)
        for change in found.changes:
            if self._concerns(change.key):
                self._learn(change)
        if self._since is None or now - self._polled_at > LONGEST_GAP:
            # If it fails, so does this: the next poll begins where this one did.
            await self._verify()
        self._since = found.until
        self._polled_at = now

    async def listen(self) -> None:
        """Poll as soon as the store notifies of a change that concerns this instance."""
        await self._store.listen(self._on_notification)

    def _on_notification(self, keys: Collection[UUID] | None) -> None:
        if keys is None or any(map(self._concerns, keys)):
            self.wake.set()
