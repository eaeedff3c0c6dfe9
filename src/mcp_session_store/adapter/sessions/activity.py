"""Activity of sessions, gathered in memory and reported to the store in one statement for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_session_store.activity import Activity, StreamClaim
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import Wake
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from uuid import UUID

    from mcp_session_store.activity import StreamHolder
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.streams.hold import Hold
    from mcp_session_store.records import SessionRecord
    from mcp_session_store.retention import RetentionPolicy
    from mcp_session_store.store import SessionStore

__all__ = ["ActivityReporter", "checked_interval"]

DEFAULT_INTERVAL: Final = 15.0
"""Seconds between two reports, where the idle time allows it."""
GATHERING: Final = 0.1
"""Seconds in which urgent activity gathers before it is reported."""
GAP_WITHOUT_IDLE: Final = 300.0
"""Seconds between two reports of one session, where sessions may be idle for ever."""


def checked_interval(requested: float | None, policy: RetentionPolicy) -> float:
    """Return the seconds between two reports.

    Args:
        requested: The setting `activity_interval`.
        policy: Policy whose idle time sets the longest interval, a quarter of it: a session in use must not expire
            unreported.

    Raises:
        ConfigurationError: It cannot work.
    """
    longest = math.inf if policy.idle is None else policy.idle.total_seconds() / 4
    if requested is None:
        return min(DEFAULT_INTERVAL, longest)
    if requested > longest:
        raise ConfigurationError(
            f"activity_interval={requested:g} is more than a quarter of the policy's idle time, {longest:g} s: a "
            "session in use could expire before that is reported; make it shorter, or the idle time longer"
        )
    return requested


@dataclass(slots=True)
class _Unreported:
    first: float
    last: float
    restores: int = 0
    """Number of restores that is claimed with the activity; 0: none."""
    used: bool = True
    """Whether it is a use of the session."""
    hold: Hold | None = None
    """Hold of the session's stream that is claimed with the activity."""

    @property
    def is_urgent(self) -> bool:
        return self.restores > 0 or self.hold is not None

    def activity(self, key: UUID, now: float, instance: str, number: int) -> Activity:
        """Return it as it is reported.

        Args:
            key: Key of the session.
            now: The present moment.
            instance: Id of this instance.
            number: Number of this instance.
        """
        stream = None
        if self.hold is not None:
            stream = StreamClaim(number=number, age=now - self.hold.opened_at, term=self.hold.term)
        return Activity(
            key=key,
            first_age=now - self.first,
            last_age=now - self.last,
            claimed_by=instance if self.restores else None,
            restores=self.restores,
            used=self.used,
            stream=stream,
        )


