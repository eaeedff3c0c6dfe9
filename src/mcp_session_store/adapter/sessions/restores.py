"""Restores under way: what is heard of their sessions, and what the requests that wait for them need to know."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.outage import SharedWait

if TYPE_CHECKING:
    from uuid import UUID

    from opentelemetry.trace import Span

    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["Interest", "Restore"]


class Interest:
    """What is heard of a session from before the load of its record until its copy is published."""

    __slots__ = ("ended", "holders", "key", "over", "stale_since")

    def __init__(self, key: UUID) -> None:
        self.key = key
        self.holders = 0
        """Number of requests and restores that hold this."""
        self.ended = False
        """Whether the session ended."""
        self.stale_since = 0
        """Highest revision of the record that was heard of, or loaded."""
        self.over = Latch()
        """Nothing holds this any more."""


class Restore(SharedWait):
    """One restore under way, and what the requests that wait for it need to know.

    Args:
        session_id: Id of the session.
        interest: What is heard of the session.
        previous_instance: Id of the instance that created or restored the session before.
        restores: Number of restores before this one.
        loaded_at: Moment, by `clock`, at which the record was loaded.
        arrived: Arrival of the request that caused it.
        span: Span of the restore, which ends with it.
    """

    __slots__ = (
        "copy",
        "deadline",
        "failure",
        "interest",
        "loaded_at",
        "previous_instance",
        "restores",
        "session",
        "session_id",
        "span",
    )

    def __init__(
        self,
        session_id: str,
        interest: Interest,
        *,
        previous_instance: str,
        restores: int,
        loaded_at: float,
        arrived: float,
        span: Span,
    ) -> None:
        super().__init__(arrived)
        self.span = span
        self.session_id = session_id
        self.interest = interest
        interest.holders += 1
        self.previous_instance = previous_instance
        self.restores = restores
        self.loaded_at = loaded_at
        self.copy: ResidentSession | None = None
        """The copy that is being made."""
        self.deadline = math.inf
        """Moment, by anyio's clock, at which the replay takes too long."""
        self.session: ResidentSession | None = None
        """The restored session, when the restore is over and succeeded."""
        self.failure: Exception | None = None
        """Why the restore failed, when it is over and failed."""
