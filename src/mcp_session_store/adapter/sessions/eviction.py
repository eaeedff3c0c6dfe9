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

__all__ = ["AWAY", "AWAY_RESUMABLE", "EvictionOrder"]

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
    has contact, or had it a short time ago, or whose client is active on another instance as far as the store knows
    (`Absences`), makes room only where its principal holds more than its share. A copy with a finished answer on its
    way to the log stays, and one with an answer on its way to the client leaves last.

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
        self._by_number: dict[int, dict[_Principal, None]] = {}
        """Principals by the number of copies that they hold."""
        self._orders: dict[_Principal, tuple[float, dict[ResidentSession, None]]] = {}
        """Copies of principals that held more than their share, in their order, and when that was looked at."""

    def add(self, session: ResidentSession, owner: AuthorizationContext) -> None:
        """Note that a copy of a principal's session holds a place."""
        principal = _principal(owner)
        held = self._held.setdefault(principal, {})
        held[session] = None
        self._number_changed(principal, len(held) - 1, len(held))
        self._orders.pop(principal, None)

    def remove(self, session: ResidentSession) -> None:
        """Note that a copy does not hold its place any more."""
        if session.owner is not None:
            principal = _principal(session.owner)
            held = self._held[principal]
            del held[session]
            self._number_changed(principal, len(held) + 1, len(held))
            if not held:
                del self._held[principal]
                self._orders.pop(principal, None)
            elif principal in self._orders:
                self._orders[principal][1].pop(session, None)
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

    def _number_changed(self, principal: _Principal, before: int, after: int) -> None:
        if before:
            principals = self._by_number[before]
            del principals[principal]
            if not principals:
                del self._by_number[before]
        if after:
            self._by_number.setdefault(after, {})[principal] = None

    def _beyond_share(self, newcomer: _Principal) -> Iterator[ResidentSession]:
        """Return the copies of principals that hold more than their share, those that hold most first."""
        principals = len(self._held) + (newcomer not in self._held)
        least = max(self._capacity / principals, len(self._held.get(newcomer, ())) + 1)
        now = clock.now()
        for number in sorted((number for number in self._by_number if number > least), reverse=True):
            for principal in self._by_number[number]:
                in_use = (one for one in self._in_order(principal, now) if _is_in_use(one, now))
                yield from islice(in_use, math.ceil(number - least))

    def _in_order(self, principal: _Principal, now: float) -> Iterable[ResidentSession]:
        """Return the copies of a principal in the order in which they make room for other principals."""
        looked_at, order = self._orders.get(principal, (-math.inf, {}))
        if now - looked_at >= SEARCH_PAUSE:
            # Those with a call after the others, because it is cancelled.
            order = dict.fromkeys(
                sorted(
                    self._held[principal],
                    key=lambda one: (one.answering, one.in_flight > 0, one.pins > 0, one.last_contact),
                )
            )
            self._orders[principal] = now, order
        return order


def _principal(owner: AuthorizationContext) -> _Principal:
    return owner["client_id"], owner["issuer"], owner["subject"]


def _rank(session: ResidentSession, now: float) -> int | None:
    """Return the place in the order of a copy that is in use without contact; `None`: it does not make room."""
    away = now - session.last_contact
    if session.pins or not session.at_work or away < AWAY or session.answering:
        return None
    # The store is asked when the client has been away for so long; not before that is its copy judged.
    if session.looked_at < session.last_contact + AWAY or now < session.elsewhere_until:
        return None
    if session.waits_for_client:
        return 0
    if session.events is None or not session.events.resumable:
        return 1
    return 2 if away >= AWAY_RESUMABLE else None


def _is_in_use(session: ResidentSession, now: float) -> bool:
    """Return whether a copy is in use and may make room all the same, for another principal."""
    # An answer that a client does not read, or a body that it does not send, keeps no others out.
    if session.record is None or not session.busy or (session.events is not None and session.events.busy):
        return False
    return _rank(session, now) is None
