"""The open responses of the SDK's transport, to which a session's messages go at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_session_store.adapter.sdk import TransportStreams

__all__ = ["LiveStreams"]


class LiveStreams:
    """Open responses of a transport, by the SDK's names of their streams.

    Args:
        streams: Streams of the transport.
        close: Closes one of them.
    """

    def __init__(self, streams: TransportStreams, close: Callable[[str], None]) -> None:
        self._streams = streams
        self._close = close

    def is_open(self, stream_id: str) -> bool:
        """Return whether a message on this stream goes to a client."""
        return stream_id in self._streams

    def is_blocked(self, stream_id: str) -> bool:
        """Return whether the next message on this stream, and with it all of the session, waits for its client."""
        if (stream := self._streams.get(stream_id)) is None:
            return False
        # The message that was just stored is still to come.
        statistics = stream[0].statistics()
        return statistics.current_buffer_used >= statistics.max_buffer_size

    def close(self, stream_id: str) -> None:
        """Close the response; its client comes back for the rest."""
        self._close(stream_id)
