"""Resume a stream as a client does, by a GET with `Last-Event-ID`, and time its response at the ASGI boundary."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks.sessions import headers_of, scope_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message


EVENT_END: Final = b"\r\n\r\n"


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


async def get_events(app: ASGIApp, session_id: bytes, last_event_id: bytes | None, *, count: int) -> Response:
    """GET a stream of a session, and leave as soon as it has brought so many events.

    Args:
        app: App that serves the session.
        session_id: Id of the session.
        last_event_id: Id of the event after which the stream goes on; `None` opens the standalone stream.
        count: Number of events to wait for.
    """
    headers = [(b"host", b"127.0.0.1:8000"), (b"accept", b"text/event-stream"), *headers_of(session_id)]
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
            events.extend(body.removesuffix(EVENT_END).split(EVENT_END))
            if len(events) >= count:
                ended = time.perf_counter()
                complete.set()

    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        await app(scope_of("GET", headers), receive, send)
    finally:
        gc.enable()
    if status != 200:
        raise RuntimeError(f"the GET was answered {status}")
    if len(events) < count:
        raise RuntimeError(f"the response ended after {len(events)} events of {count}")
    return Response(events, ended - began)
