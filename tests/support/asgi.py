"""HTTP at the ASGI boundary: the answer to a request, message by message, while it is being sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx2

from tests.support.http import INITIALIZE_PARAMS, PROTOCOL_VERSION, SESSION_ID, Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anyio.abc import TaskGroup
    from starlette.types import ASGIApp, Scope
    from starlette.types import Message as ASGIMessage

    from tests.support.http import Message

PATIENCE: Final = 10.0
"""Seconds after which a test stops waiting."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; `None` for a field that it does not have."""

    id: str | None
    data: str | None
    retry: str | None

    @property
    def message(self) -> Message:
        """The JSON-RPC message in it."""
        assert self.data, f"{self} holds no message"
        message: Message = json.loads(self.data)
        return message


class Exchange:
    """One HTTP request that an app serves, and its answer so far.

    Args:
        app: The app.
        scope: The ASGI scope of the request.
        parts: Its body, as it arrives.
        whole: Whether that is all of it.
    """

    def __init__(self, app: ASGIApp, scope: Scope, *parts: bytes, whole: bool = True) -> None:
        self.sent: list[ASGIMessage] = []
        """Each ASGI message of the answer."""
        self.over = anyio.Event()
        """Set when the app has returned."""
        self.started = anyio.Event()
        """Set when `http.response.start` was sent."""
        self._app = app
        self._scope = scope
        self._incoming: list[ASGIMessage] = []
        self._arrival = anyio.Event()
        self._gone = anyio.Event()
        self._reads = anyio.Event()
        self._reads.set()
        self._cancellation = anyio.CancelScope()
        self._error: Exception | None = None
        self._taken = 0
        self.arrive(*parts, whole=whole)

    @property
    def unread(self) -> int:
        """Number of parts of the body that have arrived, and that the app has not taken."""
        return len(self._incoming)

    def arrive(self, *parts: bytes, whole: bool = True) -> None:
        """Have more of the body arrive."""
        self._incoming += [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if whole:
            self._incoming[-1]["more_body"] = False
        self._arrival.set()

    async def run(self) -> None:
        """Have the app serve the request."""
        try:
            with self._cancellation:
                await self._app(self._scope, self._receive, self.send)
        except Exception as error:
            self._error = error
        finally:
            self.over.set()

    def disconnect(self) -> None:
        """Disconnect the client: the app learns of it by `receive`, and all that it still sends is lost."""
        self._gone.set()

    def stop_reading(self) -> None:
        """Stop reading from the connection, without closing it."""
        self._reads = anyio.Event()

    def read_on(self) -> None:
        """Read from the connection again."""
        self._reads.set()

    def cancel(self) -> None:
        """Cancel the request in the server, as some servers do when the client disconnects."""
        self._gone.set()
        self._cancellation.cancel()

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> httpx2.Headers:
        return httpx2.Headers(self.sent[0]["headers"])

    @property
    def session_id(self) -> str | None:
        return self.headers.get(SESSION_ID)

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent if message["type"] == "http.response.body")

    @property
    def messages(self) -> list[Message]:
        """The JSON-RPC messages that have arrived."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return [event.message for event in self.events if event.data]
        try:
            parsed = json.loads(self.body)
        except ValueError:
            return []
        return [parsed] if isinstance(parsed, dict) else []

    @property
    def events(self) -> list[Event]:
        """The events of a stream that have arrived whole, priming ones included, without comments."""
        *blocks, _ = self.body.decode().replace("\r\n", "\n").split("\n\n")
        return [event for block in blocks if (event := _event(block)) is not None]

    @property
    def last_event_id(self) -> str | None:
        """The last id of the stream, as a client keeps it."""
        return next((event.id for event in reversed(self.events) if event.id is not None), None)

    async def start(self) -> None:
        """Wait until `http.response.start` was sent."""
        with anyio.fail_after(PATIENCE):
            await self.started.wait()

    async def end(self) -> None:
        """Wait until the app has returned or raised."""
        with anyio.fail_after(PATIENCE):
            await self.over.wait()

    async def leave(self) -> str | None:
        """Break the connection, wait until the app has noticed, and return the client's last event id."""
        self.disconnect()
        await self.end()
        return self.last_event_id

    async def next(self) -> Message:
        """Wait for the next JSON-RPC message of a stream."""
        await self.start()
        await until(lambda: len(self.messages) > self._taken)
        self._taken += 1
        return self.messages[self._taken - 1]

    async def answer(self) -> Answer:
        """Return the whole answer, or raise the app's exception."""
        await self.end()
        if self._error is not None:
            raise self._error
        assert self.sent, "the app sent no response"
        return Answer(status=self.status, headers=self.headers, body=self.body, messages=self.messages)

    async def _receive(self) -> ASGIMessage:
        while not self._incoming:
            if self._gone.is_set():
                return {"type": "http.disconnect"}
            self._arrival = anyio.Event()
            async with anyio.create_task_group() as either:
                either.start_soon(_cancel_after, self._arrival, either.cancel_scope)
                either.start_soon(_cancel_after, self._gone, either.cancel_scope)
        return self._incoming.pop(0)

    async def send(self, message: ASGIMessage) -> None:
        """Take a message of the answer, when the client reads."""
        while not (self._reads.is_set() or self._gone.is_set()):
            async with anyio.create_task_group() as either:
                either.start_soon(_cancel_after, self._reads, either.cancel_scope)
                either.start_soon(_cancel_after, self._gone, either.cancel_scope)
        if self._gone.is_set():
            return
        self.sent.append(message)
        if message["type"] == "http.response.start":
            assert len(self.sent) == 1, "the answer was started twice"
            self.started.set()


