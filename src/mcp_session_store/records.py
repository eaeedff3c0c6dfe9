"""Values that stores keep and return; all are frozen."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from uuid import UUID

from mcp_session_store.errors import ConfigurationError, InvalidValue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta

__all__ = [
    "MAX_POSITION",
    "Change",
    "Changes",
    "EndReason",
    "EventKind",
    "EventPage",
    "Heartbeat",
    "JournalEntry",
    "NewEvent",
    "NewSession",
    "NewState",
    "Principal",
    "SessionRecord",
    "StoredEvent",
    "check_session",
    "check_texts",
    "checked_size",
    "display_text",
    "instance_name",
    "message_bytes",
    "session_key",
]

_NOT_SHOWN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
_RANDOM_BITS = ~(0xF << 76 | 0b11 << 62)
_VERSION_8 = 8 << 76 | 0b10 << 62  # and the variant, in bits 62 to 63
DISPLAY_LENGTH = 200
"""Number of characters kept of a text that a client chose."""


def session_key(session_id: str) -> UUID:
    """Return the primary key under which the session of an `Mcp-Session-Id` is stored.

    A version 8 UUID (RFC 9562, section 5.8) made from the SHA-256 of the id. Session ids are random (MCP 2025-11-25,
    basic/transports, session management), so the hash needs no salt, and a reader of the database finds none.

    Raises:
        ConfigurationError: The id is not a text.
    """
    if not isinstance(session_id, str):
        raise ConfigurationError(f"session_id must be a text, not a {type(session_id).__name__}")
    number = int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:16], "big")
    # Set by hand: `uuid.UUID(version=8)` and `uuid.uuid8` are newer than Python 3.11.
    return UUID(int=number & _RANDOM_BITS | _VERSION_8)


def display_text(value: object, *, length: int = DISPLAY_LENGTH) -> str:
    """Return a text that a client chose, made fit for terminals and logs; an empty one for any other value.

    Characters of the Unicode categories C (control, format, surrogate, unassigned), Zl and Zp (separators) are removed.

    Args:
        value: The value that the client sent.
        length: Number of characters to keep.
    """
    if not isinstance(value, str):
        return ""
    if value.isprintable():
        # Nearly all are; no character of these categories is printable.
        return value[:length]
    return "".join(c for c in value[: 4 * length] if unicodedata.category(c) not in _NOT_SHOWN)[:length]


def check_texts(**texts: str) -> None:
    """Refuse texts that a database cannot store.

    Postgres refuses a NUL, which ends a text for SQLite's functions. A lone surrogate has no encoding in UTF-8.

    Args:
        texts: Texts by their names, which the error mentions.

    Raises:
        InvalidValue: A text cannot be stored.
    """
    for name, text in texts.items():
        if "\0" in text:
            raise InvalidValue(f"{name} holds a NUL character, which cannot be stored")
        # Python knows of each text whether it is ASCII, so that most are not encoded for this.
        if not text.isascii() and _utf8_size(text) is None:
            raise InvalidValue(f"{name} holds a lone surrogate, which cannot be stored")


def _utf8_size(text: str) -> int | None:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        # Not raised from here: the error would hold the text.
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """The authenticated user of a session: a digest to compare, and a text to show.

    Two principals are equal when their client ids, issuers and subjects are, as the SDK compares them.
    """

    digest: bytes
    """SHA-256 over client id, issuer and subject; 32 bytes."""
    display: str = field(compare=False)
    """Client id, issuer and subject for people to read: without control characters, cut. Never compared."""

    @classmethod
    def of(cls, *, client_id: str, issuer: str | None = None, subject: str | None = None) -> Principal:
        """Return the principal of a client id, an issuer and a subject; `None` stands for an unknown component."""
        components = [client_id, issuer, subject]
        digest = hashlib.sha256(json.dumps(components).encode()).digest()
        return cls(digest=digest, display=display_text(" ".join(c for c in components if c)))


class EndReason(StrEnum):
    """Reason why a session ended."""

    CLIENT = "client"
    """The client sent DELETE."""
    REFUSED = "refused"
    """The application's `on_restore` hook refused it."""
    OPERATOR = "operator"
    """An operator or the application ended it, outside of the conversation."""
    EXPIRED = "expired"
    """Its idle time or its absolute lifetime, as the retention policy sets them, was over."""
    LIMIT = "limit"
    """Its principal opened more sessions than the retention policy allows, and this one had been idle for longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSession:
    """A session to be stored for the first time."""

    key: UUID
    initialize_params: str
    """The `params` of the client's `initialize`, as JSON text."""
    protocol_version: str
    """Protocol version that the handshake negotiated."""
    client_name: str = ""
    client_version: str = ""
    principal: Principal | None = None
    instance: str
    """Id of the instance that serves the session."""
    state: Sequence[NewState] = ()
    """Values that are stored with it, by a store that has a `StateStore` beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewState:
    """A value of a session's state, to be stored under a name."""

    name: str
    value: str = field(repr=False)  # as JSON text
    version: int
    """Number drawn at random for this write, from 1 to `MAX_VERSION`. A write that is repeated with it counts once."""
    ttl: float | None = None
    """Seconds by the store's clock after which there is no value any more; `None`: it lives as long as its session."""
    watched: bool = False
    """Whether each load of the record carries the value, and copies of the session learn of each change of it."""


