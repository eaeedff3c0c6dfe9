"""Clients that go away from a JSON response: the SDK does not notice, and the request lasts as long as its call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.background import report_failure

if TYPE_CHECKING:
    from mcp.server.streamable_http import StreamableHTTPServerTransport

    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.sdk import ManagerTasks

__all__ = ["LOOK_INTERVAL", "Departures"]

LOOK_INTERVAL: Final = 5.0
"""Seconds between two looks. A request that two of them have seen is watched."""


class Departures:
    """Ends the JSON responses whose clients have gone; their calls run on, as with SSE.

    Only a request that lasts is watched, because that costs a task.

    Args:
        tasks: Task group in which requests are watched.
    """

    def __init__(self, tasks: ManagerTasks) -> None:
        self.waiting: Final[dict[Incoming, StreamableHTTPServerTransport]] = {}
        """Requests being answered by JSON, each with the transport that answers it.

        Filled and emptied by those that serve requests, because a call of a function each would show.
        """
        self.watches: Final[dict[Incoming, anyio.CancelScope]] = {}
        """Requests that are watched."""
        self._seen: list[Incoming] = []
        """Requests that waited at the last look."""
        self._tasks = tasks

    async def look(self) -> None:
        """Watch the requests that have waited since the last look."""
        for incoming in self._seen:
            if incoming in self.waiting and incoming not in self.watches:
                self.watches[incoming] = anyio.CancelScope()
                self._tasks.start_soon(self._watch, incoming, self.waiting[incoming])
        self._seen = list(self.waiting)

    def over(self, incoming: Incoming) -> None:
        """End the watch of a request that does not wait any more."""
        if (watch := self.watches.get(incoming)) is not None:
            watch.cancel()

    async def _watch(self, incoming: Incoming, transport: StreamableHTTPServerTransport) -> None:
        try:
            with self.watches[incoming]:
                await incoming.disconnected()
                sdk.end_json_response(transport, incoming.body)
        except Exception as error:
            report_failure("departures", error)
        finally:
            del self.watches[incoming]
