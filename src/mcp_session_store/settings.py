"""Settings of one process: every number, with its default, its unit and its check."""

from __future__ import annotations

import contextlib
import math
import os
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import BeforeValidator, Field
from typing_extensions import override

from mcp_session_store.environment import Settings, none_or, variable
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import UnionType

__all__ = [
    "DEFAULT_TIMEOUT",
    "NOT_GIVEN",
    "OPERATOR_TIMEOUT",
    "InstanceSettings",
    "NotGiven",
    "Unit",
    "checked_flags",
    "checked_pool_size",
    "checked_seconds",
    "checked_type",
    "read_pool_size",
]

DEFAULT_TIMEOUT: Final = 5.0
"""Seconds that a call of a store or an event log in a database takes at most, unless given."""
OPERATOR_TIMEOUT: Final = 30.0
"""Seconds that a call of an operator's command to the database takes at most, unless given."""


MAX_PATIENCE: Final = 30.0
"""Seconds that a request may not wait for the store, because many clients give up after as many."""


class NotGiven(Enum):
    """Type of `NOT_GIVEN`."""

    NOT_GIVEN = "not given"


NOT_GIVEN: Final = NotGiven.NOT_GIVEN
"""Default of a keyword for which `None` is a value."""


class Unit(Enum):
    """What a number counts."""

    SECONDS = "seconds"
    BYTES = "bytes"
    SESSIONS = "sessions"