def check_session(session: NewSession) -> None:
    """Refuse a session with a text that a database cannot store; see `check_texts`.

    Raises:
        InvalidValue: A text cannot be stored.
    """
    check_texts(
        initialize_params=session.initialize_params,
        protocol_version=session.protocol_version,
        client_name=session.client_name,
        client_version=session.client_version,
        principal="" if session.principal is None else session.principal.display,
        instance=session.instance,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """A live session as stored. Times are by the store's clock."""

    key: UUID
    namespace: str
    initialize_params: str = field(repr=False)
    protocol_version: str
    client_name: str
    client_version: str
    principal: Principal | None
    instance_hint: str
    """Id of the instance that last created or restored the session."""
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime | None
    """Time at which the session stops being live; `None`: never."""
    restores: int
    """Number of times that the session was restored."""
    revision: int
    """Number of changes to the messages that a restore replays."""
    loaded_at: datetime | None = field(default=None, compare=False)
    """Time of the load that returned the record, from which an instance computes when its copy ends; else `None`."""
    newest_event: int | None = field(default=None, compare=False)
    """Sequence of the session's newest event then, 0 without any; `None`: not known. See `EventLog.is_of`."""
    watched: Mapping[str, str] | None = field(default=None, compare=False, repr=False)
    """JSON texts of the watched values of its state then, by name; `None` where there are none. See `StateStore`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEntry:
    """A call that set state of a session, which a restore replays after the handshake."""

    method: str
    subject: str
    """Object of the state, such as the URI of a resource; empty where a session has only one such state."""
    params: str = field(repr=False)
    """The call's `params`, as JSON text."""
    revision: int = field(default=0, compare=False)  # that the call made; 0: unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change that copies of a session must learn of: its end, or more to replay."""

    key: UUID
    revision: int
    ended: EndReason | None  # `None` while the session has not ended


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of sessions up to a time."""

    changes: Sequence[Change]
    until: datetime
    """Time by the store's clock, at which the next call continues."""


class EventKind(StrEnum):
    """Kind of an event of a stream."""

    PRIMING = "priming"
    """An event without a message, which gives the client an id to resume from."""
    REQUEST = "request"
    """A request of the server to the client."""
    NOTIFICATION = "notification"
    RESPONSE = "response"
    """The result of the stream's call: the last event of the stream."""
    ERROR = "error"
    """The JSON-RPC error of the stream's call: the last event of the stream, too."""

    final: bool
    """Whether an event of this kind is the last one on the stream of a call."""

    def __init__(self, value: str) -> None:
        # An attribute, because it is asked for several times for each event, stored or read.
        self.final = value in ("response", "error")


MAX_POSITION: Final = 2**63 - 1
"""Highest position of an event, the largest signed integer of 64 bits."""


class _Measured:
    """Event whose message is encoded once to learn its size: it may have megabytes, and is counted at each stop."""

    __slots__ = ("_size",)

    message: str | None
    _size: tuple[int, bool]

    def _measure(self, message: str) -> tuple[int, bool]:
        """Return the bytes of a message that is not ASCII, in UTF-8, and whether it has no lone surrogate."""
        try:
            return self._size
        except AttributeError:
            size = _utf8_size(message)
            measured = (len(message.encode(errors="surrogatepass")), False) if size is None else (size, True)
            object.__setattr__(self, "_size", measured)  # the events are frozen
            return measured


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvent(_Measured):
    """An event to be stored."""

    stream: str
    """Name of a call's stream, which no other call of the session has, or `STANDALONE_STREAM`."""
    position: int
    """Place in the stream, unique and above that of the event before; at most `MAX_POSITION`."""
    previous: int = -1
    """Position of the last event before this one that a reader of the stream must have seen; -1: no such event."""
    kind: EventKind
    message: str | None = field(repr=False)
    """The JSON-RPC message, as JSON text; `None` for a priming event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent(_Measured):
    """An event of one stream, as stored."""

    sequence: int
    """Place among all events of the session."""
    position: int
    previous: int
    kind: EventKind
    message: str | None = field(repr=False)


def message_bytes(event: NewEvent | StoredEvent) -> int:
    """Return the number of bytes that an event counts for: those of its message, in UTF-8.

    Messages that cannot be encoded have a size, too, because it is the log that refuses them: see `checked_size`.
    """
    message = event.message
    if message is None:
        return 0
    return len(message) if message.isascii() else event._measure(message)[0]


def checked_size(event: NewEvent) -> int:
    """Return the size of an event as `message_bytes` does, and refuse texts that a database cannot store.

    Raises:
        InvalidValue: The stream or the message holds a NUL or a lone surrogate.
    """
    stream, message = event.stream, event.message
    if "\0" in stream or not stream.isascii():
        check_texts(stream=stream)
    if message is None:
        return 0
    if message.isascii():
        size = len(message)
    else:
        size, is_storable = event._measure(message)
        if not is_storable:
            raise InvalidValue("message holds a lone surrogate, which cannot be stored")
    if "\0" in message:
        raise InvalidValue("message holds a NUL character, which cannot be stored")
    return size


def instance_name(instance: str) -> str:
    """Return the unique part of an instance's id, which follows its last colon."""
    return instance.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Last heartbeat of an instance."""

    ago: timedelta
    """Time since then, by the store's clock."""
    released: bool = False
    """Whether the instance held something then that nothing holds now: it has died, or lost it a moment ago."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPage:
    """Consecutive events of one stream, and the range of the session's log at that time."""

    events: Sequence[StoredEvent]
    more: bool
    """Whether the stream may have further events, for which the page had no room."""
    first: int
    """Sequence of the oldest event of the session that is kept, on any stream; that of the next event if none is."""
    last: int
    """Sequence of the newest event of the session, on any stream: where to continue when `more` is False."""
