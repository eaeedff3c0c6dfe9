"""Clients of a server process: the official one, with a record of its traffic, and load."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import Implementation, ResourceUpdatedNotification

from tests.support.http import RawClient, assert_not_handled, assert_unavailable, is_not_handled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from mcp.client._transport import TransportStreams
    from mcp.client.session import IncomingMessage

    from tests.support.http import Answer, Event, Message, Stream
    from tests.support.servers import ServerProcess

PATIENCE = 30.0
"""Seconds after which a test stops waiting."""
BOUND = 30.0
"""Seconds within which a request is refused: five for a database that hangs, and much for a slow machine."""


async def until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]], what: str, *, within: float = PATIENCE
) -> None:
    """Poll a condition until it holds.

    Args:
        condition: The condition, polled.
        what: The condition in words, for the message of a failure.
        within: Seconds.
    """
    with anyio.move_on_after(within):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await anyio.sleep(0.01)
    raise AssertionError(f"not within {within:.0f} s: {what}")


async def have_arrived(server: ServerProcess) -> None:
    """Wait until the requests that this event loop is sending have come to a server, which answers others at once."""
    async with httpx2.AsyncClient(timeout=60, trust_env=False, verify=False) as http:
        # Each answer shows that both processes have gone on with all else that they could do meanwhile.
        for _ in range(50):
            await http.get(server.url)


def pid_of(instance: str) -> int:
    """Return the process id in an instance's id."""
    return int(instance.rsplit(":", 2)[1])


async def whoami(client: RawClient) -> dict[str, Any]:
    """Call the tool `whoami`, which must succeed, and return its result."""
    answer = await client.call_tool("whoami")
    assert answer.status == 200, answer
    told: dict[str, Any] = json.loads(answer.text)
    return told


