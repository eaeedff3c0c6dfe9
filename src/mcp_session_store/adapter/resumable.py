"""The SDK's own session manager with an event log: sessions in memory, streams that resume from a database."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server.transport_security import TransportSecurityMiddleware

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.background import run_every
from mcp_session_store.adapter.manager import (
    DEFAULT_INSTANCE_TIMEOUT,
    DEFAULT_SWEEP_INTERVAL,
    SHUTDOWN_TIMEOUT,
    instance_id,
)
from mcp_session_store.adapter.requests import session_id_of
from mcp_session_store.adapter.streams.event_store import SessionEvents
from mcp_session_store.adapter.streams.followers import Following
from mcp_session_store.adapter.streams.recorder import EventRecorder, sweep_events
from mcp_session_store.adapter.streams.resumption import serve_stream
from mcp_session_store.errors import ConfigurationError, StoreUnavailable
from mcp_session_store.event_log import EventLog
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.types import Receive, Scope, Send

__all__ = ["ResumableSessionManager"]

logger = logging.getLogger(__name__)


class ResumableSessionManager(sdk.StockManagerSeams):
    """The SDK's `StreamableHTTPSessionManager`, each of whose sessions has a view of its own of an event log.

    For servers whose sessions may end with the process, and whose streams may not: a client that lost its connection
    gets what it missed. `DurableSessionManager` keeps the sessions as well, and needs none of this.

    Args:
        app: An `MCPServer` or a low-level `Server`.
        event_log: A log that is `standalone`, because there are no records of the sessions; the caller's to close.
        sweep_interval: Seconds between two sweeps of the log; `None`: somebody else sweeps it.
        **options: As for the SDK's manager, but `event_store` and `stateless`.

    Raises:
        ConfigurationError: An argument cannot work, by its name.
    """

    def __init__(
        self,
        app: MCPServer[Any] | Server[Any],
        event_log: EventLog,
        *,
        sweep_interval: float | None = DEFAULT_SWEEP_INTERVAL,
        **options: Any,
    ) -> None:
        if not isinstance(event_log, EventLog) or not event_log.standalone:
            raise ConfigurationError(
                f"event_log must be an EventLog that is standalone, not {event_log!r}: there are no records of the "
                "sessions; make it with SqlEventLog(url, standalone=True)"
            )
        for option in ("event_store", "stateless"):
            if options.pop(option, None):
                raise ConfigurationError(f"{option} cannot be had with an event log; leave it out")
        super().__init__(sdk.underlying_server(app), **options)
        following = Following(event_log, gone_after=timedelta(seconds=DEFAULT_INSTANCE_TIMEOUT))
        self._recorder = EventRecorder(event_log, following, instance=instance_id())
        self._sweep_interval = sweep_interval
        self._security = TransportSecurityMiddleware(self.security_settings)

    def new_events(self, session_id: str) -> SessionEvents:
        """The view of a session that begins."""
        events = SessionEvents(session_key(session_id), self._recorder, retry_interval=self.retry_interval)
        events.active = True
        return events

    async def serve_session(self, events: SessionEvents, scope: Scope, receive: Receive, send: Send) -> bool:
        """Serve what the SDK's manager would not: GETs, from the log."""
        session_id = session_id_of(scope) or ""
        return await serve_stream(events, session_id, self._security, scope, receive, send)

    def session_over(self, events: SessionEvents) -> None:
        """A session has ended, or its process is about to."""
        events.close()
        if self.running_tasks is not None:
            self.running_tasks.start_soon(events.abandon)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """As the SDK's; what is kept is stored, and the log swept, while the context is open."""
        recorder = self._recorder
        try:
            await recorder.recover()
        except StoreUnavailable as error:
            logger.warning("the event log cannot be reached; events go out without ids: %s", error)
            recorder.wake.set()
        async with contextlib.AsyncExitStack() as stack:
            # When no session stores anything any more.
            stack.push_async_callback(self._retire)
            await stack.enter_async_context(super().run())
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(partial(recorder.run, beat_interval=DEFAULT_INSTANCE_TIMEOUT / 3))
            if self._sweep_interval is not None:
                tasks.start_soon(run_every, "sweep", self._sweep_interval, partial(sweep_events, recorder.log))
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _retire(self) -> None:
        with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True):
            await self._recorder.retire()
