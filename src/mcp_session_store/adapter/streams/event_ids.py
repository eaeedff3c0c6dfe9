"""Event ids: opaque to clients, and to this package the place from which a stream goes on.

MCP 2025-11-25, basic/transports, resumability and redelivery: an id is unique among all streams of its session, and
names its stream.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import TYPE_CHECKING, Final, NamedTuple

from mcp_session_store.adapter.streams.calls import CALL_STREAM
from mcp_session_store.event_log import STANDALONE_STREAM

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_types import RequestId

__all__ = ["Cursor", "EventIds", "fits"]

TAG_SIZE: Final = 6
MAX_EVENT_ID: Final = 400
"""Characters of an event id that is read; those that are written have fewer."""
MAX_REQUEST_ID: Final = 100
"""Bytes of a request id as JSON for which an event id has room."""
_LARGE: Final = 10 ** (MAX_REQUEST_ID - 1)
"""Integer with too many digits, and a sign."""
_MAX_SEQUENCE: Final = 2**62
"""Far beyond any sequence, and with room to count on in 64 bits."""
_MAX_POSITION: Final = 2**63
_FINAL: Final = "!"
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")


class Cursor(NamedTuple):
    """Place of an event that a client has, from which its stream goes on."""

    stream: str
    """Name of the stream."""
    sequence: int
    """Sequence of the event among all of the session."""
    position: int
    """Position of the event in its stream."""
    request_id: RequestId | None = None
    """Id of the stream's call, so that the call can be ended whatever is left of the stream."""
    final: bool = False
    """Whether nothing follows, because the call is answered."""

    @property
    def standalone(self) -> bool:
        """Whether the stream is the one that belongs to no call."""
        return self.stream == STANDALONE_STREAM

    @property
    def instance(self) -> str:
        """Name of the instance that runs the call."""
        return self.stream.partition(".")[0]

    def at(self, *, sequence: int, position: int | None = None, final: bool = False) -> Cursor:
        """Return the place of another event of the stream."""
        position = self.position if position is None else position
        return Cursor(self.stream, sequence, position, self.request_id, final)


class EventIds:
    """Writes and reads the event ids of one session.

    Each carries a tag that the ids of no other session have, so that an id of another session is refused without a
    query, and reveals nothing about that session.

    Args:
        key: Key of the session.
    """

    def __init__(self, key: UUID) -> None:
        self._empty_tag = hashlib.blake2b(key=key.bytes, digest_size=TAG_SIZE)

    def write(
        self, stream: str, sequence: int, position: int, request_id: RequestId | None = None, final: bool = False
    ) -> str:
        """Return the event id of an event: of the place that a `Cursor` of these fields is."""
        text = f"{sequence:x}/{position:x}/{stream}/{_FINAL if final else ''}"
        if request_id is not None:
            text = f"{text}/{request_id if type(request_id) is int else _encode(request_id)}"
        payload = text.encode()
        # As `_tag` does, because each event has an id, and a call of a function shows in what it costs.
        tag = self._empty_tag.copy()
        tag.update(payload)
        encoded = binascii.b2a_base64(tag.digest() + payload, newline=False)
        return encoded.translate(_URL_SAFE, b"=").decode()

    def read(self, event_id: str) -> Cursor | None:
        """Return the place of the event with an id; `None` for an id that this session has never sent."""
        if len(event_id) > MAX_EVENT_ID:
            return None
        try:
            raw = base64.b64decode(event_id + "=" * (-len(event_id) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        tag, payload = raw[:TAG_SIZE], raw[TAG_SIZE:]
        if tag != self._tag(payload):
            return None
        # A client that knows the session's id could have written the event id itself.
        try:
            sequence, position, stream, final, *request = payload.decode().split("/", 4)
            request_id = json.loads(request[0]) if request else None
            cursor = Cursor(stream, int(sequence, 16), int(position, 16), request_id, final == _FINAL)
        except ValueError:
            return None
        # Not written otherwise, as with leading zeros.
        return cursor if _is_ours(cursor) and self.write(*cursor) == event_id else None

    def _tag(self, payload: bytes) -> bytes:
        tag = self._empty_tag.copy()
        tag.update(payload)
        return tag.digest()


def _is_ours(cursor: Cursor) -> bool:
    """Return whether a server gives event ids of this place, if there is an event."""
    if not (0 <= cursor.sequence < _MAX_SEQUENCE and 0 <= cursor.position < _MAX_POSITION):
        return False
    if cursor.standalone:
        # Its priming event is stored, and it is never answered.
        return cursor.request_id is None and cursor.sequence > 0 and not cursor.final
    if not CALL_STREAM.fullmatch(cursor.stream):
        return False
    request_id = cursor.request_id
    return isinstance(request_id, int | str) and not isinstance(request_id, bool) and fits(request_id)


def fits(request_id: RequestId) -> bool:
    """Return whether an event id can hold a request id, without which a lost call could not be ended."""
    if type(request_id) is int:
        return -_LARGE < request_id < 10 * _LARGE
    try:
        return len(_encode(request_id).encode()) <= MAX_REQUEST_ID
    except UnicodeEncodeError:
        return False  # a lone surrogate, which no message to the client can hold either


_encode: Final = json.JSONEncoder(ensure_ascii=False).encode
"""Made once, because `json.dumps` makes an encoder for each call."""
