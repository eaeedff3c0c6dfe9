"""An MCP client that shows the traffic itself: status, headers, JSON-RPC messages."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2
from httpx2 import EventSource
from mcp_types import INTERNAL_ERROR

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Self

Message = dict[str, Any]

SESSION_ID = "mcp-session-id"
PROTOCOL_VERSION = "2025-11-25"
INITIALIZE_PARAMS: Message = {
    "protocolVersion": PROTOCOL_VERSION,
    "capabilities": {},
    "clientInfo": {"name": "raw", "version": "1"},
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One HTTP response, read to its end."""

    status: int
    headers: httpx2.Headers
    body: bytes
    messages: list[Message]
    """The JSON-RPC messages in the body, whether it was JSON or SSE."""

    @property
    def session_id(self) -> str | None:
        return self.headers.get(SESSION_ID)

    @property
    def result(self) -> Message:
        """The result of the request that was answered."""
        return self._only("result")

    @property
    def error(self) -> Message:
        """The JSON-RPC error that was the answer."""
        return self._only("error")

    @property
    def text(self) -> str:
        """The first text of a tool's result."""
        text: str = self.result["content"][0]["text"]
        return text

    def _only(self, name: str) -> Message:
        found = [message[name] for message in self.messages if name in message]
        assert len(found) == 1, f"{len(found)} messages with {name!r} in a {self.status}: {self.body!r}"
        only: Message = found[0]
        return only


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a stream."""

    id: str | None
    """`None`: the event came without an id."""
    message: Message | None
    """`None`: the event primes the client's `Last-Event-ID`, or sets the time after which to come back."""


def assert_unavailable(answer: Answer) -> None:
    """Check that a request was refused for now by HTTP: with a time to come again, and without a session id."""
    assert answer.status == 503, answer
    assert int(answer.headers["retry-after"]) > 0
    assert answer.session_id is None
    assert answer.error["code"] == INTERNAL_ERROR


def assert_not_handled(answer: Answer) -> None:
    """Check that a JSON-RPC request was refused for now: with an error that has its id, and without a session id."""
    assert is_not_handled(answer), answer
    assert answer.session_id is None
    assert answer.error["code"] == INTERNAL_ERROR
    assert "try again later" in answer.error["message"]


def is_not_handled(answer: Answer) -> bool:
    """Return whether the answer refuses a JSON-RPC request for now."""
    return answer.status == 200 and any(
        message.get("id") is not None and "error" in message and "was not handled" in message["error"]["message"]
        for message in answer.messages
    )


class Stream:
    """A response that is still open."""

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.retry: int | None = None
        """Milliseconds after which the client is to come back, as last set by the server."""
        self._response = response
        self._last_event_id = ""
        self._events = self._read()

    @property
    def session_id(self) -> str | None:
        return self.headers.get(SESSION_ID)

    async def next_event(self) -> Event:
        """The next event, with a message or without one. Raises `StopAsyncIteration` at the end of the stream."""
        return await anext(self._events)

    async def next(self) -> Message:
        """The next JSON-RPC message. Raises `StopAsyncIteration` at the end of the stream."""
        while (message := (await self.next_event()).message) is None:
            pass
        return message

    async def __aiter__(self) -> AsyncIterator[Message]:
        async for event in self._events:
            if event.message is not None:
                yield event.message

    async def read(self) -> Answer:
        """Read to the end; the messages are those that were not taken before."""
        body = b""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            messages = [message async for message in self]
        else:
            body = await self._response.aread()
            messages = _messages(body)
        return Answer(status=self.status, headers=self.headers, body=body, messages=messages)

    async def _read(self) -> AsyncIterator[Event]:
        async for event in EventSource(self._response):
            if event.retry is not None:
                self.retry = event.retry
            # An event without an id has that of the one before it, as the HTML specification has it.
            event_id = event.id if event.id != self._last_event_id else None
            self._last_event_id = event.id
            yield Event(id=event_id, message=json.loads(event.data) if event.data else None)


