"""What a copy knows of the way that goes from it to the client's stream on another instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from mcp.shared.message import SessionMessage
    from mcp_types import JSONRPCMessage

__all__ = ["Outlet", "Outlets", "StreamRelay"]


class Outlet(Protocol):
    """Way of what one copy says outside of calls to the client's GET stream, wherever that is open."""

    async def takes(self, item: SessionMessage) -> bool:
        """Take what the copy says outside of calls; return whether it was taken, or goes to the transport.

        Raises:
            NoBackChannelError: It is a question, and too much waits.
        """

    def opened(self) -> None:
        """Note that a response opens the stream here, which no other one here has."""

    def received(self, message: JSONRPCMessage) -> bool:
        """Note that a response takes a message from the transport; return whether it is to send it."""

    def closed(self) -> None:
        """Note that the response has ended, and no other one here has taken the stream over."""

    def take(self) -> None:
        """Take what waits elsewhere for the stream, if that is open here, in the background."""

    async def rest(self) -> None:
        """Wait until what was taken and not sent is left to the next holder of the stream."""


class Outlets(Protocol):
    """Makes the outlets of an instance."""

    def make(self, session: Any) -> Outlet:
        """Return the outlet of a copy."""


class StreamRelay(Protocol):
    """Connects copies with the clients' streams on other instances."""

    @property
    def outlets(self) -> Outlets | None:
        """Makes the ways to the streams; `None` where the event log is one."""

    @property
    def attach(self) -> Callable[[Any], None] | None:
        """Called with each new copy; `None`: nothing is."""
