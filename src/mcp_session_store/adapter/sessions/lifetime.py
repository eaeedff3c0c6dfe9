"""How long a session lives: its absolute end, and its end when it is idle."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING

from mcp_session_store.adapter import clock
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.retention import RetentionPolicy
from mcp_session_store.settings import checked_seconds

if TYPE_CHECKING:
    from mcp_session_store.records import SessionRecord
    from mcp_session_store.store import SessionStore

__all__ = ["Lifetime", "set_idle"]


class Lifetime:
    """The life of a session as far as this instance knows; the store knows for sure.

    All moments are by `clock`, and come from differences of the store's own times: a wall clock that is wrong
    changes nothing.
    """

    __slots__ = ("ends_at", "expiry_reported", "idle", "opened_at", "reported_at", "used")

    def __init__(self) -> None:
        self.ends_at = math.inf
        """Moment at which the absolute lifetime is over."""
        self.idle = math.inf
        """Seconds for which the session lives without being used."""
        self.reported_at = -math.inf
        """Moment of the last activity that is stored."""
        self.expiry_reported = -math.inf
        """Moment at which the session expires by the activity that is stored."""
        self.used = True
        """Whether the client has made use of the session since it opened it: until then it keeps the life of a new one.

        A request other than `initialize` and `ping` is a use. Notifications are none: `notifications/initialized`
        is part of each handshake. A stream that the client keeps open for half of that life is.
        """
        self.opened_at = -math.inf
        """Moment at which the session was opened."""

    @property
    def age(self) -> float:
        """Seconds since the session was opened."""
        return clock.now() - self.opened_at

    @property
    def past_absolute(self) -> bool:
        """Whether the absolute lifetime is over."""
        return clock.now() >= self.ends_at

    def begin(
        self, record: SessionRecord, policy: RetentionPolicy, *, new: bool, loaded_at: float | None = None
    ) -> None:
        """Take the lifetime from a record.

        Args:
            record: The record.
            policy: Policy by which the session expires.
            new: Whether the record was just created.
            loaded_at: Moment at which the record was loaded; `None` for one that was just created or claimed.
        """
        # The store's time of the record was this moment.
        moment, stored_at = clock.now(), record.last_seen_at
        if loaded_at is not None and record.loaded_at is not None:
            moment, stored_at = loaded_at, record.loaded_at
        self.used = not new and record.last_seen_at > record.created_at
        self.opened_at = moment - (stored_at - record.created_at).total_seconds()
        if policy.absolute is not None:
            self.ends_at = moment + (record.created_at + policy.absolute - stored_at).total_seconds()
        if new:
            self.idle = policy.new_session_lifetime.total_seconds()
            # Until its first activity is stored it lives on borrowed time.
            self.expiry_reported = -math.inf
        elif loaded_at is None:
            self.reported(moment, policy)
        else:
            self.idle = math.inf if policy.idle is None else policy.idle.total_seconds()
            expires_at = record.expires_at
            self.expiry_reported = math.inf if expires_at is None else moment + (expires_at - stored_at).total_seconds()
        if not self.used:
            self.expiry_reported = -math.inf  # its first use is reported at once

    def reported(self, moment: float, policy: RetentionPolicy) -> None:
        """Note that the activity up to a moment is stored."""
        self.reported_at = moment
        self.idle = math.inf if policy.idle is None else policy.idle.total_seconds()
        self.expiry_reported = min(moment + self.idle, self.ends_at)


def set_idle(store: SessionStore, session_idle_timeout: float | None) -> None:
    """Make the SDK's idle timeout the idle time of a store's policy."""
    if session_idle_timeout is not None:
        checked_seconds("session_idle_timeout", session_idle_timeout)
    idle = None if session_idle_timeout is None else timedelta(seconds=session_idle_timeout)
    policy = store.retention
    if "idle" in policy.model_fields_set and policy.idle != idle:
        raise ConfigurationError(
            "session_idle_timeout and the retention policy's idle say the same; leave session_idle_timeout out"
        )
    store.retention = RetentionPolicy.model_validate(policy.model_dump(exclude_unset=True) | {"idle": idle})
