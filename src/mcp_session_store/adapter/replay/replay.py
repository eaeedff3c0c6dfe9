"""Restore by replay: the messages that are put ahead of the client's, and when the replay is over."""

from __future__ import annotations

import contextvars
import json
import logging
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse
from starlette.requests import Request

from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from mcp_types import JSONRPCMessage, RequestId
    from starlette.types import Message, Scope

    from mcp_session_store.records import JournalEntry, SessionRecord, SessionRestoreMarker

__all__ = ["Replay"]

logger = logging.getLogger(__name__)

_OF_THE_BODY: Final = frozenset({b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"})


class Replay:
    """The replay of one session's handshake, between the transport and the server loop.

    `initialize` goes first. The server handles it inline, so when the loop reads on it is answered.
    Then goes `notifications/initialized`, whose handler may ask the client something, which can only
    be answered once the session is published. So what follows waits until that handler has returned,
    has sent its first request to the client, or has run for `timeout`. Then go the journaled calls,
    each when the one before is answered, for `timeout` in all; after that they do not wait for each other, so
    that handlers that are slow keep no session from coming back. One that is answered by an error is logged.

    Args:
        record: The session as stored.
        journal: Its journal, in order.
        marker: What the replayed messages carry.
        scope: The ASGI scope of the request that causes the restore.
        binding: What else the replayed messages' scope carries.
        timeout: Seconds.
    """

    def __init__(
        self,
        record: SessionRecord,
        journal: Sequence[JournalEntry],
        marker: SessionRestoreMarker,
        scope: Scope,
        *,
        binding: Scope,
        timeout: float,
    ) -> None:
        # Taken in the restoring request's own task: handlers find its context variables.
        self.context = contextvars.copy_context()
        self.over = Latch()
        self.failure: str | None = None
        """Why the session cannot be restored here, when it is over and failed."""
        self.broken = False
        """The failure is no answer of the server's: it was cut short, and trying again is right."""
        self.unanswered = False
        """Calls are still being handled when it is over: their answers will have to be taken off, too."""
        self._record = record
        self._timeout = timeout
        self._handler_done = Latch()
        self._requests: list[Request] = []
        self._request_ids: set[RequestId] = set()
        self._request_id = ""
        """Of the request that was replayed last."""
        self._answer: JSONRPCResponse | JSONRPCError | None = None
        """To that request."""
        self._answered = Latch()
        self._scope = {**scope, **binding, RESTORE_MARKER: marker, "method": "POST"}
        self._steps = self._replay(journal)

    async def next(self) -> SessionMessage | None:
        """The next message to replay; `None` when the replay is over, one way or the other."""
        if self.over.is_set():
            return None
        message = await anext(self._steps, None)
        if self.over.is_set():
            return None
        if message is None:
            self.over.set()
            return None
        return self._framed(message)

    async def _replay(self, journal: Sequence[JournalEntry]) -> AsyncIterator[JSONRPCMessage]:
        """What is replayed, each message when its turn has come: the server asks for one when it has taken the last."""
        # The server handles it inline: when it reads on, it has answered.
        yield self._request_for("initialize", self._record.initialize_params)
        if (failure := self._handshake_failure()) is not None:
            self._fail(failure)
            return
        yield JSONRPCNotification(jsonrpc="2.0", method="notifications/initialized")
        with anyio.move_on_after(self._timeout):
            await self._handler_done.wait()
        deadline = anyio.current_time() + self._timeout
        for entry in journal:
            yield self._request_for(entry.method, entry.params)
            with anyio.move_on_after(deadline - anyio.current_time()):
                await self._answered.wait()
            if self._answer is None:
                if not self.unanswered:
                    logger.warning(
                        "a journaled call of %s of the session %s is slow to be answered when it is replayed",
                        entry.method,
                        self._record.key,
                    )
                self.unanswered = True
            elif isinstance(self._answer, JSONRPCError):
                logger.warning(
                    "a journaled call of %s of the session %s was answered by an error when it was replayed",
                    entry.method,
                    self._record.key,
                )

    def _request_for(self, method: str, params: str) -> JSONRPCRequest:
        self._request_id = f"restore-{uuid4().hex}"
        self._request_ids.add(self._request_id)
        self._answer = None
        self._answered = Latch()
        return JSONRPCRequest(jsonrpc="2.0", id=self._request_id, method=method, params=json.loads(params))

    def cut_short(self, failure: str) -> None:
        """End the replay without an answer of the server's."""
        if not self.over.is_set():
            self.broken = True
            self._fail(failure)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.over.set()

    def handler_done(self) -> None:
        """The handler of the replayed notification has returned, or waits for the client."""
        self._handler_done.set()

    def owns(self, request: object) -> bool:
        """Return whether this is the request of a replayed message."""
        return request in self._requests

    def takes(self, item: SessionMessage) -> bool:
        """Take a message off the stream that the server writes, if it answers or relates to what was replayed."""
        message = item.message
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            if message.id not in self._request_ids:
                return False
            if message.id == self._request_id:
                self._answer = message
                self._answered.set()
            return True
        metadata = item.metadata
        return isinstance(metadata, ServerMessageMetadata) and metadata.related_request_id in self._request_ids

    def _handshake_failure(self) -> str | None:
        answer = self._answer
        if not isinstance(answer, JSONRPCResponse):
            return "the replayed initialize was answered by an error"
        version = answer.result.get("protocolVersion")
        if version != self._record.protocol_version:
            return "the replayed initialize negotiated another protocol version"
        return None

    def _framed(self, message: JSONRPCMessage) -> SessionMessage:
        async def unanswered() -> None:
            self.cut_short("a replayed call was cancelled")

        return SessionMessage(
            message,
            metadata=ServerMessageMetadata(
                request_context=self._request(message.model_dump_json(by_alias=True, exclude_unset=True).encode()),
                # Nobody reads an answer to it: a handler that asks through the replayed request is told so.
                can_send_request=False,
                on_request_unanswered=unanswered,
            ),
        )

    def _request(self, body: bytes) -> Request:
        """The request that caused the restore, as a POST of the replayed message."""
        headers = [(name, value) for name, value in self._scope["headers"] if name.lower() not in _OF_THE_BODY]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not pending:
                # Its client does not disconnect while it is replayed.
                await anyio.sleep_forever()
            return pending.pop()

        scope: dict[str, Any] = {**self._scope, "headers": headers}
        self._requests.append(Request(scope, receive))
        return self._requests[-1]
