"""The stop of an ASGI server, from its signal on: calls end first, and streams that never end end at once.

An ASGI application hears of a stop when all its requests are over, which open streams keep from happening.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
from mcp.server.streamable_http import GET_STREAM_KEY, StreamableHTTPServerTransport
from mcp.server.subscriptions import ListenHandler
from sse_starlette.sse import AppStatus

from mcp_session_store.adapter.session_log import STOPPING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mcp.server.lowlevel.server import Server

    from mcp_session_store.adapter.sessionless import SessionlessRequests
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.streams.followers import Followers

__all__ = ["STOP_MARGIN", "Drain", "StoppingServer", "stopping_server"]

logger = logging.getLogger(__name__)

LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks at the server, as it looks itself."""
STOP_MARGIN: Final = 2
"""Seconds before a server would cancel its requests at which calls are answered as lost."""
FOR_AWAY: Final = 10.0
"""Seconds for which calls whose clients are away go on where the server sets no time: a stop must not wait for ever."""


class StoppingServer(Protocol):
    """What is read of a uvicorn server."""

    should_exit: bool
    """Whether a signal has come, or the program wants the server to stop."""
    force_exit: bool
    """Whether it is not to wait for its requests any more, because a second SIGINT has come."""
    started: bool
    """Whether it has begun to listen."""
    servers: Sequence[asyncio.Server]
    """Its listeners."""
    config: Any
    """Its settings, among them the seconds until it cancels the requests that are left."""


def stopping_server() -> StoppingServer | None:
    """Return the uvicorn server that runs this thread's event loop; `None` under any other ASGI server."""
    # uvicorn has no way to ask for it, but a method of its server handles the signals. sse-starlette finds it so.
    if threading.current_thread() is threading.main_thread():
        server: StoppingServer | None = _signalled_server()
        if hasattr(server, "should_exit"):
            return server
    # Where it handles none, as in a thread, one of the tasks awaits its `serve`.
    kind: Any = getattr(sys.modules.get("uvicorn"), "Server", None)
    if kind is None:
        return None
    found = [server for task in _tasks() for server in _awaited_by(task) if isinstance(server, kind)]
    # The one that is starting the application has not begun to listen.
    return min(found, key=lambda server: bool(server.started), default=None)


def _signalled_server() -> Any:
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


def _tasks() -> set[asyncio.Task[Any]]:
    try:
        return asyncio.all_tasks()
    except RuntimeError:
        return set()  # another kind of event loop


def _awaited_by(task: asyncio.Task[Any]) -> Iterator[Any]:
    """Yield the objects whose methods a task awaits, from the outermost on."""
    coroutine: Any = task.get_coro()
    while inspect.iscoroutine(coroutine):
        yield inspect.getcoroutinelocals(coroutine).get("self")
        coroutine = coroutine.cr_await


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
        sessionless: Requests without a session.
        followers: Open responses that follow a stream of the event log; `None` without one.
        answer_waiting: Answers the requests that wait for the store.
    """

    def __init__(
        self,
        app: Server[Any],
        registry: Registry,
        sessionless: SessionlessRequests,
        followers: Followers | None,
        answer_waiting: Callable[[], None],
    ) -> None:
        self._app = app
        self._registry = registry
        self._sessionless = sessionless
        self._followers = followers
        self._answer_waiting = answer_waiting
        self._server = stopping_server()
        self._over = anyio.Event()

    async def run(self) -> None:
        """Wait for the signal, and drain; until cancelled, because the manager stops.

        Return at once where the signal cannot be learned of.
        """
        if (server := self._server) is None:
            return
        # sse-starlette ends streams for the server that handles the signals, and for no other.
        of_the_process = _streams.outlast_calls() if server is _signalled_server() else contextlib.nullcontext()
        with of_the_process as calls_are_over:
            while not _stops(server):  # noqa: ASYNC110 - it has no event for it
                await anyio.sleep(LOOK_INTERVAL)
            self._answer_waiting()
            timeout: float | None = server.config.timeout_graceful_shutdown
            began = anyio.current_time()
            with anyio.move_on_after(math.inf if timeout is None else max(timeout - STOP_MARGIN, 0)):
                while not server.force_exit:
                    calls_run = self._close_streams()
                    waits_for_away = timeout is not None or anyio.current_time() - began < FOR_AWAY
                    if not calls_run and not (waits_for_away and any(map(_has_calls_of_away, self._registry))):
                        break
                    await anyio.sleep(LOOK_INTERVAL)
            await self._give_up()
            if calls_are_over is not None:
                calls_are_over()
            self._over.set()
            await anyio.sleep_forever()

    async def over(self) -> None:
        """When the server stops, wait for calls whose clients are away, until they are over or out of time.

        uvicorn waits for open requests only. The clients come back for the answers, which the event log keeps.
        """
        if self._server is not None and _stops(self._server):
            if number := sum(map(_has_calls_of_away, self._registry)):
                logger.info("the stop waits for calls in %d session(s) whose clients may come back for them", number)
            await self._over.wait()

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
        if is_followed or self._registry.is_arriving or len(self._sessionless):
            return True
        return any(session.has_calls for session in self._registry)

    async def _give_up(self) -> None:
        """Answer the calls that still run as lost, before the server cuts them, and evict their sessions."""
        # Not those that only have a stream, which ends by itself: a request that comes before the server has closed its
        # connection would restore a session that has left memory, once more than the restart does.
        cut = [session for session in self._registry if session.has_calls]
        calls = sum(session.has_calls or _has_calls_of_away(session) for session in self._registry)
        if calls or len(self._sessionless):
            logger.warning(
                "the server stops, and calls in %d session(s), and %d without a session, did not end in time: they are "
                "lost",
                calls,
                len(self._sessionless),
            )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sessionless.lose)
            for session in cut:
                self._registry.unpublish(session, STOPPING)
                tasks.start_soon(partial(self._registry.stop, session, lost=session.has_calls))


def _has_calls_of_away(session: ResidentSession) -> bool:
    """Return whether a session runs a call whose client may come back for the answer."""
    return session.events is not None and session.events.resumable
