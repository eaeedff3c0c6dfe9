"""The contract of a store of session state: named values of the application's, which live as long as their session."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mcp_session_store.errors import InvalidValue, StateFull
from mcp_session_store.records import check_texts
from mcp_session_store.retention import StatePolicy
from mcp_session_store.settings import checked_type
from mcp_session_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from uuid import UUID

    from mcp_session_store.records import NewState
    from mcp_session_store.retention import StateSweepReport

__all__ = [
    "LEAST_STATE_SWEEP",
    "LONGEST_TTL",
    "MAX_NAME_BYTES",
    "MAX_VERSION",
    "NO_VALUE",
    "STATE_SWEEP_LIMIT",
    "StateStore",
    "StoredState",
    "check_bounds",
    "check_name",
    "check_state",
    "state_bytes",
    "state_full",
    "utf8_bytes",
]

MAX_NAME_BYTES: Final = 1024
"""Most bytes of the name of a value."""

MAX_VERSION: Final = 2**63 - 1
"""Highest version of a value; the lowest is 1."""

NO_VALUE: Final = 0
"""Version that no value has: as `expected`, that there must be none."""

LONGEST_TTL: Final = 100 * 365 * 86_400.0
"""Most seconds that a value may be given to live."""

STATE_SWEEP_LIMIT: Final = 500
"""Most values, and most sessions, that one step of a sweep handles, unless `limit` is given."""

LEAST_STATE_SWEEP: Final = 25
"""Smallest limit of a step that is worth its price."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """A value of a session's state, as stored."""

    value: str = field(repr=False)  # as JSON text
    version: int
    """Version of the write that stored it; no two writes of a session have the same."""


def state_bytes(state: NewState) -> int:
    """Return the number of bytes that a value counts for: those of its name and of its text, in UTF-8."""
    return utf8_bytes(state.name) + utf8_bytes(state.value)


def utf8_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def check_name(name: str) -> None:
    """Refuse a name that no value can have.

    Raises:
        InvalidValue: It is no text, holds a NUL or a lone surrogate, or is too long.
    """
    if not isinstance(name, str):
        raise InvalidValue(f"the name {name!r} of a value is no text; give a str")
    check_texts(name=name)
    if utf8_bytes(name) > MAX_NAME_BYTES:
        raise InvalidValue(f"name has more than {MAX_NAME_BYTES} bytes")


def check_state(state: NewState) -> None:
    """Refuse a value that cannot be stored.

    Raises:
        InvalidValue: A text holds a NUL or a lone surrogate, or a number is not within its bounds.
    """
    check_name(state.name)
    check_texts(value=state.value)
    if not 1 <= state.version <= MAX_VERSION:
        raise InvalidValue(f"version is not between 1 and {MAX_VERSION}")
    if state.ttl is not None and not (math.isfinite(state.ttl) and 0 < state.ttl <= LONGEST_TTL):
        raise InvalidValue("ttl is not a number of seconds above 0, or above a hundred years")


def check_bounds(policy: StatePolicy, states: Collection[NewState]) -> None:
    """Refuse values that a session without others may not have.

    Raises:
        StateFull: The policy does not allow them.
    """
    for state in states:
        if (size := utf8_bytes(state.value)) > policy.max_value_bytes:
            raise StateFull(f"a value has {size} bytes; the policy's max_value_bytes is {policy.max_value_bytes}")
    if (count := len(states)) > policy.max_values_per_session:
        raise state_full(policy, values=count, size=0)
    if (size := sum(map(state_bytes, states))) > policy.max_bytes_per_session:
        raise state_full(policy, values=count, size=size)


def state_full(policy: StatePolicy, *, values: int, size: int) -> StateFull:
    """Return the error of a session that would have too much state."""
    if values > policy.max_values_per_session:
        limit = f"{values} values; the policy's max_values_per_session is {policy.max_values_per_session}"
    else:
        limit = f"{size} bytes of state; the policy's max_bytes_per_session is {policy.max_bytes_per_session}"
    return StateFull(f"the session would have {limit}")


