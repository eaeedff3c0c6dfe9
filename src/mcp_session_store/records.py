"""What is stored of a session, and what the application learns of a restore: frozen values, nothing else."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from uuid import UUID

from mcp_session_store.errors import InvalidValue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

__all__ = [
    "MAX_POSITION",
    "Activity",
    "Change",
    "Changes",
    "EndReason",
    "EventKind",
    "EventPage",
    "JournalEntry",
    "NewEvent",
    "NewSession",
    "Principal",
    "SessionRecord",
    "SessionRestoreMarker",
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
DISPLAY_LENGTH = 200
"""Characters that are kept of a text which clients choose themselves."""


def session_key(session_id: str) -> UUID:
    """The primary key under which a session is stored.

    A version 8 UUID (RFC 9562, section 5.8) made from the SHA-256 of the session id. Session ids
    are random (MCP 2025-11-25, basic/transports, session management), so the hash needs no salt,
    and somebody who reads the database cannot use what he finds as a session id.

    Args:
        session_id: The `Mcp-Session-Id`, as it travels in the header.
    """
    raw = bytearray(hashlib.sha256(session_id.encode()).digest()[:16])
    # Set by hand: `uuid.UUID(version=8)` and `uuid.uuid8` are newer than Python 3.11.
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return UUID(bytes=bytes(raw))


def display_text(value: object, *, length: int = DISPLAY_LENGTH) -> str:
    """A text that a client chose, made fit for terminals and logs; empty for what is no text.

    Control, format, surrogate and unassigned characters (Unicode general category C) come out, and so do
    separators of lines and paragraphs (Zl, Zp).

    Args:
        value: What the client sent.
        length: Characters that are kept.
    """
    if not isinstance(value, str):
        return ""
    return "".join(c for c in value[: 4 * length] if unicodedata.category(c) not in _NOT_SHOWN)[:length]


def check_texts(**texts: str) -> None:
    """Refuse texts that a database cannot store.

    A NUL is refused by Postgres ("Character Types" in its manual), and ends a text for SQLite's functions. A lone
    surrogate has no encoding in UTF-8.

    Args:
        texts: Texts by their names, which the error mentions.

    Raises:
        InvalidValue: A text cannot be stored.
    """
    for name, text in texts.items():
        if "\0" in text:
            raise InvalidValue(f"{name} holds a NUL character, which cannot be stored")
        # The characters of a text remember whether they are ASCII, so that most texts are not looked through.
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
    """Whose session it is: a digest to compare, and a text to show.

    Two principals are equal when client id, issuer and subject are, as the SDK compares them.
    """

    digest: bytes
    """SHA-256 over client id, issuer and subject; 32 bytes."""
    display: str = field(compare=False)
    """The three of them, for people: control characters removed, cut. Never compared."""

    @classmethod
    def of(cls, *, client_id: str, issuer: str | None = None, subject: str | None = None) -> Principal:
        """The principal of these three components; one that is not known is `None`."""
        components = [client_id, issuer, subject]
        digest = hashlib.sha256(json.dumps(components).encode()).digest()
        return cls(digest=digest, display=display_text(" ".join(c for c in components if c)))


class EndReason(StrEnum):
    """Why a session ended."""

    CLIENT = "client"
    """The client sent DELETE."""
    REFUSED = "refused"
    """The application's `on_restore` hook refused to have it back."""
    OPERATOR = "operator"
    """Somebody ended it from outside of the conversation."""
    EXPIRED = "expired"
    """It was idle, or had lived, for as long as the retention policy allows."""
    LIMIT = "limit"
    """Its principal opened more sessions than the retention policy allows, and this one was idle for longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSession:
    """A session that is about to be stored for the first time."""

    key: UUID
    initialize_params: str
    """The `params` of the client's `initialize`, as JSON text."""
    protocol_version: str
    """The version that the handshake negotiated."""
    client_name: str = ""
    client_version: str = ""
    principal: Principal | None = None
    instance: str
    """The instance that serves the session."""


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
    """What the store holds of a live session. Times are the store's own."""

    key: UUID
    namespace: str
    initialize_params: str = field(repr=False)
    protocol_version: str
    client_name: str
    client_version: str
    principal: Principal | None
    instance_hint: str
    """The instance that last created or restored the session."""
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime | None
    """When it stops being live; `None`: never."""
    restores: int
    """How many times it was restored."""
    revision: int
    """Rises with each change of what a restore replays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """That a session was in use, in seconds before now on the reporting instance's monotonic clock.

    Ages, not times: the store subtracts them from its own clock, so that an instance whose wall
    clock is wrong reports the same as any other.
    """

    key: UUID
    first_age: float
    """How long ago the first activity was that has not been reported yet, in seconds."""
    last_age: float
    """How long ago the last one was, in seconds; at most `first_age`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEntry:
    """A call that set state of a session which the handshake does not hold, to be replayed in a restore."""

    method: str
    subject: str
    """What the state is about, such as the URI of a resource; empty where a session has one such state."""
    params: str = field(repr=False)
    """The call's `params`, as JSON text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What copies of a session must learn: that it ended, or that there is more to replay than they know."""

    key: UUID
    revision: int
    ended: EndReason | None
    """Why it ended; `None`: it has not."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of sessions up to a moment."""

    changes: Sequence[Change]
    until: datetime
    """By the store's clock: where the next call goes on."""


