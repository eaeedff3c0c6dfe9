"""The SDK's own session manager with an event log: sessions in memory, streams that resume from a database."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.background import run_every
from mcp_session_store.adapter.following import Following
from mcp_session_store.adapter.manager import (
    DEFAULT_INSTANCE_TIMEOUT,
    DEFAULT_SWEEP_INTERVAL,
    SHUTDOWN_TIMEOUT,
    instance_id,
)
from mcp_session_store.adapter.recorder import RECOVERY_INTERVAL, EventRecorder, sweep_events
from mcp_session_store.adapter.session_events import SessionEvents
from mcp_session_store.errors import StoreUnavailable
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer

    from mcp_session_store.store import EventLog

__all__ = ["ResumableSessionManager"]

logger = logging.getLogger(__name__)


class ResumableSessionManager(sdk.StockManagerSeams):
    """The SDK's `StreamableHTTPSessionManager`, each of whose sessions has a view of its own of an event log.

    For servers whose sessions may end with the process, and whose streams may not: a client that lost its connection
    gets what it missed. It is the SDK that resumes streams here, in this process; `DurableSessionManager` does so on
    any instance, and needs none of this.

    Args:
        app: An `MCPServer` or a low-level `Server`.
        event_log: A log that is `standalone`, because there are no records of the sessions; the caller's to close.
        sweep_interval: Seconds between two sweeps of the log; `None`: somebody else sweeps it.
        **options: As for the SDK's manager, but `event_store`.
    """

    def __init__(
        self,
        app: MCPServer[Any] | Server[Any],
        event_log: EventLog,
        *,
        sweep_interval: float | None = DEFAULT_SWEEP_INTERVAL,
        **options: Any,
    ) -> None:
        super().__init__(sdk.underlying_server(app), **options)
        following = Following(event_log, gone_after=timedelta(seconds=DEFAULT_INSTANCE_TIMEOUT))
        self._recorder = EventRecorder(event_log, following, instance=instance_id())
        self._sweep_interval = sweep_interval

    def new_event_store(self) -> SessionEvents:
        """A view for a session that begins: under a key that nobody else has, as the SDK does not tell its id."""
        return SessionEvents(session_key(uuid4().hex), self._recorder, unmanaged=True, calls=not self.json_response)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """As the SDK's; what is kept is stored, and the log swept, while the context is open."""
        recorder = self._recorder
        try:
            await recorder.recover()
        except StoreUnavailable as error:
            logger.warning("the event log cannot be reached; events go out without ids: %s", error)
            recorder.wake.set()
        async with super().run(), anyio.create_task_group() as tasks:
            tasks.start_soon(run_every, "heartbeat", DEFAULT_INSTANCE_TIMEOUT / 3, recorder.beat)
            tasks.start_soon(partial(run_every, "events", RECOVERY_INTERVAL, recorder.recover, wake=recorder.wake))
            if self._sweep_interval is not None:
                tasks.start_soon(run_every, "sweep", self._sweep_interval, partial(sweep_events, recorder.log))
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                with anyio.move_on_after(SHUTDOWN_TIMEOUT, shield=True):
                    await recorder.retire()