class Client:
    """A client of an app in this process, which sends nothing on its own.

    Args:
        app: The app.
        tasks: Task group in which its requests are served.
        session_id: The session to go on in.
        user: The authenticated user in the ASGI scope.
        address: The client's address.
        headers: Sent with each request.
        path: The MCP endpoint.
    """

    def __init__(
        self,
        app: ASGIApp,
        tasks: TaskGroup,
        *,
        session_id: str | None = None,
        user: object = None,
        address: str = "127.0.0.1",
        headers: Mapping[str, str] | None = None,
        path: str = "/mcp",
    ) -> None:
        self.session_id = session_id
        self.user = user
        self.address = address
        self.headers = dict(headers or {})
        self.path = path
        self._app = app
        self._tasks = tasks
        self._last_id = 0

    def open(self, method: str, message: Message | bytes | None = None, /, **headers: str | None) -> Exchange:
        """Send a request, and go on while it is served.

        Args:
            method: GET, POST, DELETE, or any other.
            message: The body: a message, or any bytes.
            headers: Underscores stand for hyphens; `None` removes a header.
        """
        content = json.dumps(message).encode() if isinstance(message, dict) else message
        return self._begin(Exchange(self._app, self._scope(method, content, headers), content or b""))

    def open_parts(self, *parts: bytes, whole: bool = True, **headers: str | None) -> Exchange:
        """POST a body of unknown length in parts; it goes on arriving unless it is whole."""
        headers = {"content_type": "application/json", **headers}
        return self._begin(Exchange(self._app, self._scope("POST", None, headers), *parts, whole=whole))

    def _begin(self, exchange: Exchange) -> Exchange:
        self._tasks.start_soon(exchange.run)
        return exchange

    def _scope(self, method: str, content: bytes | None, headers: Mapping[str, str | None]) -> Scope:
        sent: dict[str, str | None] = {
            "host": "127.0.0.1:8000",
            "accept": "text/event-stream" if method == "GET" else "application/json, text/event-stream",
            "content-type": "application/json" if content is not None else None,
            "content-length": str(len(content)) if content is not None else None,
            SESSION_ID: self.session_id,
            "mcp-protocol-version": PROTOCOL_VERSION if self.session_id is not None else None,
            **self.headers,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items() if value is not None],
            "client": (self.address, 50000),
            "server": ("127.0.0.1", 8000),
        }
        if self.user is not None:
            scope["user"] = self.user
        return scope

    def open_request(
        self, method: str, params: Message | None = None, *, request_id: str | int | None = None, **headers: str | None
    ) -> Exchange:
        """Send a JSON-RPC request, under the next id unless one is given, and return while it is served."""
        self._last_id += 1
        message: Message = {"jsonrpc": "2.0", "id": request_id, "method": method}
        if request_id is None:
            message["id"] = self._last_id
        return self.open("POST", message if params is None else {**message, "params": params}, **headers)

    def open_call(
        self, name: str, arguments: Message | None = None, *, request_id: str | int | None = None
    ) -> Exchange:
        """Call a tool, and go on while it runs."""
        return self.open_request("tools/call", {"name": name, "arguments": arguments or {}}, request_id=request_id)

    def open_initialize(self, params: Message | None = None, **headers: str | None) -> Exchange:
        """Send `initialize`, and go on while it is served."""
        return self.open_request("initialize", INITIALIZE_PARAMS if params is None else params, **headers)

    async def post(self, message: Message | bytes, **headers: str | None) -> Answer:
        """POST a message, or any bytes."""
        return await self.open("POST", message, **headers).answer()

    async def request(self, method: str, params: Message | None = None, **headers: str | None) -> Answer:
        """Send a JSON-RPC request."""
        return await self.open_request(method, params, **headers).answer()

    async def call(self, name: str, arguments: Message | None = None) -> Answer:
        """Call a tool."""
        return await self.open_call(name, arguments).answer()

    async def ping(self, **headers: str | None) -> Answer:
        """Send `ping`, the cheapest request."""
        return await self.open_request("ping", None, **headers).answer()

    async def notify(self, method: str, params: Message | None = None) -> Answer:
        """Send a notification."""
        message: Message = {"jsonrpc": "2.0", "method": method}
        return await self.post(message if params is None else {**message, "params": params})

    async def respond(self, request_id: str | int, result: Message) -> Answer:
        """Answer a request of the server's."""
        return await self.post({"jsonrpc": "2.0", "id": request_id, "result": result})

    async def delete(self, **headers: str | None) -> Answer:
        """End the session."""
        return await self.open("DELETE", **headers).answer()

    async def get_stream(self, **headers: str | None) -> Exchange:
        """Open the standalone stream, for messages that belong to no call."""
        stream = self.open("GET", **headers)
        await stream.start()
        return stream

    def open_stream(self, last_event_id: str | None = None, **headers: str | None) -> Exchange:
        """GET a stream, the standalone one unless it is resumed, and go on while it is open."""
        return self.open("GET", last_event_id=last_event_id, **headers)

    async def initialize(self, params: Message | None = None, **headers: str | None) -> Answer:
        """Send `initialize`; outside of a session its answer's id is the session from then on."""
        answer = await self.open_initialize(params, **headers).answer()
        if self.session_id is None:
            self.session_id = answer.session_id
        return answer

    async def begin(self) -> str:
        """Open a session and make use of it, so that it lives as the policy says; return its id."""
        session_id = await self.handshake()
        assert (await self.request("tools/list")).status == 200
        return session_id

    async def handshake(self, params: Message | None = None) -> str:
        """Send `initialize` and `notifications/initialized`, which must succeed; return the session's id."""
        answer = await self.initialize(params)
        assert answer.status == 200, answer
        assert self.session_id is not None, answer
        notified = await self.notify("notifications/initialized")
        assert notified.status == 202, notified
        return self.session_id


async def until(condition: Callable[[], bool]) -> None:
    """Poll a condition until it holds."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.sleep(0.002)


def seen_by_a_client(answer: Answer) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return everything by which a client can tell two answers apart."""
    return answer.status, sorted(answer.headers.multi_items()), answer.body


async def _cancel_after(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _event(block: str) -> Event | None:
    fields: dict[str, list[str]] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        if name:
            fields.setdefault(name, []).append(value.removeprefix(" "))
    if not fields:
        return None
    id_, data, retry = ("\n".join(fields[name]) if name in fields else None for name in ("id", "data", "retry"))
    return Event(id=id_, data=data, retry=retry)
