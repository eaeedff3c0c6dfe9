"""This instance's hold of a client's stream, which another instance may take over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcp_session_store.adapter.latch import Latch

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["Hold"]


class Hold:
    """Hold of the client's stream of a session, from a GET that opens it here until another GET does, on any instance.

    Args:
        key: Key of the session.
        opened_at: Moment, by `clock`, at which the stream was opened.
        before: The hold before, which this instance had of the same session.
    """

    __slots__ = (
        "before",
        "claimed",
        "claimed_at",
        "former",
        "handed_over",
        "is_lost",
        "is_open",
        "key",
        "opened_at",
        "sent",
        "term",
    )

    def __init__(self, key: UUID, opened_at: float, before: Hold | None = None) -> None:
        self.key = key
        self.opened_at = opened_at
        self.term: int = 0
        """Term of this instance as the holder; 0: the store has not entered it yet."""
        self.before: Hold | None = before if before is None or before.term else before.before
        """The hold before that the store has entered, with which this one may have the term in common."""
        if self.before is not None:
            self.before.before = None
        self.former: int | None = None
        """Number of the instance from which the stream was taken; `None`: from none, or it is not known yet."""
        self.is_open = True
        """Whether the response is open."""
        self.is_lost = False
        """Whether another instance has opened the stream later."""
        self.claimed = Latch()
        """The store has entered this hold, or there is a later one."""
        self.claimed_at = math.inf
        """Moment at which that was known."""
        self.handed_over = Latch()
        """Nothing more is to be learned of the former holder: it has closed its response, or there is none."""
        self.sent: int | None = None
        """Sequence up to which the former holder has given the log's events to its connection, where it said so."""

    def go_on(self, before: Hold) -> None:
        """Go on with what the hold before is about to learn, or has learned, of the former holder."""
        self.former, self.sent, self.handed_over = before.former, before.sent, before.handed_over

    def learn(self, sent: int | None) -> None:
        """Learn from the former holder up to which sequence it has given the log's events to its connection."""
        self.sent = sent
        if self.before is not None and self.before.term == self.term:
            self.before.sent = sent
        self.handed_over.set()
