"""Room that a database has for connections: what is known of it, and when another connection may be tried."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from typing import TYPE_CHECKING, Final

from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.failures import failure_kind, hide_secrets, summary_of
from mcp_session_store.sql.shown import shown_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import URL

    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["GROW_AGAIN", "RETRY", "Room"]

logger = logging.getLogger(__name__)

SHORT_FOR: Final = 60.0
"""Seconds for which connections are short after the database refused one for want of room."""
GROW_AGAIN: Final = 1.0
"""Seconds between two tries to open one more connection while connections are short, and for which all but one are then
kept: other processes may have none."""
RETRY: Final = 0.2
"""Seconds between two tries to open a connection while this process has none."""


class Room:
    """What is known of the room that the database has for connections."""

    def __init__(self, dialect: Dialect, url: URL) -> None:
        self._dialect = dialect
        self._url = url
        self._refusal = ""
        self._refused_at = self._again_at = -math.inf
        self._callbacks: set[Callable[[], None]] = set()

    @property
    def is_short(self) -> bool:
        # The first, because it is asked after each statement, and a connection is rarely refused.
        return self._refused_at > -math.inf and asyncio.get_running_loop().time() - self._refused_at < SHORT_FOR

    @property
    def pause(self) -> float:
        """Seconds until another connection may be tried, while connections are short."""
        return self._again_at - asyncio.get_running_loop().time()

    def refusal(self, *, within: float) -> str | None:
        return self._refusal if asyncio.get_running_loop().time() - self._refused_at < within else None

    def is_wanting(self, error: Exception, *, others: int) -> bool:
        """Return whether a connection was refused for want of room, and note it.

        Args:
            error: Error of an attempt to connect.
            others: Number of connections that this process has.
        """
        if failure_kind(error, self._dialect) is not FailureKind.NO_ROOM:
            return False
        hide_secrets(error, self._url)
        self._refusal = summary_of(error, self._dialect)
        if not self.is_short:
            logger.warning(
                "the database %s refuses this process another connection; calls wait for one of the %d that it has, or "
                "for room: %s",
                shown_url(self._url),
                others,
                self._refusal,
            )
        self._refused_at = asyncio.get_running_loop().time()
        self._wait_before_next(GROW_AGAIN if others else RETRY)
        for callback in self._callbacks:
            callback()
        return True

    @contextlib.contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call a callback with each refusal while the context lasts."""
        self._callbacks.add(callback)
        try:
            yield
        finally:
            self._callbacks.discard(callback)

    def note_opened(self) -> None:
        """Note that the database had room."""
        self._wait_before_next(GROW_AGAIN)

    def forget(self) -> None:
        """Begin anew."""
        self._refused_at = self._again_at = -math.inf

    def _wait_before_next(self, seconds: float) -> None:
        jitter = random.uniform(0.75, 1.0)  # noqa: S311
        self._again_at = asyncio.get_running_loop().time() + seconds * jitter
