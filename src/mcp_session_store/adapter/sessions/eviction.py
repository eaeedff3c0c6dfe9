"""Order in which copies of sessions leave a full memory, so that no client keeps all others out."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from mcp_session_store.adapter import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext

    from mcp_session_store.adapter.sessions.resident import ResidentSession

__all__ = ["EvictionOrder"]

AWAY: Final = 30.0
"""Seconds without contact after which a copy may leave whose calls wait for the client, or cannot be resumed."""
AWAY_RESUMABLE: Final = 300.0
"""Seconds without contact after which a copy may leave whose calls can be resumed."""
SEARCH_PAUSE: Final = 1.0
"""Seconds between two searches among the copies in use, because a search passes all of them."""

_Principal: TypeAlias = tuple[str, str | None, str | None]


class EvictionOrder:
    """Copies that hold a place in memory, and the order in which they make room for others.

    First those that are idle, the longest idle first. Then those without contact: first the ones whose calls all wait
    for an answer of the client, then those whose calls cannot be resumed, and last those whose calls can. A copy that
    has contact, or had it a short time ago, makes room only where its principal holds more than its share. A copy with
    a finished answer on its way stays.

    Args:
        published: Returns the copies that requests find.
        capacity: Highest number of copies.
    """

    def __init__(self, published: Callable[[], Iterable[ResidentSession]], *, capacity: int) -> None:
        self._published = published
        self._capacity = capacity
        self.idle: Final[dict[ResidentSession, None]] = {}
        """Published copies that are not busy, the longest idle first."""
        self._abandoned: dict[ResidentSession, None] = {}
        """Copies without contact that the last search found, in their order."""
        self._searched_at = -math.inf
        self._held: dict[_Principal, dict[ResidentSession, None]] = {}
        """Copies that hold a place, by principal; those without a principal have no share."""

    def add(self, session: ResidentSession, owner: AuthorizationContext) -> None:
        """Note that a copy of a principal's session holds a place."""
        self._held.setdefault(_principal(owner), {})[session] = None

    def remove(self, session: ResidentSession) -> None:
        """Note that a copy does not hold its place any more."""
        if session.owner is not None:
            principal = _principal(session.owner)
            held = self._held[principal]
            del held[session]
            if not held:
                del self._held[principal]
        if self._abandoned:
            self._abandoned.pop(session, None)

    def candidates(self, newcomer: AuthorizationContext | None) -> Iterator[ResidentSession]:
        """Return the copies that may make room, in their order.

        Args:
            newcomer: Principal of the session that needs a place.
        """
        yield from self.idle
        yield from self._without_contact()
        if newcomer is not None:
            yield from self._beyond_share(_principal(newcomer))

    def _without_contact(self) -> Iterator[ResidentSession]:
        now = clock.now()
        if now - self._searched_at >= SEARCH_PAUSE:
            self._searched_at = now
            found = [(rank, session) for session in self._published() if (rank := _rank(session, now)) is not None]
            found.sort(key=lambda ranked: (ranked[0], ranked[1].last_contact))
            self._abandoned = {session: None for _, session in found}
        for session in self._abandoned:
            # The client may have come back since the search.
            if _rank(session, now) is not None:
                yield session

    def _beyond_share(self, newcomer: _Principal) -> Iterator[ResidentSession]:
        """Return the copies of principals that hold more than their share, those that hold most first."""
        principals = len(self._held) + (newcomer not in self._held)
        least = max(self._capacity / principals, len(self._held.get(newcomer, ())) + 1)
        beyond = [held for held in self._held.values() if len(held) > least]
        now = clock.now()
        for held in sorted(beyond, key=len, reverse=True):
            in_use = [one for one in held if one.record is not None and one.busy and not one.answering]
            # Those with a call last, because it is cancelled.
            in_use.sort(key=lambda one: (one.in_flight > 0, one.pins > 0, one.last_contact))
            others = (session for session in in_use if _rank(session, now) is None)
            yield from islice(others, math.ceil(len(held) - least))


def _principal(owner: AuthorizationContext) -> _Principal:
    return owner["client_id"], owner["issuer"], owner["subject"]


def _rank(session: ResidentSession, now: float) -> int | None:
    """Return the place in the order of a copy that is in use without contact; `None`: it does not make room."""
    away = now - session.last_contact
    if session.pins or not session.in_flight or away < AWAY or session.answering:
        return None
    if session.waits_for_client:
        return 0
    if session.events is None or not session.events.resumable:
        return 1
    return 2 if away >= AWAY_RESUMABLE else None
