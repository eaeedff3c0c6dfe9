"""MCP endpoint of an app, called at the ASGI boundary as a client calls it, without an HTTP server in between.

Every answer is checked, so that no measurement counts work that was refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import ASGIApp, Message

PROTOCOL_VERSION: Final = "2025-11-25"

_INITIALIZE_PARAMS: Final = {
    "protocolVersion": PROTOCOL_VERSION,
    "capabilities": {"roots": {"listChanged": True}, "sampling": {}},
    "clientInfo": {"name": "benchmark", "version": "1.0"},
}

_EVENT_END: Final = b"\r\n\r\n"

_request_ids = itertools.count(1)


@dataclass(frozen=True)
class Response:
    """What a client got of a stream before it left."""

    events: list[bytes]
    """Events as they were sent, each of them SSE."""
    seconds: float
    """Seconds from the request until the last of them."""

    @property
    def ids(self) -> list[bytes]:
        lines = [line for event in self.events for line in event.splitlines()]
        return [line.removeprefix(b"id: ") for line in lines if line.startswith(b"id: ")]


@dataclass(frozen=True)
class Endpoint:
    """MCP endpoint of an app.

    Args:
        app: App whose lifespan has begun.
        path: Path of the endpoint.
        resumable: Whether its answers to calls are events with ids.
    """

    app: ASGIApp
    path: str = "/mcp"
    resumable: bool = False

    async def open_session(self) -> bytes:
        """Send `initialize` and `notifications/initialized`, and return the session id."""
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": _INITIALIZE_PARAMS}
        headers, body = await self._post(message, None, 200)
        if b'"serverInfo"' not in body:
            raise RuntimeError(f"initialize was answered {body!r}")
        session_id = headers[b"mcp-session-id"]
        await self._post({"jsonrpc": "2.0", "method": "notifications/initialized"}, session_id, 202)
        return session_id

    async def call_tool(self, session_id: bytes) -> bytes:
        """Call the tool `add`, and return the body of the answer."""
        request_id = next(_request_ids)
        params = {"name": "add", "arguments": {"a": request_id, "b": 1}}
        message = {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}
        _, body = await self._post(message, session_id, 200)
        if f'"text":"{request_id + 1}"'.encode() not in body:
            raise RuntimeError(f"tools/call was answered {body!r}")
        if self.resumable and not body.removesuffix(_EVENT_END).rpartition(_EVENT_END)[2].startswith(b"id: "):
            raise RuntimeError(f"tools/call was answered without an event id: {body!r}")
        return body

    async def ping(self, session_id: bytes) -> None:
        message = {"jsonrpc": "2.0", "id": next(_request_ids), "method": "ping"}
        _, body = await self._post(message, session_id, 200)
        if b'"result":{}' not in body:
            raise RuntimeError(f"ping was answered {body!r}")

    async def get_events(self, session_id: bytes, last_event_id: bytes | None, *, count: int) -> Response:
        """GET a stream of a session, and leave as soon as it has brought so many events.

        Args:
            session_id: Id of the session.
            last_event_id: Id of the event after which the stream goes on; `None` opens the standalone stream.
            count: Number of events to wait for.
        """
        headers = [(b"host", b"127.0.0.1:8000"), (b"accept", b"text/event-stream"), *_headers_of(session_id)]
        if last_event_id is not None:
            headers.append((b"last-event-id", last_event_id))
        requests: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
        complete = asyncio.Event()
        events: list[bytes] = []
        began = ended = 0.0
        status = 0

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await complete.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not ended and (body := message.get("body", b"")) and not body.startswith(b":"):
                # A part of the body may hold several events.
                events.extend(body.removesuffix(_EVENT_END).split(_EVENT_END))
                if len(events) >= count:
                    ended = time.perf_counter()
                    complete.set()

        with garbage_kept():
            began = time.perf_counter()
            await self.app(self._scope("GET", headers), receive, send)
        if status != 200:
            raise RuntimeError(f"the GET was answered {status}")
        if len(events) < count:
            raise RuntimeError(f"the response ended after {len(events)} events of {count}")
        return Response(events, ended - began)

    @contextlib.asynccontextmanager
    async def stream(self, session_id: bytes) -> AsyncIterator[None]:
        """Open the standalone stream of a session, and leave it in the end."""
        headers = [(b"host", b"127.0.0.1:8000"), (b"accept", b"text/event-stream"), *_headers_of(session_id)]
        requests: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        left = asyncio.Event()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.set_result(message["status"])

        request: asyncio.Future[None] = asyncio.ensure_future(self.app(self._scope("GET", headers), receive, send))
        await asyncio.wait((request, started), return_when=asyncio.FIRST_COMPLETED)
        if (status := started.result() if started.done() else None) != 200:
            raise RuntimeError(f"the GET was answered {status}")
        yield
        left.set()
        await request

    async def _post(
        self, message: dict[str, Any], session_id: bytes | None, expected: int
    ) -> tuple[dict[bytes, bytes], bytes]:
        """POST one message, and return headers and body of the answer."""
        headers = [
            (b"host", b"127.0.0.1:8000"),
            (b"accept", b"application/json, text/event-stream"),
            (b"content-type", b"application/json"),
        ]
        if session_id is not None:
            headers += _headers_of(session_id)
        requests: list[Message] = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]
        start: Message = {}
        body = b""

        async def receive() -> Message:
            if not requests:
                await asyncio.Event().wait()
            return requests.pop()

        async def send(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")

        await self.app(self._scope("POST", headers), receive, send)
        if not start or start["status"] != expected:
            raise RuntimeError(f"{message['method']} was answered {start.get('status')}: {body!r}")
        return dict(start["headers"]), body

    def _scope(self, method: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }


def _headers_of(session_id: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that each request of a session carries."""
    return [(b"mcp-session-id", session_id), (b"mcp-protocol-version", PROTOCOL_VERSION.encode())]


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect garbage now and not meanwhile: the number of full collections within so short a time is chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
