"""The stop of an ASGI server, from its signal on: calls end first, and streams that never end end at once.

An ASGI application hears of a stop when all its requests are over, which open streams keep from happening.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
from mcp.server.streamable_http import GET_STREAM_KEY, StreamableHTTPServerTransport
from mcp.server.subscriptions import ListenHandler
from sse_starlette.sse import AppStatus

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from mcp.server.lowlevel.server import Server

    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.streams.followers import Followers

__all__ = ["STOP_MARGIN", "Drain", "StoppingServer", "stopping_server"]

logger = logging.getLogger(__name__)

LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks at the server, as it looks itself."""
STOP_MARGIN: Final = 2
"""Seconds before a server would cancel its requests at which calls are answered as lost."""


class StoppingServer(Protocol):
    """What is read of a uvicorn server."""

    should_exit: bool
    """Whether a signal has come, or the program wants the server to stop."""
    started: bool
    """Whether it has begun to listen."""
    servers: Sequence[asyncio.Server]
    """Its listeners."""
    config: Any
    """Its settings, among them the seconds until it cancels the requests that are left."""


def stopping_server() -> StoppingServer | None:
    """Return the uvicorn server that runs this thread's event loop; `None` under any other ASGI server."""
    # uvicorn has no way to ask for it, but a method of its server handles the signals. sse-starlette finds it so.
    if threading.current_thread() is not threading.main_thread():
        return None
    server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if hasattr(server, "should_exit") else None


def _stops(server: StoppingServer) -> bool:
    """Return whether a server has begun to stop: by a signal, or because it has served as many requests as it may."""
    if server.should_exit:
        return True
    # Of that limit it only closes its listeners, and then waits for the open streams, like for other requests.
    return server.started and not any(listener.is_serving() for listener in server.servers)


class _StreamsOfTheProcess:
    """Has the streams of sse-starlette, which ends all of them at the signal, go on until the calls are over.

    That is a switch of the whole process. The application's own streams end when the calls of all managers are over.
    """

    def __init__(self) -> None:
        self._managers = 0
        self._with_calls = 0
        self._ends_them = True
        self._has_ended_them = False

    @contextlib.contextmanager
    def outlast_calls(self) -> Iterator[Callable[[], None]]:
        """Let streams go on at the signal; yield what is to be called when the calls of a manager are over."""
        if not self._managers:
            # A program that has switched it off ends its streams itself.
            self._ends_them = AppStatus.enable_automatic_graceful_drain
            AppStatus.enable_automatic_graceful_drain = False
        self._managers += 1
        self._with_calls += 1
        has_calls = True

        def over() -> None:
            nonlocal has_calls
            if has_calls:
                has_calls = False
                self._with_calls -= 1
                if not self._with_calls and self._ends_them:
                    AppStatus.should_exit = self._has_ended_them = True

        try:
            yield over
        finally:
            if has_calls:
                self._with_calls -= 1
            self._managers -= 1
            if not self._managers and self._ends_them:
                AppStatus.enable_automatic_graceful_drain = True
                if self._has_ended_them:
                    # Or each later server of this process would end its streams at once.
                    AppStatus.should_exit = self._has_ended_them = False


_streams: Final = _StreamsOfTheProcess()


class Drain:
    """Drains a manager's requests at the signal to stop.

    Args:
        app: The MCP server.
        registry: The sessions in memory.
        followers: Open responses that follow a stream of the event log; `None` without one.
        answer_waiting: Answers the requests that wait for the store.
    """

    def __init__(
        self,
        app: Server[Any],
        registry: Registry,
        followers: Followers | None,
        answer_waiting: Callable[[], None],
    ) -> None:
        self._app = app
        self._registry = registry
        self._followers = followers
        self._answer_waiting = answer_waiting

    async def run(self) -> None:
        """Wait for the signal, and drain; until cancelled, because the manager stops.

        Return at once where the signal cannot be learned of.
        """
        if (server := stopping_server()) is None:
            return
        with _streams.outlast_calls() as calls_are_over:
            while not _stops(server):  # noqa: ASYNC110 - it has no event for it
                await anyio.sleep(LOOK_INTERVAL)
            self._answer_waiting()
            timeout: float | None = server.config.timeout_graceful_shutdown
            with anyio.move_on_after(math.inf if timeout is None else max(timeout - STOP_MARGIN, 0)):
                while self._close_streams():  # noqa: ASYNC110 - there is no event for all of it
                    await anyio.sleep(LOOK_INTERVAL)
            await self._give_up()
            calls_are_over()
            await anyio.sleep_forever()

    def _close_streams(self) -> bool:
        """Close the streams that do not end by themselves; return whether a call still has a client that waits."""
        # Again at each look, because a request may have been on its way to its session.
        for session in self._registry:
            if session.streams:
                # The class's own, because a transport with events has another, which the SDK's method for this stream
                # calls: it leaves a stream open whose client holds no event id to come back with.
                StreamableHTTPServerTransport.close_sse_stream(session.transport, GET_STREAM_KEY)
        subscriptions = self._app.get_request_handler("subscriptions/listen")
        if subscriptions is not None and isinstance(subscriptions.handler, ListenHandler):
            subscriptions.handler.close()
        is_followed = self._followers is not None and self._followers.close_but_calls_here()
        return is_followed or self._registry.is_arriving or any(session.has_calls for session in self._registry)

    async def _give_up(self) -> None:
        """Evict the sessions with open requests, whose calls are answered as lost, before the server cuts them."""
        cut = [session for session in self._registry if session.pins]
        if calls := sum(session.has_calls for session in cut):
            logger.warning("the server stops, and calls in %d session(s) did not end in time: they are lost", calls)
        async with anyio.create_task_group() as tasks:
            for session in cut:
                self._registry.unpublish(session)
                tasks.start_soon(partial(self._registry.stop, session, lost=session.has_calls))
