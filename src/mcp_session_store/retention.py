"""How long sessions live, how many there may be, and what a sweep did: frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mcp_session_store.environment import Settings, duration, none_or

__all__ = [
    "EventPolicy",
    "EventSweepReport",
    "MIN_TOMBSTONE",
    "NEW_SESSION_LIFETIME",
    "RetentionPolicy",
    "SweepReport",
]

NEW_SESSION_LIFETIME: Final = timedelta(minutes=10)
"""How long a new record lives at most unless a first activity, or a claim, follows.

A client that was answered goes on at once (MCP 2025-11-25, basic/lifecycle: `notifications/initialized`
follows `initialize`), so what stays behind is a record whose commit nobody learned of.
"""

MIN_TOMBSTONE: Final = timedelta(minutes=1)
"""How long an ended session is kept whatever the policy: so long may an instance take to learn of it."""

MAX_SWEEP_GRACE: Final = timedelta(minutes=1)

_SHORTEST: Final = timedelta(milliseconds=10)
_LONGEST: Final = timedelta(days=36_500)

_Lifetime = Annotated[timedelta, Field(ge=_SHORTEST, le=_LONGEST)]
_Kept = Annotated[timedelta, Field(ge=timedelta(0), le=_LONGEST)]


class RetentionPolicy(Settings):
    """How long the sessions of a store live, how long their traces are kept, and how many there may be.

    Durations are `timedelta`s, or texts such as `30m`, `24h`, `7d`; `None`, as a text `none`, means no limit.
    A session keeps the expiry that its last activity gave it, so that a policy that is changed applies to a
    session from its next activity on.

    Limits on how many there may be are exact, and have a price: sessions of one principal, and those without
    one, are then opened one transaction after the other, on all instances, and each counts along an index what is
    there. Up to a thousand that is a matter of milliseconds.

    Raises:
        pydantic.ValidationError: A value that makes no sense, by its name.
    """

    idle: Annotated[_Lifetime | None, BeforeValidator(duration)] = timedelta(hours=24)
    """How long a session lives after its last activity."""
    absolute: Annotated[_Lifetime | None, BeforeValidator(duration)] = None
    """How long a session lives after it was opened, active or not."""
    tombstone: Annotated[_Kept | None, BeforeValidator(duration)] = timedelta(hours=24)
    """How long a session that has ended is kept, so that it is told apart from an unknown one. At least
    `MIN_TOMBSTONE`, within which all instances learn of the end."""
    per_principal: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(none_or)] = None
    """How many live sessions a principal may have."""
    per_principal_excess: Literal["end_oldest", "refuse"] = "end_oldest"
    """What happens when a principal opens one more: the session of his that has been idle for longest ends,
    or the new one is refused (503). Which one that is, the stored `last_seen_at` tells, which lags by up to a
    twentieth of `idle` for one that is in use."""
    anonymous: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(none_or)] = None
    """How many sessions without a principal may be stored, ended ones that are still kept included; one more
    is refused (503). Tombstones of such sessions make room when it is needed. Where there is much room
    sessions are not counted one by one: each instance may exceed the limit by a hundredth of that room."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.per_principal is None and self.per_principal_excess != "end_oldest":
            raise ValueError("per_principal_excess says nothing without per_principal; give both, or neither")
        return self

    def expiry(self, *, created_at: datetime, last_seen_at: datetime) -> datetime | None:
        """When a session that was used expires; `None`: never."""
        limits = []
        if self.idle is not None:
            limits.append(last_seen_at + self.idle)
        if self.absolute is not None:
            limits.append(created_at + self.absolute)
        return min(limits, default=None)

    @property
    def new_session_lifetime(self) -> timedelta:
        """How long a new session lives unless it is used."""
        return min(limit for limit in (NEW_SESSION_LIFETIME, self.idle, self.absolute) if limit is not None)

    @property
    def sweep_grace(self) -> timedelta:
        """How long a sweep leaves a session alone that has expired: its last activity may be on its way."""
        return MAX_SWEEP_GRACE if self.idle is None else min(self.idle / 4, MAX_SWEEP_GRACE)

    @property
    def tombstone_kept(self) -> timedelta | None:
        """How long an ended session is kept in fact; `None`: for ever."""
        return None if self.tombstone is None else max(self.tombstone, MIN_TOMBSTONE)


class EventPolicy(Settings):
    """How long the events of streams are kept, and how many of a session: so far back can a client resume.

    Whatever comes first removes the oldest events of a session. A session that ends loses all of them at once.

    Raises:
        pydantic.ValidationError: A value that makes no sense, by its name.
    """

    prefix: ClassVar[str] = "events_"

    max_age: Annotated[_Lifetime | None, BeforeValidator(duration)] = timedelta(hours=1)
    """How long an event is kept; a sweep removes what is older. `None`: as long as its session lives. Events that are
    partitioned, on Postgres, are removed when all of a partition are that old, or else when they are three times as
    old."""
    max_events_per_session: Annotated[int, Field(ge=10, le=1_000_000)] = 10_000
    """How many events of a session are kept. When there are more, a tenth goes at once."""
    max_bytes_per_session: Annotated[int, Field(ge=1024, le=1024**3)] = 16 * 1024**2
    """How many bytes of messages of a session are kept. When there are more, a tenth goes at once. An event that is
    larger than all of it is not stored: it reaches only a client that is connected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """What a sweep did."""

    expired: int = 0
    """Sessions that ended because they had expired."""
    purged: int = 0
    """Ended sessions that were removed for good."""
    more: bool = False
    """There is, or may be, more to do."""

    def __add__(self, later: SweepReport) -> SweepReport:
        """The report of both, in this order."""
        return SweepReport(expired=self.expired + later.expired, purged=self.purged + later.purged, more=later.more)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventSweepReport:
    """What a sweep of events did."""

    removed: int = 0
    """Events that were removed."""
    more: bool = False
    """There is, or may be, more to do."""

    def __add__(self, later: EventSweepReport) -> EventSweepReport:
        """The report of both, in this order."""
        return EventSweepReport(removed=self.removed + later.removed, more=later.more)