@asynccontextmanager
async def sessions(url: str, number: int) -> AsyncIterator[list[RawClient]]:
    """So many clients, each in a session of its own, and each with its own HTTP connections."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient(url)) for _ in range(number)]
        for client in clients:
            await client.handshake()
        yield clients


async def is_refused(request: Callable[[], Awaitable[Answer]]) -> None:
    """Send it, and have it refused for now by HTTP."""
    assert_unavailable(await request())


async def call_is_refused(request: Callable[[], Awaitable[Answer]]) -> None:
    """Send a JSON-RPC request, and have it refused for now by an error with its id."""
    assert_not_handled(await request())


def opens(client: RawClient) -> Callable[[], Awaitable[bool]]:
    """Return whether the server opens a session for this client; if not, its answer must be a 503."""

    async def opened() -> bool:
        client.session_id = None
        answer = await client.initialize()
        if answer.status != 200:
            assert_unavailable(answer)
        return answer.status == 200

    return opened


def everything(count: int) -> list[int | str]:
    """Return all that a call of `talk` with `count` reports says, as in `Talking.said`."""
    return [*range(count), "result"]


class Talking:
    """A call of the tool `talk` by a client that can lose its connection at any event, and come back.

    Args:
        client: In its session; it goes to the server that was last called or come back to.
        call: The call's name.
        arguments: More of the tool's.
    """

    def __init__(self, client: RawClient, call: str, **arguments: Any) -> None:
        self.said: list[int | str] = []
        """All that the client received, in order: progress, and "result" or the reason of an error."""
        self.event_ids: list[str] = []
        """All event ids that the client received."""
        self.repeated: list[int] = []
        """Progress that the client received again, with an event id, after it came without one."""
        self.answer: Message = {}
        """The message that ended the call."""
        self.retry: set[int | None] = set()
        """Times after which to come back, of all responses."""
        self.name = call
        self._without_id: set[int] = set()
        self._client = client
        self._connection = AsyncExitStack()
        self._stream: Stream | None = None
        params = {"name": "talk", "arguments": {"call": call, **arguments}, "_meta": {"progressToken": call}}
        self.request = client.message("tools/call", params)

    @property
    def answered(self) -> bool:
        return bool(self.answer)

    async def connect(self, server: ServerProcess) -> None:
        """Call, or come back for the rest, as often as that is refused for now."""
        await self.leave()
        with anyio.fail_after(PATIENCE):
            while (stream := await self._connection.enter_async_context(self._request(server))).status == 503:
                assert_unavailable(await stream.read())
                await self.leave()
                await anyio.sleep(0.05)
        assert stream.status == 200, await stream.read()
        self._stream = stream

    async def leave(self) -> None:
        """Lose the connection."""
        await self._connection.aclose()

    @asynccontextmanager
    async def connected(self, server: ServerProcess) -> AsyncIterator[None]:
        """Meanwhile be connected."""
        await self.connect(server)
        try:
            yield
        finally:
            await self.leave()

    async def take(self, events: int | None = None) -> None:
        """Read so many events, or up to the end."""
        assert self._stream is not None
        with anyio.fail_after(PATIENCE):
            while events is None or events > 0:
                try:
                    event = await self._stream.next_event()
                except StopAsyncIteration:
                    assert events is None
                    break
                self._note(event)
                if events is not None and (event.id or event.message):
                    events -= 1
        self.retry.add(self._stream.retry)

    async def read(self, server: ServerProcess, events: int | None = None) -> None:
        """Call, or come back for the rest; read so many events, or up to the end; and lose the connection."""
        async with self.connected(server):
            await self.take(events)

    def _request(self, server: ServerProcess) -> AbstractAsyncContextManager[Stream]:
        self._client.url = server.mcp_url
        if self.event_ids:
            return self._client.get_stream(last_event_id=self.event_ids[-1])
        return self._client.stream("POST", self.request)

    def forget_answer(self) -> Message:
        """Be as before the answer, which was the last event; what it was."""
        answer, self.answer = self.answer, {}
        self.event_ids.pop()
        self.said.pop()
        return answer

    def _note(self, event: Event) -> None:
        if event.id is not None:
            self.event_ids.append(event.id)
        if (message := event.message) is None:
            return
        assert not self.answered
        if "method" in message:
            progress = message["params"]
            assert message["method"] == "notifications/progress"
            assert (progress["progressToken"], progress["message"].rstrip(".")) == (
                self.name,
                f"{self.name} {progress['progress']:.0f}",
            )
            number = int(progress["progress"])
            if event.id is None:
                self._without_id.add(number)
            elif number in self._without_id:
                self.repeated.append(number)
                return
            self.said.append(number)
            return
        assert message["id"] == self.request["id"]
        self.answer = message
        self.said.append("result" if "result" in message else message["error"]["data"]["reason"])


class OfficialClient:
    """The SDK's own client in its handshake mode, and what it sends and gets on the wire.

    Args:
        transport: On which it speaks.
    """

    def __init__(self, transport: AbstractAsyncContextManager[TransportStreams]) -> None:
        self.client = Client(
            transport,
            mode="legacy",
            client_info=Implementation(name="official", version="1"),
            message_handler=self.on_message,
        )
        self.methods: list[str] = []
        """The JSON-RPC methods that it sent, in order."""
        self.session_ids: set[str] = set()
        """Session ids that it sent and received."""
        self.statuses: Counter[int] = Counter()
        """The HTTP statuses that it was answered."""
        self.resumed_after: list[str] = []
        """Each `Last-Event-ID` that it sent."""
        self.said: dict[str, list[int | str]] = {}
        """What each call of `talk` said, in order: progress, and "result"."""
        self.announced: list[str] = []
        """What calls of `announce` said, in order."""

    async def talk(self, call: str, **arguments: Any) -> str:
        """Call the tool `talk`, which must succeed; the process that answered."""
        said = self.said[call] = []

        async def note(progress: float, total: float | None, message: str | None) -> None:
            assert message == f"{call} {progress:.0f}"
            said.append(int(progress))

        result = await self.client.call_tool("talk", {"call": call, **arguments}, progress_callback=note)
        assert not result.is_error, result
        said.append("result")
        assert result.content[0].type == "text"
        return result.content[0].text

    async def text(self, tool: str, **arguments: object) -> str:
        """Call a tool, which must succeed, and return the text of its result."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result
        assert result.content[0].type == "text"
        return result.content[0].text

    async def announce(self, text: str, count: int) -> None:
        """Call the tool `announce`, which must succeed."""
        await self.text("announce", text=text, count=count)

    async def whoami(self) -> dict[str, Any]:
        """Call the tool `whoami`, which must succeed, and return its result."""
        told: dict[str, Any] = json.loads(await self.text("whoami"))
        return told

    async def on_message(self, message: IncomingMessage) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            self.announced.append(message.params.uri)

    async def on_request(self, request: httpx2.Request) -> None:
        if request.method == "POST":
            self.methods.append(json.loads(request.content).get("method", "(response)"))
        if last_event_id := request.headers.get("last-event-id"):
            self.resumed_after.append(last_event_id)
        self._note(request.headers)

    async def on_response(self, response: httpx2.Response) -> None:
        self.statuses[response.status_code] += 1
        self._note(response.headers)

    def _note(self, headers: httpx2.Headers) -> None:
        if session_id := headers.get("mcp-session-id"):
            self.session_ids.add(session_id)


