"""What an instance reports of sessions in use: their activity, its restores, and the streams that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

__all__ = ["Activity", "StreamClaim", "StreamHolder", "Touched", "merged_activities"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamClaim:
    """A report that an instance has the client's GET stream of a session."""

    number: int
    """Number of the instance."""
    age: float
    """Seconds since the stream was opened there, on the instance's monotonic clock."""
    term: int = 0
    """Term of the holder for this same opening, as a former report returned it; 0: not known yet.

    With it the stream is claimed again: by the instance under another number, or to learn whether it still has it.
    """


class StreamHolder(NamedTuple):
    """Who has the stream of a session."""

    number: int
    """Number of the instance."""
    term: int
    """Counter of the session that rises by one each time that another instance takes the stream; 1 is the first."""
    former: int | None
    """Number of the instance from which the stream was taken last; `None`: only one has had it."""
    waiting: bool
    """Whether messages wait for the stream, see `StreamMail.take`. True where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """A report that a session was in use, in seconds before now on the reporting instance's monotonic clock.

    Ages instead of times, because the store subtracts them from its own clock: a wrong wall clock changes nothing.
    It also claims the session for an instance that has restored it since its last report, and its stream for one on
    which that was opened.
    """

    key: UUID
    first_age: float
    """Seconds since the first activity that has not been reported yet."""
    last_age: float  # at most `first_age`
    claimed_by: str | None = None
    """Id of the instance that claims the session, because it has restored it; `None`: this is no claim."""
    restores: int = 0
    """Number of restores of the session as far as that instance knows, its own included."""
    used: bool = True
    """Whether the session was used; otherwise it is only claimed, and no life is extended."""
    stream: StreamClaim | None = None
    """Claim of the session's stream, if there is one."""


class Touched(NamedTuple):
    """What a store answers to a report of activity."""

    not_live: set[UUID]
    """Keys of reported sessions that are not live afterwards: ended, expired or unknown."""
    streams: Mapping[UUID, StreamHolder]
    """Who has the stream of each session whose stream was claimed; without sessions that are not live."""


def merged_activities(activities: Iterable[Activity]) -> dict[UUID, Activity]:
    """Return one activity for each session, in place of all that are reported of it, by key."""
    merged: dict[UUID, Activity] = {}
    for activity in activities:
        other = merged.setdefault(activity.key, activity)
        if other is not activity:
            claim = max(other, activity, key=lambda one: one.restores)
            streams = [one.stream for one in (other, activity) if one.stream is not None]
            merged[activity.key] = Activity(
                key=activity.key,
                first_age=max(other.first_age, activity.first_age),
                last_age=min(other.last_age, activity.last_age),
                claimed_by=claim.claimed_by,
                restores=claim.restores,
                used=other.used or activity.used,
                # The stream that was opened last, and of two reports of one opening that with the term.
                stream=min(streams, key=lambda one: (one.age, -one.term), default=None),
            )
    return merged