class RawClient:
    """A client of one MCP endpoint, in the handshake era, that does nothing on its own.

    An async context manager. `session_id` is taken from the answer to `initialize`, and sent from then on; a
    test may set it, or make two clients share one session.

    Args:
        url: The MCP endpoint.
        http: The HTTP client to use, for example on an ASGI transport; by default one of its own.
        headers: Sent with each request.
        session_id: The session to go on in.
    """

    def __init__(
        self,
        url: str,
        *,
        http: httpx2.AsyncClient | None = None,
        headers: Mapping[str, str] | None = None,
        session_id: str | None = None,
    ) -> None:
        self.url = url
        self.session_id = session_id
        self.headers = dict(headers or {})
        self._http = http
        self._owns_http = http is None
        self._last_id = 0

    async def __aenter__(self) -> Self:
        if self._http is None:
            # The environment's proxies have nothing to do with servers on this machine, and nor have authorities of
            # TLS: each client would read them anew, for 40 ms.
            limits = httpx2.Limits(max_connections=None)
            self._http = httpx2.AsyncClient(timeout=60, trust_env=False, verify=False, limits=limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._owns_http and self._http is not None:
            await self._http.aclose()

    async def initialize(self, params: Message | None = None, **headers: str | None) -> Answer:
        """Send `initialize`, and take the session id from the answer if there is one."""
        answer = await self.request("initialize", INITIALIZE_PARAMS if params is None else params, **headers)
        if answer.session_id is not None:
            self.session_id = answer.session_id
        return answer

    async def handshake(self, params: Message | None = None) -> Answer:
        """`initialize` and `notifications/initialized`, which must succeed; the answer to the first."""
        answer = await self.initialize(params)
        assert answer.status == 200, f"initialize: {answer}"
        assert answer.session_id is not None, f"initialize: {answer}"
        notified = await self.notify("notifications/initialized")
        assert notified.status == 202, f"initialized: {notified}"
        return answer

    async def request(self, method: str, params: Message | None = None, **headers: str | None) -> Answer:
        """Send a JSON-RPC request and read the response to its end."""
        return await self.post(self.message(method, params), **headers)

    async def call_tool(self, name: str, arguments: Message | None = None, **headers: str | None) -> Answer:
        """Call a tool and read the response to its end."""
        return await self.request("tools/call", {"name": name, "arguments": arguments or {}}, **headers)

    async def notify(self, method: str, params: Message | None = None, **headers: str | None) -> Answer:
        """Send a notification."""
        message: Message = {"jsonrpc": "2.0", "method": method}
        return await self.post(message if params is None else {**message, "params": params}, **headers)

    async def respond(self, request_id: str | int, result: Message, **headers: str | None) -> Answer:
        """Answer a request of the server's."""
        return await self.post({"jsonrpc": "2.0", "id": request_id, "result": result}, **headers)

    async def post(self, message: Message | bytes, **headers: str | None) -> Answer:
        """POST a message, or any bytes, and read the response to its end."""
        async with self.stream("POST", message, **headers) as stream:
            return await stream.read()

    async def delete(self, **headers: str | None) -> Answer:
        """End the session."""
        async with self.stream("DELETE", **headers) as stream:
            return await stream.read()

    async def get(self, **headers: str | None) -> Answer:
        """Send a GET whose answer ends, as an error does."""
        async with self.get_stream(**headers) as stream:
            assert stream.status != 200, "this GET opened a stream; use get_stream()"
            return await stream.read()

    def get_stream(self, **headers: str | None) -> AbstractAsyncContextManager[Stream]:
        """Open the standalone stream, for messages that belong to no call."""
        return self.stream("GET", **headers)

    def message(self, method: str, params: Message | None = None) -> Message:
        """A JSON-RPC request with the next id."""
        self._last_id += 1
        message: Message = {"jsonrpc": "2.0", "id": self._last_id, "method": method}
        return message if params is None else {**message, "params": params}

    @asynccontextmanager
    async def stream(
        self, method: str, message: Message | bytes | None = None, /, **headers: str | None
    ) -> AsyncIterator[Stream]:
        """Send an HTTP request and hand out the response while it is open.

        Args:
            method: GET, POST or DELETE.
            message: The body: a message, or any bytes.
            headers: Underscores stand for hyphens; `None` removes a header.
        """
        assert self._http is not None, "use the client in an async with statement"
        content = json.dumps(message).encode() if isinstance(message, dict) else message
        sent: dict[str, str | None] = {
            "accept": "text/event-stream" if method == "GET" else "application/json, text/event-stream",
            "content-type": "application/json" if content is not None else None,
            SESSION_ID: self.session_id,
            "mcp-protocol-version": PROTOCOL_VERSION if self.session_id is not None else None,
            **{name.lower(): value for name, value in self.headers.items()},
            **{name.lower().replace("_", "-"): value for name, value in headers.items()},
        }
        present = {name: value for name, value in sent.items() if value is not None}
        async with self._http.stream(method, self.url, content=content, headers=present) as response:
            yield Stream(response)


def _messages(body: bytes) -> list[Message]:
    try:
        parsed = json.loads(body)
    except ValueError:
        return []
    return parsed if isinstance(parsed, list) else [parsed]
