"""An event that costs next to nothing until a task has to wait for it."""

from __future__ import annotations

import anyio

__all__ = ["Latch"]


class Latch:
    """`anyio.Event`, made when it is first waited for.

    A session has several, and most are set before a task waits for them. `anyio.Event` looks up its
    backend when it is made, which shows in what a handshake costs.
    """

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: anyio.Event | None = None

    def is_set(self) -> bool:
        """Return whether the event happened."""
        return self._is_set

    def set(self) -> None:
        """Note that the event happened, and let the tasks go on that wait for it."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Wait until the event happens; return at once when it has."""
        if self._is_set:
            return
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()