class EventKind(StrEnum):
    """What an event of a stream is."""

    PRIMING = "priming"
    """No message: it only gives the client an id to resume from."""
    REQUEST = "request"
    """A question of the server to the client."""
    NOTIFICATION = "notification"
    RESPONSE = "response"
    """The result of the call that the stream belongs to: the last event of it."""
    ERROR = "error"
    """The JSON-RPC error of that call: the last event of it, too."""

    @property
    def final(self) -> bool:
        """Whether nothing follows it on the stream of a call."""
        return self in (EventKind.RESPONSE, EventKind.ERROR)


MAX_POSITION: Final = 2**63 - 1
"""Highest position of an event: a signed integer of 64 bits."""


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
    """An event that is about to be stored."""

    stream: str
    """The stream of a call, by a name that no other call of the session has, or `STANDALONE_STREAM`."""
    position: int
    """Unique in its stream, and above that of the event before it."""
    previous: int = -1
    """The position of the last event before it that whoever reads the stream must have seen; -1: there is none."""
    kind: EventKind
    message: str | None = field(repr=False)
    """The JSON-RPC message, as JSON text; `None` for a priming event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent(_Measured):
    """An event of one stream, as the log holds it."""

    sequence: int
    """Its place among all events of the session."""
    position: int
    previous: int
    kind: EventKind
    message: str | None = field(repr=False)


def message_bytes(event: NewEvent | StoredEvent) -> int:
    """How many bytes an event counts for: those of its message, in UTF-8.

    Of one that cannot be encoded, too: to refuse it is up to the log.
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
    """The unique part of an instance's id: what follows its last colon."""
    return instance.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPage:
    """Some events of one stream, and between which ones the log of the session stands."""

    events: Sequence[StoredEvent]
    more: bool
    """There may be further events of the stream, for which the page had no room."""
    first: int
    """The sequence of the oldest event of the session, of any stream, that is kept. Where none is, that of the next."""
    last: int
    """The sequence of the newest event of the session, of any stream: where to go on when there is no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRestoreMarker:
    """What the application finds in its context when the session was restored.

    See `get_restore_marker`.
    """

    session_id: str = field(repr=False)
    created_at: datetime
    """When the session was opened, by the store's clock."""
    restored_at: datetime
    """When this instance began to restore it, by this instance's clock."""
    restores: int
    """How many times the session has been restored, this one included."""
    previous_instance: str
    """The instance that created or restored the session before."""
    replaying: bool
    """True on the messages that are replayed, False on the client's own afterwards."""
