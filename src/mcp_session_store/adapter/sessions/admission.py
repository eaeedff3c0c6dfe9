"""Copies of sessions: what a copy is made of, and its server task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from mcp_session_store.adapter.sessions.resident import ResidentSession
from mcp_session_store.adapter.sessions.server_loop import ServerLoop
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskStatus
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.streamable_http import StreamableHTTPServerTransport

    from mcp_session_store.adapter.question_ids import QuestionIds
    from mcp_session_store.adapter.sessions.outlets import StreamRelay
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.server_loop import ServeLoop
    from mcp_session_store.adapter.streams.recorder import EventRecorder

__all__ = ["Admission"]


class Admission:
    """Makes copies of sessions and runs their server loops, for new and restored sessions alike.

    Args:
        registry: Registry in which each copy reserves its place.
        make_transport: Makes the SDK's transport for a session id, and for the session's events if it has any.
        serve_loop: The SDK's server loop.
        question_ids: Makes the ids of what the copies ask their clients.
        recorder: Stores the events of streams; `None`: no stream can be resumed.
        retry_interval: Milliseconds after which clients are to come back for a stream, as for the SDK's transport.
        relay: Connects copies with the clients' streams on other instances; `None`: nothing does.
    """

    def __init__(
        self,
        registry: Registry,
        make_transport: Callable[[str, SessionEvents | None], StreamableHTTPServerTransport],
        serve_loop: ServeLoop,
        question_ids: QuestionIds,
        recorder: EventRecorder | None,
        *,
        retry_interval: int | None,
        relay: StreamRelay | None,
    ) -> None:
        self._registry = registry
        self._make_transport = make_transport
        self._serve_loop = serve_loop
        self._question_ids = question_ids
        self._recorder = recorder
        self._retry_interval = retry_interval
        self._outlets = None if relay is None else relay.outlets
        self._attach = None if relay is None else relay.attach

    def admit(
        self, session_id: str, owner: AuthorizationContext | None, *, opens: bool | None = None
    ) -> ResidentSession:
        """Return the copy of a session that is not published yet.

        Args:
            session_id: Id of the session.
            owner: Principal of the request.
            opens: Whether the request may open a session, whose copy has no place in memory until it does; `None` for a
                session that is restored, which reserves its place.

        Raises:
            MemoryFull: There is no place for it.
        """
        events: SessionEvents | None = None
        if self._recorder is not None:
            events = SessionEvents(
                session_key(session_id),
                self._recorder,
                owner=None if owner is None else tuple(owner.values()),
                retry_interval=self._retry_interval,
            )
        transport = self._make_transport(session_id, events)
        loop = ServerLoop(session_id, transport, self._question_ids, self._registry.log.dropped)
        session = ResidentSession(session_id, owner, transport, self._registry.usage_changed, events, loop)
        session.outlets = self._outlets
        if self._attach is not None:
            self._attach(session)
        if opens is None:
            self._registry.reserve(session)
        else:
            self._registry.enter(owner, opens=opens)
        return session

    async def run(self, session: ResidentSession, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run the server loop of a copy until it leaves memory."""
        try:
            await session.loop.run(self._serve_loop, session.read, task_status=task_status)
        finally:
            self._registry.on_stopped(session)
            # Also where the task is cancelled: a stop waits for it, and the instance's retirement tells what is left.
            if session.events is not None:
                await session.events.abandon()
