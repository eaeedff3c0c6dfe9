"""Requests without a session id: an `initialize` opens a session, the SDK refuses all others."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from mcp_session_store.adapter.refusals import refuse
from mcp_session_store.adapter.requests import INITIALIZE
from mcp_session_store.adapter.responses import MemoryFull, response_to
from mcp_session_store.adapter.sessions.held_response import HeldResponse
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from starlette.types import Scope, Send

    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.admission import Admission
    from mcp_session_store.adapter.sessions.departures import Departures
    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.registry import Registry

__all__ = ["Opener"]


class Opener:
    """Opens sessions.

    Args:
        registry: Registry that evicts the copy when the request opens no session.
        admission: Makes the copy and runs its server loop.
        writer: Commits the record, which publishes the session.
        tasks: Task group in which the server loop runs.
        departures: Watches the clients that wait for JSON responses; `None` where there are none.
    """

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        writer: RecordWriter,
        tasks: ManagerTasks,
        *,
        departures: Departures | None,
    ) -> None:
        self._registry = registry
        self._admission = admission
        self._writer = writer
        self._tasks = tasks
        self._departures = departures

    async def open(self, requestor: AuthorizationContext | None, scope: Scope, incoming: Incoming, send: Send) -> None:
        """Serve a request without a session id, whose body was read."""
        receive = incoming.receive
        # What it looks like; whether it opens a session is known when the handshake is committed.
        opens = scope["method"] == "POST" and INITIALIZE in incoming.body
        session_id = uuid4().hex
        try:
            session = self._admission.admit(session_id, requestor, opens=opens)
        except MemoryFull as error:
            answer = refuse(error, session_key(session_id), self._registry.log)
            await response_to(answer, scope, incoming.body)(scope, receive, send)
            return
        # Until it is answered it is in use.
        session.pin()
        held = HeldResponse(session, scope, incoming, send, opening=True)
        scope[RESIDENT_SESSION] = session
        scope[RECORD_WRITER] = self._writer

        async def serve(send: Send) -> None:
            await self._tasks.start(self._admission.run, session)
            await session.transport.handle_request(scope, receive, send)

        if self._departures is not None:
            self._departures.waiting[incoming] = session.transport
        try:
            await held.answered_by(serve)
        finally:
            if self._departures is not None:
                del self._departures.waiting[incoming]
                self._departures.over(incoming)
            session.unpin()
            if not held.opened:
                await self._registry.evict(session)
