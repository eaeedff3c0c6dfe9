"""Journaled calls, which set state that the handshake does not hold: stored before their answer, and replayed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS

from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["JOURNALED_METHODS", "Journal", "JournalWrite", "JournaledMethod"]

MAX_SUBJECT: Final = 500
"""Bytes of a subject that is stored as it is; a longer one is stored as its SHA-256."""
MAX_PARAMS: Final = 8 * 1024
"""Highest number of bytes of a journaled call's params, as JSON."""


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


@dataclass(frozen=True, slots=True)
class JournalWrite:
    """Change of a session's journal by one call."""

    method: str
    subject: str
    params: str | None
    """JSON text; `None`: the entry is removed."""


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


def _subject(value: object) -> str:
    # As JSON: ASCII without NUL, whatever the value holds. A text, as nearly all values are, stands for itself.
    text = json.dumps(value, sort_keys=True)
    plain = isinstance(value, str) and not value.startswith(("=", "sha256:"))
    text = text[1:-1] if plain else f"={text}"
    return text if len(text) <= MAX_SUBJECT else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
