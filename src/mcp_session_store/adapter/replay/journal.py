"""Journaled calls, which set state that the handshake does not hold: stored before their answer, and replayed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["JOURNALED_METHODS", "ElsewhereChange", "Journal", "JournalWrite", "JournaledMethod", "StateName"]

MAX_SUBJECT: Final = 500
"""Bytes of a subject that is stored as it is; a longer one is stored as its SHA-256."""
MAX_PARAMS: Final = 8 * 1024
"""Highest number of bytes of a journaled call's params, as JSON."""
MAX_CHANGE: Final = 10 * 1024
"""Highest number of bytes of a change that travels with its call, as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JournaledMethod:
    """A request method that sets state of its session, which a restore has to set again.

    Of the calls about one subject the last one counts. A restore replays it with the params of then, in the order
    in which they came, and the handler sees the restore marker.
    """

    method: str
    """Method that is replayed."""
    subject: str | None = None
    """Parameter that names the subject of the state, such as `uri`; `None`: a session has one such state."""
    undone_by: str | None = None
    """Method that undoes the call with the same parameter; after it nothing is replayed."""


JOURNALED_METHODS: Final = (
    # MCP 2025-11-25, server/utilities/logging: the level holds for the session until it is set again.
    JournaledMethod(method="logging/setLevel"),
    # MCP 2025-11-25, server/resources, subscriptions.
    JournaledMethod(method="resources/subscribe", subject="uri", undone_by="resources/unsubscribe"),
)
"""The journaled methods of the protocol."""


_UNFIT: Final = {
    "initialize": "it is stored and replayed in any case",
    "notifications": "because only calls are answered, and so known to be stored",
    "tools": "because a tool call must run once at most",
}


class StateName(NamedTuple):
    """Name of a state that journaled calls set: of the calls that have the same name, the last one counts."""

    method: str
    """Method that sets it."""
    subject: str


@dataclass(frozen=True, slots=True)
class JournalWrite:
    """Change of a session's journal by one call."""

    method: str
    subject: str
    params: str | None
    """JSON text; `None`: the entry is removed."""

    @property
    def name(self) -> StateName:
        """Name of the state that the call sets."""
        return StateName(self.method, self.subject)


@dataclass(frozen=True, slots=True)
class ElsewhereChange:
    """A change of a session's record, as it travels from the copy that made it to the others."""

    revision: int
    """Revision of the session with the change."""
    name: StateName | None = None
    """Name of the state that a journaled call has set; `None`: there is no call to run, but something else to read."""
    method: str = ""
    """Method of the call."""
    params: dict[str, Any] | None = None

    def encode(self) -> str:
        """Return the change as JSON text.

        Raises:
            ValueError, RecursionError: The params cannot be written.
        """
        value: dict[str, Any] = {"revision": self.revision}
        if self.name is not None:
            value |= {"state": self.name, "method": self.method, "params": self.params}
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> ElsewhereChange:
        """Return the change that a text holds. What a newer version adds to it is left out.

        Raises:
            ValueError: The text holds none.
        """
        match json.loads(text):
            case {
                "revision": int(revision),
                "state": [str(setting), str(subject)],
                "method": str(method),
                "params": dict() | None as params,
            }:
                return cls(revision, StateName(setting, subject), method, params)
            case {"revision": int(revision)}:
                return cls(revision)
        raise ValueError("the text is not that of a change")


class Journal:
    """Rules that say which calls are journaled, and as what.

    Args:
        methods: Methods in addition to the protocol's own.

    Raises:
        ConfigurationError: A method cannot be journaled.
    """

    def __init__(self, methods: Iterable[JournaledMethod] = ()) -> None:
        self._setting: dict[str, JournaledMethod] = {}
        self._undoing: dict[str, JournaledMethod] = {}
        for method in (*JOURNALED_METHODS, *methods):
            if not isinstance(method, JournaledMethod):
                raise ConfigurationError(f"journaled_methods must hold JournaledMethod objects, not {method!r}")
            for name, table in ((method.method, self._setting), (method.undone_by, self._undoing)):
                if name is not None and (reason := _UNFIT.get(name.partition("/")[0])):
                    raise ConfigurationError(f"journaled_methods: {name} cannot be journaled, {reason}")
                if name in self._setting or name in self._undoing:
                    raise ConfigurationError(f"journaled_methods: {name} is journaled already; name each method once")
                if name is not None:
                    table[name] = method
        self.methods: Final = self._setting.keys() | self._undoing.keys()
        """Names of the methods whose calls are journaled."""

    def write(self, method: str, params: Mapping[str, Any] | None) -> JournalWrite:
        """Return what a call changes in the journal.

        Args:
            method: A journaled method.
            params: Params of the call, as the client sent them.

        Raises:
            MCPError: INVALID_PARAMS; the params cannot be stored.
        """
        rule = self._setting.get(method)
        undoing = rule is None
        rule = rule or self._undoing[method]
        try:
            subject = "" if rule.subject is None else _subject((params or {}).get(rule.subject))
            if undoing:
                return JournalWrite(rule.method, subject, None)
            text = json.dumps(params, allow_nan=False, separators=(",", ":"))
        except (ValueError, RecursionError):
            raise MCPError(
                code=INVALID_PARAMS,
                message=f"The params of {method} hold a number that is not finite, or are nested too deeply, and "
                "cannot be stored; send finite numbers in flat structures",
            ) from None
        if len(text) > MAX_PARAMS:
            raise MCPError(
                code=INVALID_PARAMS,
                message=f"The params of {method} have {len(text)} bytes as JSON, and at most {MAX_PARAMS} are stored",
            )
        return JournalWrite(rule.method, subject, text)

    def change(self, revision: int, write: JournalWrite, method: str, params: Mapping[str, Any] | None) -> str:
        """Return the text that says to other copies what a call has set, so that they run it, too.

        Args:
            revision: Revision of the session with the call.
            write: Change of the journal by the call.
            method: Method of the call.
            params: Params of the call, as the client sent them.
        """
        bare = ElsewhereChange(revision).encode()
        try:
            given = None if params is None else dict(params)
            text = ElsewhereChange(revision, write.name, method, given).encode()
        except (ValueError, RecursionError):
            return bare
        # The params of a call that undoes are not stored, and may be of any size.
        return text if len(text) <= MAX_CHANGE else bare

    def undoing(self, name: StateName) -> tuple[str, dict[str, Any] | None] | None:
        """Return method and params of a call that undoes a state; `None`: the name does not say them."""
        rule = self._setting.get(name.method)
        if rule is None or rule.undone_by is None or name.subject.startswith("sha256:"):
            return None
        if rule.subject is None:
            return rule.undone_by, None
        return rule.undone_by, {rule.subject: _value(name.subject)}


def _subject(value: object) -> str:
    # As JSON: ASCII without NUL, whatever the value holds. A text, as nearly all values are, stands for itself.
    text = json.dumps(value, sort_keys=True)
    plain = isinstance(value, str) and not value.startswith(("=", "sha256:"))
    text = text[1:-1] if plain else f"={text}"
    return text if len(text) <= MAX_SUBJECT else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _value(subject: str) -> object:
    """Return the value that a subject stands for, which is not too long to be stored as it is."""
    value: object = json.loads(subject[1:] if subject.startswith("=") else f'"{subject}"')
    return value
