"""Restore by replay: the messages that the server handles before the client's, and when the replay is over."""

from __future__ import annotations

import contextvars
import json
import logging
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import anyio
import anyio.lowlevel
from mcp.shared.jsonrpc_dispatcher import handler_exception_to_error_data
from opentelemetry.trace import get_current_span

from mcp_session_store import telemetry
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.replay.context import ReplayedContext, in_context, next_request_id
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER
from mcp_session_store.adapter.responses import RestoreFailed, SessionNotFound, WhyNotFound
from mcp_session_store.errors import RecordUnreadable
from mcp_session_store.store import read_params

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from anyio.abc import TaskGroup
    from mcp.server.runner import ServerRunner
    from mcp_types import RequestId
    from opentelemetry.trace import Link
    from starlette.types import Scope

    from mcp_session_store.adapter.replay.marker import SessionRestoreMarker
    from mcp_session_store.records import JournalEntry, SessionRecord

__all__ = ["TOO_LONG", "Replay", "ReplayedCopy"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_OF_THE_BODY: Final = frozenset({b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"})
TOO_LONG: Final = "the replay of a session was cut short, or took too long"
_INITIALIZED: Final = "notifications/initialized"


class ReplayedCopy(Protocol):
    """The copy that is being restored, as a replay needs it."""

    def read(self, request_id: RequestId | None) -> None:
        """Note that a handler is going to get a message."""

    def finished(self, request_id: RequestId | None) -> None:
        """Note that the handler of a message has returned."""


class Replay:
    """The replay of one session's handshake and journal, by the kernel of the copy's server loop.

    `initialize` is handled before the server loop runs, as the loop handles it: alone. The rest waits until the loop
    runs, because before it no handler can send a request. First goes `notifications/initialized`, whose handler may
    ask the client something, which can only be answered once the session is published. So what follows waits until
    that handler has returned, has sent its first request to the client, or has run for `timeout`. Then go the
    journaled calls, each when the one before is answered, for `timeout` in all; after that they do not wait for each
    other, so that handlers that are slow keep no session from coming back. One that is answered by an error is logged.

    Each message is handled in a copy of its own of the restoring request's context variables.

    Args:
        record: The session as stored.
        journal: Its journal, in order.
        marker: What the replayed messages carry.
        scope: The ASGI scope of the request that causes the restore.
        copy: The copy, which is busy while handlers run.
        timeout: Seconds.
        on_replayed: Called when all is replayed; returns whether the copy serves the session.
        on_failure: Called when the session cannot be restored here, before anything is cleaned up.
    """

    _runner: ServerRunner[Any]
    _handlers: TaskGroup
    _journaled: list[tuple[JournalEntry, dict[str, Any] | None]]

    def __init__(
        self,
        record: SessionRecord,
        journal: Sequence[JournalEntry],
        marker: SessionRestoreMarker,
        scope: Scope,
        copy: ReplayedCopy,
        *,
        timeout: float,
        on_replayed: Callable[[], Awaitable[bool]],
        on_failure: Callable[[Exception], None],
    ) -> None:
        # Taken in the restoring request's own task: handlers find its context variables.
        self._context = contextvars.copy_context()
        self._on_replayed = on_replayed
        self._on_failure = on_failure
        self._record = record
        self._journal = journal
        self._copy = copy
        self._timeout = timeout
        self._handler_done = Latch()
        self._is_traced = get_current_span().is_recording()
        headers = [header for header in scope["headers"] if header[0] not in _OF_THE_BODY]
        headers.append((b"content-type", b"application/json"))
        self._scope = {**scope, RESTORE_MARKER: marker, "method": "POST", "headers": headers}

    async def initialize(self, runner: ServerRunner[Any], handlers: TaskGroup) -> bool:
        """Replay `initialize`, and return whether the session can be served.

        Args:
            runner: Kernel of the server loop.
            handlers: Task group in which the handlers of the other messages run, of which some are not waited for.
        """
        self._runner = runner
        self._handlers = handlers
        text = self._record.initialize_params
        try:
            params = read_params(text)
            self._journaled = [(entry, read_params(entry.params)) for entry in self._journal]
        except ValueError as error:
            return self._refuse_unreadable(str(error))
        if params is None:
            return self._refuse_unreadable("initialize has no params")
        call = self._handle(runner.on_request, self._request("initialize", text), "initialize", params)
        try:
            answer = await in_context(self._context.copy(), call)
        except Exception as error:
            _log_crash("initialize", error)
            return self._refuse("the replayed initialize was answered by an error", "replay failed")
        except BaseException:
            self.cut_short()
            raise
        if answer.get("protocolVersion") != self._record.protocol_version:
            return self._refuse("the replayed initialize negotiated another protocol version", "other version")
        return True

    def _handle(
        self,
        handle: Callable[[ReplayedContext, str, dict[str, Any] | None], Awaitable[_T]],
        context: ReplayedContext,
        method: str,
        params: dict[str, Any] | None,
    ) -> Awaitable[_T]:
        links: Sequence[Link] = ()
        if params is not None and "_meta" in params:
            params, links = telemetry.without_trace(params)
        if not self._is_traced:
            return handle(context, method, params)
        return self._handle_traced(handle(context, method, params), method, links)

    async def _handle_traced(self, handled: Awaitable[_T], method: str, links: Sequence[Link]) -> _T:
        """Have a message handled within a span that says that the message is replayed."""
        marks: dict[str, str | int | bool] = {telemetry.REPLAYED: True, "mcp.method.name": method}
        key = self._record.key
        span = telemetry.begin_span("replay", self._record.namespace, key=key, links=links, attributes=marks)
        with telemetry.within(span):
            try:
                return await handled
            except Exception as error:
                telemetry.fail_span(span, error)
                raise

    def _refuse(self, reason: str, short: WhyNotFound) -> bool:
        # The record stays: in a rolling deploy other instances still serve the session.
        logger.warning("the session %s cannot be restored by this instance: %s", self._record.key, reason)
        self._on_failure(SessionNotFound(short))
        return False

    def _refuse_unreadable(self, reason: str) -> bool:
        self._on_failure(RecordUnreadable(reason))
        return False

    async def finish(self) -> bool:
        """Replay what follows `initialize`, once the server loop runs; return whether the copy serves the session."""
        try:
            await self._follow_up()
            return await self._on_replayed()
        except BaseException:
            self.cut_short()
            raise

    def cut_short(self) -> None:
        """End the replay without an answer of the server's, so that trying again is right; unless it is over."""
        self._on_failure(RestoreFailed(TOO_LONG))

    async def _follow_up(self) -> None:
        self._start(self._notify)
        # A handler that waits for nothing has returned after one turn.
        await anyio.lowlevel.checkpoint()
        if not self._handler_done.is_set():
            with anyio.move_on_after(self._timeout):
                await self._handler_done.wait()
        if self._journal:
            await self._replay_journal()

    async def _replay_journal(self) -> None:
        deadline = anyio.current_time() + self._timeout
        slow = False
        for entry, params in self._journaled:
            answered = Latch()
            self._start(self._call, entry, params, answered)
            with anyio.move_on_after(deadline - anyio.current_time()):
                await answered.wait()
            if not answered.is_set() and not slow:
                slow = True
                logger.warning(
                    "a journaled call of %s of the session %s is slow to be answered when it is replayed",
                    entry.method,
                    self._record.key,
                )

    def _start(self, handle: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        self._copy.read(None)
        # The task copies the context in which it is made.
        self._context.run(self._handlers.start_soon, handle, *args)

    async def _notify(self) -> None:
        body = b'{"jsonrpc":"2.0","method":"%s"}' % _INITIALIZED.encode()
        context = ReplayedContext(None, self._scope, body, self._runner.connection.outbound)
        try:
            await self._handle(self._runner.on_notify, context, _INITIALIZED, None)
        finally:
            self._copy.finished(None)
            self._handler_done.set()

    async def _call(self, entry: JournalEntry, params: dict[str, Any] | None, answered: Latch) -> None:
        context = self._request(entry.method, entry.params)
        try:
            await self._handle(self._runner.on_request, context, entry.method, params)
        except Exception as error:
            _log_crash(entry.method, error)
            logger.warning(
                "a journaled call of %s of the session %s was answered by an error when it was replayed",
                entry.method,
                self._record.key,
            )
        finally:
            self._copy.finished(None)
            answered.set()

    def _request(self, method: str, params: str) -> ReplayedContext:
        request_id = next_request_id()
        # The params are JSON already.
        body = f'{{"jsonrpc":"2.0","id":"{request_id}","method":{json.dumps(method)},"params":{params}}}'
        return ReplayedContext(request_id, self._scope, body.encode(), None)

    def asked(self) -> None:
        """Note that a handler has sent a request to the client, whose answer needs the session to be published."""
        self._handler_done.set()


def _log_crash(method: str, error: Exception) -> None:
    # As the SDK's dispatcher does for a message of a client's.
    if handler_exception_to_error_data(error) is None:
        logger.error("handler for a replayed %r raised", method, exc_info=error)