class StateStore(Store):
    """Store of the state of sessions, shared by any number of instances: JSON values under names of the application's.

    State is a part of its session: a session that is not live has none and takes none, and one that ends loses all
    its state in the same moment. It stands beside a `SessionStore`, whose `create` stores the state that comes with a
    new session, and whose `load` returns the values that are watched.

    A value is *watched* when its last `put` said so. The record that a store loads or claims carries the watched
    values, so that a copy of the session has them without a query of its own. A `put` or `delete` of a value that is or
    was watched raises the session's revision, and `SessionStore.changes` returns it, as after a journaled call. That
    the time of a watched value is over raises nothing.

    The rules for all methods are those of `SessionStore`, with these differences:

    * Order: the writes of one session take effect one after the other, on whatever instance they are made, and each
      sees all before it. What was written is seen by each `get` that begins after the write has returned.
    * Comparison: a write with `expected` takes effect only where the value has that version when the write takes
      effect; nothing comes between the comparison and the write. Of several writes that expect the same version, one
      takes effect, and the others raise `StateConflict`.
    * Repetition: a `put` that is repeated with the version of its first try takes effect once, and succeeds although
      its `expected` is the version before. Only where another write of the name came between the two tries it counts
      as a new one: it raises `StateConflict` with `expected`, and else overwrites the other.
    * Time: whether a value's time is over is decided by the store's clock. Then there is no value, for every method;
      what it took counts for the bounds until it is swept, or room is needed.
    * Bounds: those of the policy hold for each session after each write, however many write at once.
    * Values: `get`, `put` and `delete` raise `InvalidValue` for what cannot be stored (`check_state`, `check_name`).

    Args:
        policy: Bounds of the state of a session; the default policy unless given.
    """

    def __init__(self, *, policy: StatePolicy | None = None) -> None:
        if policy is not None:
            checked_type("policy", policy, StatePolicy, "a StatePolicy")
        self._policy = StatePolicy() if policy is None else policy

    @property
    def policy(self) -> StatePolicy:
        """Bounds of the state of a session."""
        return self._policy

    @abstractmethod
    async def get(self, key: UUID, names: Collection[str] | None = None) -> Mapping[str, StoredState] | None:
        """Return values of a session by name, without names that have none. All are of one moment.

        Args:
            key: Key of the session.
            names: Names of the values; all of the session unless given.

        Returns:
            The values, or `None` when the session is not live.

        Raises:
            InvalidValue: No value can have one of these names.
            RecordUnreadable: One of the values cannot be read.
        """

    @abstractmethod
    async def put(self, key: UUID, state: NewState, *, expected: int | None = None) -> int | None:
        """Store a value, in place of the one under its name, durably before this returns.

        Args:
            key: Key of the session.
            state: The value.
            expected: Version that the value must have now, `NO_VALUE` where there must be none; any unless given.

        Returns:
            The session's revision after the write, or `None` when the session is not live; then nothing is stored.

        Raises:
            StateConflict: The value has another version.
            StateFull: The value, or all of the session together, would be larger than the policy allows.
            InvalidValue: The value cannot be stored.
        """

    @abstractmethod
    async def delete(self, key: UUID, name: str, *, expected: int | None = None) -> int | None:
        """Remove a value. Where there is none, nothing is changed.

        Args:
            key: Key of the session.
            name: Name of the value.
            expected: Version that the value must have, if there is one; any unless given.

        Returns:
            The session's revision after the removal, or `None` when the session is not live.

        Raises:
            StateConflict: The value has another version.
            InvalidValue: No value can have this name.
        """

    @abstractmethod
    async def sweep(self, *, limit: int = STATE_SWEEP_LIMIT) -> StateSweepReport:
        """Remove values whose time is over, and those that a session left behind which an older version has ended.

        The caller repeats it while there is `more`. Any number of instances may sweep at once: none waits for another.

        Args:
            limit: Most values, and most sessions that have ended, that this step handles.
        """