class ActivityReporter:
    """Gathers activity and reports it.

    A session is reported at most once in a twentieth of the idle time, or in half of `evict_after` where that is
    shorter, unless it is about to expire, or has left memory. One that was restored is reported at once, because the
    report claims it.

    Args:
        store: Store that the activity is reported to.
        registry: Registry of the copies in memory. A session is in use while there is contact with its client.
        instance: Id of this instance.
        interval: Seconds between two reports.
        evict_after: See `InstanceSettings`.
    """

    def __init__(
        self, store: SessionStore, registry: Registry, *, instance: str, interval: float, evict_after: float | None
    ) -> None:
        self._store = store
        self._registry = registry
        self.instance: Final = instance
        self.interval: Final = interval
        idle = store.retention.idle
        gap = GAP_WITHOUT_IDLE if idle is None else idle.total_seconds() / 20
        # Other instances ask whether the client was active within `evict_after`.
        self._gap = gap if evict_after is None else min(gap, evict_after / 2)
        self.lag: Final = self._gap + interval
        """Seconds by which the last use of a session that the store knows is earlier than the real one, at most."""
        self._unreported: dict[UUID, _Unreported] = {}
        self._urgent: set[UUID] = set()
        self._all_due_at = -math.inf
        self._under_way: list[dict[UUID, _Unreported]] = []
        """Activity in reports that the store has not answered yet."""
        self.failing = False
        """Whether the store did not take the last report."""
        self.wake: Final = Wake(gathering=GATHERING)
        self.number: Callable[[], int] = lambda: 0
        """Returns the number of this instance, under which streams are claimed."""
        self.on_holder: Callable[[Hold, StreamHolder, int], None] = lambda *_: None
        """Called with each hold of a stream that was claimed, the stream's holder, and the number of the claim."""

    def note(self, session: ResidentSession) -> None:
        """Note that a session is in use now, unless nothing has been asked of it yet that is a use."""
        if not session.lifetime.used:
            return
        assert session.record is not None
        key, now = session.record.key, clock.now()
        unreported = self._unreported.get(key)
        if unreported is not None:
            unreported.last = now
            if not unreported.used:
                # Claimed before its first use.
                unreported.used = True
                self._report_soon(key)
            return
        self._unreported[key] = _Unreported(now, now)
        if self._expires_soon(session, now):
            self._report_soon(key)

    def note_elsewhere(self, key: UUID, record: SessionRecord | None) -> None:
        """Note that a session is in use now that is not in this memory, unless nothing has been asked of it yet.

        Args:
            key: Its key.
            record: Its record, as it was just loaded; `None`: it was in use a moment ago.
        """
        if record is not None and record.last_seen_at <= record.created_at:
            return
        now = clock.now()
        self._unreported.setdefault(key, _Unreported(now, now)).last = now
        if record is None:
            return
        loaded_at, expires_at = record.loaded_at, record.expires_at
        if loaded_at is None or (
            expires_at is not None and (expires_at - loaded_at).total_seconds() < 2 * self.interval
        ):
            self._report_soon(key)

    def first_used(self, session: ResidentSession) -> None:
        """Note the first use of a session, which the next report extends although its request may last."""
        session.lifetime.used = True
        self.note(session)

    def claim(self, key: UUID, *, restores: int, since: float, used: bool) -> None:
        """Note that a session was restored, which the next report claims.

        Args:
            key: Key of the session.
            restores: Number of its restores, this one included.
            since: Moment, by `clock`, at which the session was in use and live.
            used: Whether the session was ever used.
        """
        claimed = _Unreported(since, since, restores, used=used)
        unreported = self._unreported.setdefault(key, claimed)
        if unreported is not claimed:
            _merge({key: claimed}, into=self._unreported)
        self._report_soon(key)

    def claim_stream(self, session: ResidentSession, hold: Hold) -> None:
        """Note that the stream of a session was opened here, which the next report claims."""
        now = clock.now()
        _merge({hold.key: _Unreported(now, now, used=session.lifetime.used, hold=hold)}, into=self._unreported)
        self._report_soon(hold.key)

    def claimed(self, key: UUID) -> int:
        """Return the number of restores of a session that is claimed, but perhaps not stored yet; 0: none."""
        unreported = self._unreported.get(key)
        restores = 0 if unreported is None else unreported.restores
        for reported in self._under_way:
            if key in reported:
                restores = max(restores, reported[key].restores)
        return restores

    def _report_soon(self, key: UUID) -> None:
        if not self._urgent:
            self.wake.set()
        self._urgent.add(key)

    def _expires_soon(self, session: ResidentSession, now: float) -> bool:
        """Return whether a session expires unless its activity is reported: it is new, or was idle for long."""
        lifetime = session.lifetime
        can_be_extended = lifetime.expiry_reported < lifetime.ends_at
        return can_be_extended and now > lifetime.expiry_reported - 2 * self.interval

    def gather(self, *, everything: bool = False) -> None:
        """Note which sessions are in use now; with `everything`, also when all others were last used.

        When the client has been away for long from a call that runs here, the store is asked whether the session is
        still live, because the client may have been in contact with other instances.
        """
        for session in self._registry:
            if session.record is None:
                continue
            unreported = self._unreported.get(session.record.key)
            if not session.lifetime.used:
                self._look_at_unused(session, everything=everything)
            elif session.pins:
                now = clock.now()
                if unreported is None:
                    self._unreported[session.record.key] = _Unreported(now, now)
                else:
                    unreported.last = now
            elif unreported is not None:
                # It was in use until its last request was over.
                unreported.last = max(unreported.last, session.last_contact)
            elif (everything and session.lifetime.reported_at > -math.inf) or (session.past_idle and session.busy):
                # Not those that are new and were never used.
                self._unreported[session.record.key] = _Unreported(session.last_contact, session.last_contact)

    def _look_at_unused(self, session: ResidentSession, *, everything: bool) -> None:
        assert session.record is not None
        lifetime, policy = session.lifetime, self._store.retention
        if session.streams and clock.now() - lifetime.opened_at > policy.new_session_lifetime.total_seconds() / 2:
            self.first_used(session)
        elif everything:
            # To learn whether it is live.
            now = clock.now()
            _merge({session.record.key: _Unreported(now, now, used=False)}, into=self._unreported)

    async def report(self, *, everything: bool = False) -> Collection[UUID]:
        """Report the activity that is due.

        Args:
            everything: Report all unreported activity, and all copies in memory.

        Returns:
            The keys of sessions that are not live any more.

        Raises:
            SessionStoreError: The store did not take the report; its activity is in the next one.
        """
        now = clock.now()
        if everything or not self._urgent or now >= self._all_due_at:
            self.gather(everything=everything)
            now = clock.now()
            due = {key for key in self._unreported if everything or self._is_due(key, now)}
            self._all_due_at = now + self.interval
        else:
            due = self._urgent & self._unreported.keys()
        self._urgent = set()
        reported = {key: self._unreported.pop(key) for key in due}
        if everything:
            # A report that is under way may fail when no task is left that reports again.
            for others in self._under_way:
                _merge(others, into=reported)
        if not reported:
            return ()
        number = self.number()
        self._under_way.append(reported)
        try:
            touched = await self._store.touch(
                [one.activity(key, now, self.instance, number) for key, one in reported.items()]
            )
        except BaseException:
            self.failing = True
            _merge(reported, into=self._unreported)
            self._urgent.update(key for key, one in reported.items() if one.is_urgent)
            raise
        finally:
            self._under_way = [others for others in self._under_way if others is not reported]
        self.failing = False
        for key in reported.keys() - touched.not_live:
            if (session := self._registry.with_key(key)) is not None and reported[key].used:
                session.lifetime.reported(reported[key].last, self._store.retention)
        for key, holder in touched.streams.items():
            if (hold := reported[key].hold) is not None:
                self.on_holder(hold, holder, number)
        return touched.not_live

    def _is_due(self, key: UUID, now: float) -> bool:
        session = self._registry.with_key(key)
        if session is None:
            return True
        return now >= session.lifetime.reported_at + self._gap or self._expires_soon(session, now)


def _merge(some: dict[UUID, _Unreported], *, into: dict[UUID, _Unreported]) -> None:
    for key, one in some.items():
        other = into.get(key, one)
        into[key] = _Unreported(
            min(one.first, other.first),
            max(one.last, other.last),
            max(one.restores, other.restores),
            used=one.used or other.used,
            hold=other.hold if one.hold is None or one is other else _later(one.hold, other.hold),
        )


def _later(hold: Hold, other: Hold | None) -> Hold:
    return hold if other is None or hold.opened_at >= other.opened_at else other
