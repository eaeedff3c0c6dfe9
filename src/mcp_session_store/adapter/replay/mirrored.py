"""Mirrored calls: journaled calls that another copy of the session has run, run in this copy while it serves."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import anyio
from mcp.shared.exceptions import NoBackChannelError
from mcp.shared.message import ServerMessageMetadata
from mcp_types import JSONRPCError, JSONRPCRequest, JSONRPCResponse

from mcp_session_store import telemetry
from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.replay.context import is_replayed, next_request_id, request_of
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcp.server.streamable_http import StreamableHTTPServerTransport
    from mcp.shared.message import SessionMessage
    from mcp_types import RequestId
    from starlette.types import Scope

    from mcp_session_store.adapter.replay.marker import SessionRestoreMarker
    from mcp_session_store.adapter.replay.replay import ReplayedCopy

__all__ = ["MirroredCall", "MirroredCalls"]

logger = logging.getLogger(__name__)


class MirroredCall:
    """One call on its way through the copy."""

    __slots__ = ("answer", "answered")

    def __init__(self) -> None:
        self.answer: JSONRPCResponse | JSONRPCError | None = None
        """Answer of the server's, which goes to no client."""
        self.answered = Latch()


class MirroredCalls:
    """Runs calls in a copy that serves its client, whose server loop reads them like those of the client.

    The SDK's own server loop serves a new session, and gives no access to its kernel. So the answer to such a call, and
    what its handler says in relation to it, are taken off what the loop writes; what it asks in that way is refused.

    Args:
        transport: Transport of the copy.
        copy: The copy, which is busy while handlers run.
        timeout: Seconds that a call may take until the next one goes on beside it.
        found: What the handlers find in the ASGI scope, besides the marker.
    """

    __slots__ = ("_copy", "_found", "_running", "_timeout", "_transport")

    def __init__(
        self,
        transport: StreamableHTTPServerTransport,
        copy: ReplayedCopy,
        *,
        timeout: float,
        found: Mapping[str, object],
    ) -> None:
        self._transport = transport
        self._copy = copy
        self._timeout = timeout
        self._found = found
        self._running: dict[RequestId, MirroredCall] = {}

    @property
    def is_late(self) -> bool:
        """Whether a call runs that was not waited for any longer."""
        return bool(self._running)

    def has(self, request_id: RequestId) -> bool:
        """Return whether a call of this id runs."""
        return request_id in self._running

    def takes(self, item: SessionMessage) -> bool:
        """Take what the server loop writes, if it belongs to a mirrored call; return whether it does.

        Raises:
            NoBackChannelError: It is a question.
        """
        message, metadata = item.message, item.metadata
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            if message.id is None or not is_replayed(message.id):
                return False
            self._end(message.id, message)
            return True
        # Also of a call that is over: a handler may leave a task behind.
        if not isinstance(metadata, ServerMessageMetadata) or not is_replayed(metadata.related_request_id):
            return False
        if isinstance(message, JSONRPCRequest):
            raise NoBackChannelError(message.method)
        return True

    def _end(self, request_id: RequestId, answer: JSONRPCResponse | JSONRPCError | None) -> None:
        if (call := self._running.pop(request_id, None)) is not None:
            call.answer = answer
            call.answered.set()
            self._copy.finished(None)

    async def run(
        self, session_id: str, marker: SessionRestoreMarker, method: str, params: dict[str, Any] | None
    ) -> MirroredCall | None:
        """Run a call, and wait for its answer unless it is slow; return `None` if the server loop has not read it.

        Args:
            session_id: Id of the session.
            marker: Marker that the handler finds in its context.
            method: Method of the call.
            params: Its params.
        """
        if params is not None and "_meta" in params:
            params, _ = telemetry.without_trace(params)
        request_id = next_request_id()
        message = JSONRPCRequest(jsonrpc="2.0", id=request_id, method=method, params=params)
        body = json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}).encode()
        request = request_of({**scope_of(session_id, marker), **self._found}, body)
        # After one that is slow the others do not wait for each other, as in a replay.
        is_waited_for = not self.is_late
        call = self._running[request_id] = MirroredCall()
        self._copy.read(None)
        is_read = False
        with anyio.move_on_after(self._timeout):
            try:
                await sdk.deliver(self._transport, message, request, can_ask=False)
                is_read = True
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # the copy leaves memory
            finally:
                if not is_read:
                    self._end(request_id, None)
            if is_read and is_waited_for:
                await call.answered.wait()
        return call if is_read else None


def scope_of(session_id: str, marker: SessionRestoreMarker | None) -> Scope:
    """Return the ASGI scope of a request that could have brought a message here.

    Of the request that brought it to another instance nothing is kept.

    Args:
        session_id: Id of the session.
        marker: Marker that the handler of the message finds.
    """
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"mcp-session-id", session_id.encode()), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    if marker is not None:
        scope[RESTORE_MARKER] = marker
    return scope
