"""Policies for the lifetime, number and size of what is stored of sessions; sweeps, their reports and their pace."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mcp_session_store.environment import Settings, duration, none_or

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "EventPolicy",
    "EventSweepReport",
    "StatePolicy",
    "StateSweepReport",
    "MIN_TOMBSTONE",
    "NEW_SESSION_LIFETIME",
    "RetentionPolicy",
    "SweepPace",
    "SweepReport",
]

NEW_SESSION_LIFETIME: Final = timedelta(minutes=10)
"""Longest life of a new record that no activity and no claim follows.

A client that was answered continues at once (MCP 2025-11-25, basic/lifecycle: `notifications/initialized`
follows `initialize`), so a record that stays unused is one whose commit was not acknowledged.
"""

MIN_TOMBSTONE: Final = timedelta(minutes=1)
"""Shortest time for which an ended session is kept, because an instance may take that long to learn of the end."""

MAY_BE_HELD: Final = timedelta(minutes=15)
"""Time since its last activity within which a session is a change when a sweep ends it.

An instance may hold a copy then and not foresee the expiry, because another one has a policy with a shorter idle time.
Later ends are no changes, so that a sweep of very many sessions floods no instance.
"""

ANONYMOUS_SESSIONS: Final = 1_000_000
"""Most stored sessions without a principal by default: those of a day at a dozen a second."""

SWEEP_STEP_TIME: Final = 0.002
"""Seconds for which a step of a sweep may hold up other writers, more or less."""

FIRST_STEP_HALVINGS: Final = 3
"""Number of times that the limit of a sweep's first step is halved at most."""

MAX_SWEEP_GRACE: Final = timedelta(minutes=1)

_SHORTEST: Final = timedelta(milliseconds=10)
_LONGEST: Final = timedelta(days=36_500)

_Lifetime = Annotated[timedelta, Field(ge=_SHORTEST, le=_LONGEST)]
_Kept = Annotated[timedelta, Field(ge=timedelta(0), le=_LONGEST)]


class RetentionPolicy(Settings):
    """Lifetimes of a store's sessions and of their tombstones, and limits on their number.

    Durations are `timedelta`s, or texts such as `30m`, `24h`, `7d`; `None`, as a text `none`, means no limit.
    A session keeps the expiry that its last activity gave it, so that a changed policy applies to a
    session from its next activity on.

    Limits on the number of sessions have a price: sessions of one principal are then opened one transaction after the
    other, on all instances, and each transaction counts the stored ones along an index. Up to a thousand sessions this
    takes milliseconds. Those without a principal are counted only now and then, until the limit is near.

    Raises:
        ConfigurationError: A value cannot work; the message names its field.
    """

    idle: Annotated[_Lifetime | None, BeforeValidator(duration)] = timedelta(hours=24)
    """Time from its last activity after which a session expires."""
    absolute: Annotated[_Lifetime | None, BeforeValidator(duration)] = None
    """Time from its opening after which a session expires, active or not."""
    tombstone: Annotated[_Kept | None, BeforeValidator(duration)] = timedelta(hours=24)
    """Time for which an ended session is kept, so that it can be distinguished from an unknown one. At least
    `MIN_TOMBSTONE` in effect, within which all instances learn of the end."""
    per_principal: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(none_or)] = None
    """Most live sessions of a principal."""
    per_principal_excess: Literal["end_oldest", "refuse"] = "end_oldest"
    """Effect of opening one session more: the principal's session that has been idle for longest ends, or the new
    one is refused (503). Idleness is judged by the stored `last_seen_at`, which lags by up to a twentieth of `idle`,
    and half of `evict_after`, for a session in use."""
    anonymous: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(none_or)] = ANONYMOUS_SESSIONS
    """Most stored sessions without a principal, tombstones included; one more is refused (503). Tombstones of such
    sessions are removed when room is needed. While there is much room, sessions are not counted one by one: each
    instance may exceed the limit by a hundredth of that room. The default is for no server to meet, and bounds what
    strangers can fill of the disk."""

    unbound_state: Annotated[_Lifetime | None, BeforeValidator(duration)] = timedelta(days=30)
    """Time for which state of FastMCP's is kept that belongs to no session of the protocol, that of a user or of a
    session that FastMCP makes itself, after it was last stored."""

    # For type checkers, because a duration may be given as a text, and is a timedelta afterwards.
    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            idle: timedelta | str | None = ...,
            absolute: timedelta | str | None = ...,
            tombstone: timedelta | str | None = ...,
            per_principal: int | None = ...,
            per_principal_excess: Literal["end_oldest", "refuse"] = ...,
            anonymous: int | None = ...,
            unbound_state: timedelta | str | None = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.per_principal is None and self.per_principal_excess != "end_oldest":
            raise ValueError("per_principal_excess has no effect without per_principal; give both, or neither")
        return self

    def expiry(self, *, created_at: datetime, last_seen_at: datetime) -> datetime | None:
        """Return the time at which a session that was used expires; `None`: never."""
        limits = []
        if self.idle is not None:
            limits.append(last_seen_at + self.idle)
        if self.absolute is not None:
            limits.append(created_at + self.absolute)
        return min(limits, default=None)

    @cached_property
    def new_session_lifetime(self) -> timedelta:
        """Life of a new session until its first use."""
        return min(limit for limit in (NEW_SESSION_LIFETIME, self.idle, self.absolute) if limit is not None)

    @property
    def sweep_grace(self) -> timedelta:
        """Time for which a sweep leaves an expired session alone, because its last activity may not be reported yet."""
        return MAX_SWEEP_GRACE if self.idle is None else min(self.idle / 4, MAX_SWEEP_GRACE)

    @property
    def tombstone_kept(self) -> timedelta | None:
        """Time for which an ended session is kept in effect; `None`: for ever."""
        return None if self.tombstone is None else max(self.tombstone, MIN_TOMBSTONE)