@asynccontextmanager
async def official_client(url: str) -> AsyncIterator[OfficialClient]:
    """The SDK's client, connected; it ends its session at exit."""
    async with httpx2.AsyncClient(timeout=60, trust_env=False, verify=False) as http:
        watched = OfficialClient(streamable_http_client(url, http_client=http))
        http.event_hooks = {"request": [watched.on_request], "response": [watched.on_response]}
        async with watched.client:
            yield watched


class Load:
    """Clients that call a tool in a loop, each in its session, and count their answers.

    An async context manager: they begin on entry, and have stopped on exit.

    Args:
        clients: Used by nothing else meanwhile.
    """

    def __init__(self, clients: Sequence[RawClient]) -> None:
        self.statuses: Counter[int] = Counter()
        """The HTTP statuses of all answers."""
        self.disconnects = 0
        """Requests without an answer: refused, or cut in the middle."""
        self.not_handled = 0
        """Calls that were refused for now."""
        self.wrong: list[Answer] = []
        """Other answers with 200 that are not the tool's result."""
        self._clients = list(clients)
        self._done = [0] * len(clients)
        self._stopping = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        group = await self._stack.enter_async_context(anyio.create_task_group())
        for index in range(len(self._clients)):
            group.start_soon(self._call, index)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._stopping = True
        await self._stack.__aexit__(*error)

    async def advance(self, calls: int) -> None:
        """Wait until each client has got so many more results."""
        goal = [done + calls for done in self._done]
        await until(
            lambda: all(done >= wanted for done, wanted in zip(self._done, goal, strict=True)),
            f"{calls} more results for each client; they have {self._done}, answers {self.statuses}",
        )

    async def _call(self, index: int) -> None:
        client = self._clients[index]
        while not self._stopping:
            try:
                answer = await client.call_tool("whoami")
            except httpx2.TransportError:
                self.disconnects += 1
                await anyio.sleep(0.02)
                continue
            self.statuses[answer.status] += 1
            if answer.status == 200:
                if not answer.messages:
                    # The stream's end came before the result: a connection that was cut, over SSE.
                    self.disconnects += 1
                elif "result" in answer.messages[-1] and json.loads(answer.text)["client"] == "raw":
                    self._done[index] += 1
                elif is_not_handled(answer):
                    self.not_handled += 1
                else:
                    self.wrong.append(answer)
            # A round trip leaves little time for the others on a slow machine.
            await anyio.sleep(0.002)