def _positive_seconds(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number of seconds; give one, as in 30 or 0.5")
    return value


def _seconds_or_none(value: object) -> object:
    try:
        return None if value is None else _positive_seconds(value)
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


def _positive_count(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{value!r} is not a positive whole number; give one, as in 1000")
    return value


def _patience(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_PATIENCE:
        raise ValueError(
            f"{value!r} is not a number of seconds from 0 to less than {MAX_PATIENCE:g}; give one, as in 10"
        )
    return value


def _count_or_none(value: object) -> object:
    try:
        return None if value is None else _positive_count(value)
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


def checked_seconds(name: str, value: object) -> float:
    """Return a number of seconds.

    Raises:
        ConfigurationError: The value is not a positive number; the message names it.
    """
    try:
        _positive_seconds(value)
    except ValueError as error:
        raise ConfigurationError(f"{name}={error}") from None
    assert isinstance(value, int | float)
    return float(value)


def checked_pool_size(value: object) -> int | None:
    """Return a number of connections, or `None` where none is given.

    Raises:
        ConfigurationError: The value is not a positive whole number.
    """
    if value is None:
        return None
    try:
        _positive_count(value)
    except ValueError as error:
        raise ConfigurationError(f"pool_size={error}") from None
    assert isinstance(value, int)
    return value


def read_pool_size(text: str) -> int | None:
    """Return the number of connections that a text stands for.

    Raises:
        ValueError: It is not a positive whole number.
    """
    value = _read(text)
    _positive_count(value)
    return checked_pool_size(value)


def checked_type(name: str, value: object, types: type | UnionType, wanted: str) -> None:
    """Refuse a value of another type than an argument can have.

    Args:
        name: Name of the argument.
        value: The value.
        types: Types that it may have.
        wanted: What to give, in words.

    Raises:
        ConfigurationError: The value has another type; the message names the argument.
    """
    if not isinstance(value, types):
        raise ConfigurationError(f"{name} must be {wanted}, not a {type(value).__name__}")


def checked_flags(**flags: object) -> None:
    """Refuse values that are neither true nor false.

    Args:
        **flags: The values by the names of the arguments.

    Raises:
        ConfigurationError: One of them is something else; the message names the argument.
    """
    for name, value in flags.items():
        checked_type(name, value, bool, "True or False")


_Seconds = Annotated[float, BeforeValidator(_positive_seconds), Unit.SECONDS]
_SecondsOrNone = Annotated[float | None, BeforeValidator(_seconds_or_none), Unit.SECONDS]


class InstanceSettings(Settings):
    """Every number of a process that serves sessions; two processes of one server may differ in them.

    Each can be set by an environment variable, `MCP_SESSION_STORE_` and its name in capitals, and by an option of
    `mcp-session-store serve`; there the text `none` stands for `None`.

    Raises:
        ConfigurationError: A value makes no sense; the message names its field.
    """

    evict_after: _SecondsOrNone = Field(
        default=300.0,
        description="Seconds that a session without a request stays in memory; the next request for it restores it. "
        "None: until memory is full.",
    )
    max_sessions: Annotated[int | None, BeforeValidator(_count_or_none), Unit.SESSIONS] = Field(
        default=10_000,
        description="Sessions in memory at most. One more evicts the one that has been idle for longest; when all are "
        "in use, it is refused for now. None: no limit.",
    )
    end_within: _Seconds = Field(
        default=5.0,
        description="Seconds within which a session that was ended elsewhere is refused here, if this process reaches "
        "the store. Half of them lie between two polls for changes, each one query for all sessions. A process that "
        "was paused for longer asks the store before it serves a session again.",
    )
    serve_unverified_for: _SecondsOrNone = Field(
        default=None,
        description="Seconds for which sessions in memory are served while the store cannot be asked whether they have "
        "ended; after that their requests wait, as others do in an outage. None: until the store is back.",
    )
    sweep_interval: _SecondsOrNone = Field(
        default=60.0,
        description="Seconds between two sweeps of the store, and of the event log, by this process. None: it never "
        "sweeps, because cron does.",
    )
    activity_interval: _SecondsOrNone = Field(
        default=None,
        description="Seconds between two reports of which sessions are in use; at most a quarter of the retention "
        "policy's idle time. None: 15, or that quarter.",
    )
    instance_timeout: _Seconds = Field(
        default=30.0,
        description="Seconds without a heartbeat after which an instance is considered dead and its calls lost, where "
        "its death is not noticed at once; each sends three in that time. The same for all instances.",
    )
    replay_timeout: _Seconds = Field(
        default=5.0,
        description="Seconds that a replay may take: for the answer to initialize, and again for the handler of "
        "notifications/initialized, which then goes on beside the client's requests.",
    )
    outage_patience: Annotated[float, BeforeValidator(_patience), Unit.SECONDS] = Field(
        default=20.0,
        description="Seconds that a request waits at most for a store that is away, from its arrival on; less than "
        "30. 0: none waits.",
    )
    max_initialize_params: Annotated[int, BeforeValidator(_positive_count), Unit.BYTES] = Field(
        default=8 * 1024,
        description="Bytes of initialize params, as JSON, that are stored at most; more are refused with "
        "INVALID_PARAMS.",
    )

    @classmethod
    def given(cls, settings: InstanceSettings | None, /, **keywords: object) -> InstanceSettings:
        """Return the settings that a caller gives, as one value or as keywords.

        Args:
            settings: All at once.
            **keywords: One by one; `NOT_GIVEN` leaves the default.

        Raises:
            ConfigurationError: Both are given, or a keyword's value makes no sense; the message names it.
        """
        values = {name: value for name, value in keywords.items() if value is not NOT_GIVEN}
        if settings is None:
            return cls._checked(values)
        if not isinstance(settings, InstanceSettings):
            raise ConfigurationError(
                f"settings={settings!r} is not an InstanceSettings; give one, or its values by keyword"
            )
        if values:
            raise ConfigurationError(
                f"{', '.join(values)} and settings= are given at once; give all in settings=, or all by keyword"
            )
        return settings

    def completed(self, environment: Mapping[str, str] = os.environ) -> Self:
        """Return these settings, with those that were not given taken from environment variables.

        Args:
            environment: The variables. One whose setting was given here is not read.

        Raises:
            ConfigurationError: A value makes no sense; the message names the variable.
        """
        here = {name: getattr(self, name) for name in self.model_fields_set}
        asked = {name: text for name, text in self._texts(environment).items() if name not in here}
        return self.from_texts(asked, name=variable).model_copy(update=here)

    @classmethod
    @override
    def from_texts(cls, texts: Mapping[str, str], *, name: Callable[[str], str] = str) -> Self:
        return cls._checked({field: _read(text) for field, text in texts.items()}, name=name)


def _read(text: str) -> object:
    """Return the number that a text stands for, or else the text, which the check of its field refuses."""
    value = none_or(text)
    for kind in (int, float):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = kind(value)
    return value