class EventPolicy(Settings):
    """Age, number and size of the events that are kept of a session, which a client can resume from.

    The limit that is reached first removes the oldest events of the session. A session that ends loses all its
    events at once.

    `max_age` is a `timedelta`, or a text such as `1h`; `None`, as a text `none`, means no limit.

    Raises:
        ConfigurationError: A value cannot work; the message names its field.
    """

    prefix: ClassVar[str] = "events_"

    max_age: Annotated[_Lifetime | None, BeforeValidator(duration)] = timedelta(hours=1)
    """Age at which a sweep removes an event; `None`: only with its session. Partitioned events, on Postgres, are
    removed when all events of their partition are that old, or else when they are three times as old.

    The same on all instances: one that hears nothing of another's call for its own `max_age`, an hour at most, has the
    call end as lost."""
    max_events_per_session: Annotated[int, Field(ge=10, le=1_000_000)] = 10_000
    """Most events kept of a session. When there are more, a tenth is removed at once."""
    max_bytes_per_session: Annotated[int, Field(ge=1024, le=1024**3)] = 16 * 1024**2
    """Most bytes of messages kept of a session. When there are more, a tenth is removed at once. An event that is
    larger than this limit is not stored, and reaches only a client that is connected."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            max_age: timedelta | str | None = ...,
            max_events_per_session: int = ...,
            max_bytes_per_session: int = ...,
        ) -> None: ...


class StatePolicy(Settings):
    """Number and size of the values that a session may have as its state. A write beyond them is refused.

    A policy with smaller bounds takes nothing from sessions that have more.

    Raises:
        ConfigurationError: A value cannot work; the message names its field.
    """

    prefix: ClassVar[str] = "state_"

    max_value_bytes: Annotated[int, Field(ge=2, le=16 * 1024**2)] = 64 * 1024
    """Most bytes of one value as JSON text."""
    max_values_per_session: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Most values of a session."""
    max_bytes_per_session: Annotated[int, Field(ge=1024, le=1024**3)] = 1024**2
    """Most bytes of all values of a session, their names included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """Report of a sweep of sessions."""

    expired: int = 0
    """Number of expired sessions that were ended."""
    purged: int = 0
    """Number of tombstones that were removed."""
    values: int = 0
    """Number of expired values of a `SqlKeyValue` that were removed."""
    more: bool = False
    """Whether there may be more to do."""
    longest: float = field(default=0.0, compare=False)
    """Seconds for which all other writers had to wait for it at most; 0 where they do not wait for one another."""
    lives: Sequence[float] = field(default=(), compare=False)
    """Seconds that each of the expired sessions had lived, by the store's clock; a store may leave them out.

    They are of one step: a report of several has none, because there may be very many.
    """

    def __add__(self, later: SweepReport) -> SweepReport:
        """Return the report of both sweeps, the later one second."""
        return SweepReport(
            expired=self.expired + later.expired,
            purged=self.purged + later.purged,
            values=self.values + later.values,
            more=later.more,
            longest=max(self.longest, later.longest),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EventSweepReport:
    """Report of a sweep of events."""

    removed: int = 0
    """Number of events that were removed."""
    more: bool = False
    """Whether there may be more to do."""
    longest: float = field(default=0.0, compare=False)
    """Seconds for which all other writers had to wait for it at most; 0 where they do not wait for one another."""

    def __add__(self, later: EventSweepReport) -> EventSweepReport:
        """Return the report of both sweeps, the later one second."""
        return EventSweepReport(
            removed=self.removed + later.removed, more=later.more, longest=max(self.longest, later.longest)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSweepReport:
    """Report of a sweep of the state of sessions."""

    removed: int = 0
    """Number of values that were removed."""
    more: bool = False
    """Whether there may be more to do."""
    longest: float = field(default=0.0, compare=False)
    """Seconds for which all other writers had to wait for it at most; 0 where they do not wait for one another."""

    def __add__(self, later: StateSweepReport) -> StateSweepReport:
        """Return the report of both sweeps, the later one second."""
        return StateSweepReport(
            removed=self.removed + later.removed, more=later.more, longest=max(self.longest, later.longest)
        )


class SweepPace:
    """Pace of a sweep: the size of its steps, and the pauses between them.

    A step is as large as it can be without holding up other writers for long: its limit is `most`, or a half of it, a
    quarter, and so on; of the first step an eighth, if that is not too small. Only the time for which the store says
    that it held up all others counts: waits for the network or the event loop are no shorter for a smaller step. After
    each step there is a pause of the same length, so that half of the time is for the requests.

    Args:
        most: Largest limit of a step.
        least: No limit is halved to less, because each step has a cost that does not depend on its size.
    """

    def __init__(self, most: int, *, least: int) -> None:
        self._limits = [most]
        # A few sizes only, because databases may keep a plan for each.
        while self._limits[-1] // 2 >= least:
            self._limits.append(self._limits[-1] // 2)
        self._size = min(FIRST_STEP_HALVINGS, len(self._limits) - 1)

    @property
    def limit(self) -> int:
        """Limit of the next step."""
        return self._limits[self._size]

    def pause_after(self, step: SweepReport | EventSweepReport | StateSweepReport, took: float) -> float:
        """Take a step into account, and return the seconds to pause before the next one.

        Args:
            step: The step's report.
            took: Seconds that the step took as a whole.
        """
        longest = step.longest
        while longest > SWEEP_STEP_TIME and self._size < len(self._limits) - 1:
            self._size += 1
            longest /= 2
        if step.more and longest < SWEEP_STEP_TIME / 2 and self._size > 0:
            self._size -= 1
        return took
