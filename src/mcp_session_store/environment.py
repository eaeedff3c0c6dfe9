"""Settings as texts: names of environment variables, durations, and errors that name the variable or the option."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ENVIRONMENT_PREFIX", "NO_LIMIT", "Settings", "duration", "none_or", "truth", "variable"]

ENVIRONMENT_PREFIX: Final = "MCP_SESSION_STORE_"
"""Prefix of the names of environment variables: `MCP_SESSION_STORE_IDLE` is the retention policy's `idle`."""

NO_LIMIT: Final = "none"
"""Text for `None`, in capitals or not."""

_YES: Final = ("1", "yes", "true", "on", "t", "y")
_NO: Final = ("0", "no", "false", "off", "f", "n", "")
"""The empty text among them, because click reads a variable of blanks so."""
_UNITS: Final = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*")


def variable(setting: str) -> str:
    """Return the name of the environment variable of a setting."""
    return ENVIRONMENT_PREFIX + setting.upper()


def none_or(value: object) -> object:
    """Return `None` for the text `none`, and any other value as it is."""
    return None if isinstance(value, str) and value.strip().lower() == NO_LIMIT else value


def truth(text: str) -> bool:
    """Return whether a text says yes, as in the options of the commands.

    Raises:
        ValueError: It says neither yes nor no.
    """
    said = text.strip().lower()
    if said not in (*_YES, *_NO):
        raise ValueError(f"{text!r} is neither true nor false; write one of them")
    return said in _YES


def duration(value: object) -> object:
    """Return a `timedelta`, which a text such as `24h` is read as; `None` for the text `none`.

    Raises:
        ValueError: The value is not a duration, or too long a one.
    """
    value = none_or(value)
    if isinstance(value, str):
        if (match := _DURATION.fullmatch(value)) is None:
            raise ValueError(f"{value!r} is no duration; write a number with a unit, as in 90s, 30m, 24h, 7d, or none")
        try:
            return timedelta(**{_UNITS[match[2]]: float(match[1])})
        except OverflowError:
            raise ValueError(f"{value!r} is too long") from None
    # A bare number has no unit, and pydantic would take seconds for granted.
    if value is not None and not isinstance(value, timedelta):
        raise ValueError(f"{value!r} is no timedelta; give timedelta(hours=24), a text such as '24h', or None")
    return value


class Settings(BaseModel):
    """Frozen values that can be read from environment variables, or from the texts of options."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    prefix: ClassVar[str] = ""
    """Prefix of the names of its fields, where they are the names of variables or of options."""

    if not TYPE_CHECKING:  # or type checkers would take any argument for one that is known

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigurationError(self._explain(error, str)) from None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the values that environment variables ask for.

        A variable's name is `MCP_SESSION_STORE_` and the name of the field in capitals.

        Args:
            environment: The variables. One that is missing, or empty, leaves the default.

        Raises:
            ConfigurationError: A value makes no sense; the message names the variable.
        """
        return cls.from_texts(cls._texts(environment), name=lambda field: variable(cls.prefix + field))

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], *, name: Callable[[str], str] = str) -> Self:
        """Return the values that texts ask for.

        Args:
            texts: The texts by the names of the fields.
            name: Turns the name of a field into the name that the reader of an error knows.

        Raises:
            ConfigurationError: A value makes no sense; the message names it.
        """
        return cls._checked(texts, name=name)

    @classmethod
    def _texts(cls, environment: Mapping[str, str]) -> dict[str, str]:
        texts = {field: environment.get(variable(cls.prefix + field), "").strip() for field in cls.model_fields}
        return {field: text for field, text in texts.items() if text}

    @classmethod
    def _checked(cls, values: Mapping[str, Any], *, name: Callable[[str], str] = str) -> Self:
        checked = cls.__new__(cls)
        try:
            # Not by the constructor, whose error names the fields otherwise.
            BaseModel.__init__(checked, **values)
            return checked
        except ValidationError as error:
            raise ConfigurationError(cls._explain(error, name)) from None

    @classmethod
    def _explain(cls, error: ValidationError, name: Callable[[str], str]) -> str:
        """Return the problems in a line, each with the name of its setting."""
        problems = []
        for problem in error.errors():
            said = problem["msg"].removeprefix("Value error, ")
            if problem["loc"]:
                problems.append(f"{name(str(problem['loc'][0]))}: {said}")
            else:
                # A check of several fields names them itself.
                problems.append(re.sub(rf"\b({'|'.join(cls.model_fields)})\b", lambda field: name(field[0]), said))
        return "; ".join(problems)
