"""Whether the event log is tried for the sake of an event."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcp_session_store.adapter.streams.backlog import Backlog

__all__ = ["Circuit"]

logger = logging.getLogger(__name__)


class Circuit:
    """Open while no event waits for the log: from a failure until a background task has stored one.

    Open at first: until this instance has stored a heartbeat, others would consider it dead, and its calls lost.
    """

    __slots__ = ("_reported", "in_doubt", "is_open")

    def __init__(self) -> None:
        self.is_open = True
        self.in_doubt = False
        """Whether a large event was not stored, which may be due to its size alone: the background task finds out."""
        self._reported = False

    def open(self, error: Exception) -> None:
        self.is_open = True
        if not self._reported:
            self._reported = True
            logger.warning("events cannot be stored for now, and go out without ids: %s", error)

    def close(self, backlog: Backlog) -> None:
        self.is_open = self.in_doubt = False
        if self._reported:
            self._reported = False
            logger.info("events can be stored again; %d sessions have a backlog", len(backlog.sessions))
