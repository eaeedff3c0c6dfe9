"""What the handler of a replayed message gets: a dispatch context without a client behind it."""

from __future__ import annotations

import functools
import itertools
import types
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from uuid import uuid4

import anyio
from mcp.shared.exceptions import NoBackChannelError
from mcp.shared.message import ServerMessageMetadata
from mcp.shared.transport_context import TransportContext
from starlette.requests import Request

from mcp_session_store.adapter.sdk import check_dispatch_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping
    from contextvars import Context

    from mcp.shared.dispatcher import CallOptions, Outbound
    from starlette.types import Message, Scope

__all__ = ["ReplayedContext", "in_context", "is_replayed", "next_request_id", "request_of"]

_T = TypeVar("_T")

# As the SDK's dispatcher makes it for a message whose sender can be sent no request.
_TRANSPORT: Final = TransportContext(kind="jsonrpc", can_send_request=False)

_numbers: Final = itertools.count(1)


def next_request_id() -> str:
    """Return an id for a replayed request, which no client and no other replayed request has."""
    return f"{_prefix()}-{next(_numbers)}"


def is_replayed(request_id: object) -> bool:
    """Return whether an id is one of a replayed request."""
    return isinstance(request_id, str) and request_id.startswith(_prefix())


@functools.cache
def _prefix() -> str:
    # Made in the first restore, because workers may be forked when this module is imported already.
    return f"restore-{uuid4().hex}"


class ReplayedContext:
    """The SDK's `DispatchContext` of one replayed message.

    Its answer is sent to no client, and it has no way back: a handler that asks through it gets an error.

    Args:
        request_id: Id of a replayed request; `None` for a notification.
        scope: ASGI scope of the replayed messages, without the length of the body.
        body: The message, as JSON.
        outbound: Where a notification's handler sends notifications; `None`: what the handler of a request sends
            in relation to it is dropped.
    """

    __slots__ = ("_cancel_requested", "_outbound", "message_metadata", "request_id")

    transport = _TRANSPORT
    can_send_request = False

    def __init__(self, request_id: str | None, scope: Scope, body: bytes, outbound: Outbound | None) -> None:
        self.request_id = request_id
        self.message_metadata = ServerMessageMetadata(request_context=request_of(scope, body), can_send_request=False)
        self._outbound = outbound
        self._cancel_requested: anyio.Event | None = None

    @property
    def cancel_requested(self) -> anyio.Event:
        """Never set: no client knows the message."""
        if self._cancel_requested is None:
            self._cancel_requested = anyio.Event()
        return self._cancel_requested

    async def send_raw_request(
        self,
        method: str,
        params: Mapping[str, Any] | None,  # noqa: ARG002 - the protocol's
        opts: CallOptions | None = None,  # noqa: ARG002 - the protocol's
    ) -> dict[str, Any]:
        """Refuse, because the request would reach no client."""
        raise NoBackChannelError(method)

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        """Send a notification on the session's own stream, or drop what relates to a replayed request."""
        if self._outbound is not None:
            await self._outbound.notify(method, params, opts)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        """Drop it: no client waits for the replayed request."""


check_dispatch_context(ReplayedContext)


def request_of(scope: Scope, body: bytes) -> Request:
    """Return a request as the POST of a replayed message."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not pending:
            # Its client does not disconnect while it is replayed.
            await anyio.sleep_forever()
        return pending.pop()

    headers = [*scope["headers"], (b"content-length", b"%d" % len(body))]
    return Request({**scope, "headers": headers}, receive)


@types.coroutine
def in_context(context: Context, awaitable: Awaitable[_T]) -> Generator[Any, Any, _T]:
    """Await something in another context than that of the task, without a task of its own."""
    steps = awaitable.__await__()
    step: Callable[[Any], Any] = steps.send
    value: Any = None
    while True:
        try:
            awaited = context.run(step, value)
        except StopIteration as returned:
            return cast("_T", returned.value)
        try:
            step, value = steps.send, (yield awaited)
        except BaseException as error:
            step, value = steps.throw, error
