"""Turns: sessions, and the principals of sessions, share a log that serves one read at a time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.errors import StoreBusy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable

__all__ = ["Turns"]

PATIENCE: Final = 5.0
"""Seconds that a read waits for its turn at most; as a log itself, a read fails within seconds."""
MAX_WAITING: Final = 1000
"""Number of reads that may wait in one line."""


class Turns:
    """One read at a time of each session, and of each principal: the next of the same waits in a line of its own.

    A log serves reads in the order of their arrival. While each has only one there, all others have had a turn before
    it has the next, however many wait in its line.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, anyio.Lock] = {}
        """By the session or principal, while there is a read of it."""

    @asynccontextmanager
    async def take(self, *owners: Hashable) -> AsyncIterator[None]:
        """Wait for a turn, and have it within this context.

        Args:
            owners: Those whose lines the read goes through: first its session's, then that of the session's principal.

        Raises:
            StoreBusy: The turn did not come within seconds, or too many reads wait for theirs.
        """
        joined: list[Hashable] = []
        try:
            with anyio.move_on_after(PATIENCE) as patience:
                for owner in owners:
                    line = self._lines.get(owner)
                    if line is None:
                        line = self._lines[owner] = anyio.Lock(fast_acquire=True)
                    elif line.statistics().tasks_waiting >= MAX_WAITING:
                        raise StoreBusy(f"{MAX_WAITING} reads of one session or principal wait already; read later")
                    await line.acquire()
                    joined.append(owner)
            if patience.cancelled_caught:
                raise StoreBusy(f"reads of the same session or principal took {PATIENCE:g} s; read later")
            yield
        finally:
            for owner in reversed(joined):
                self._lines[owner].release()
            for owner in owners:
                if (of_owner := self._lines.get(owner)) is not None and not of_owner.locked():
                    del self._lines[owner]
