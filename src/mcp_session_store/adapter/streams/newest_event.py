"""What a copy of a session knows of the newest event in the session's log, without asking the log."""

from __future__ import annotations

import math
from typing import Final

from mcp_session_store.adapter import clock

__all__ = ["NewestEvent"]

KNOWN_FOR: Final = 60.0
"""Seconds for which the sequence that this copy stored or read last is the place before the first event of a new call.

Other instances store events meanwhile, and when the log is trimmed beyond that place, a reader elsewhere takes the
call's events for missing. Therefore the log is asked again.
"""


class NewestEvent:
    """The newest event of a session that this copy has heard of."""

    __slots__ = ("_known_at", "sequence")

    def __init__(self) -> None:
        self.sequence = 0
        """Its sequence."""
        self._known_at = -math.inf

    def note(self, sequence: int, known_at: float) -> None:
        """Note the sequence of the newest event at a moment, by `clock`."""
        # Not the highest of all, because the log may have been set back, as after a restored backup.
        self.sequence = sequence
        self._known_at = known_at

    def is_known(self, within: float) -> bool:
        """Return whether it was heard of within so many seconds, and within `KNOWN_FOR`."""
        return clock.now() - self._known_at < min(KNOWN_FOR, within)
