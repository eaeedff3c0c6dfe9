"""Real clients that answer what `tests.support.questions` asks, and what they sent on the wire."""

from __future__ import annotations

import json
import re
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import httpx2
import mcp_types as types
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.support.questions import ASK, PID_HEADER, STEPS, Ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

ClientKind = Literal["official", "fastmcp"]

TOKEN: Final = re.compile(rb"[a-z]+-[0-9a-f]{16}")
"""The kind of a question, and a random part."""


@dataclass
class Posted:
    """A POST, and its answer."""

    status: int | None = None
    """`None`: no answer has come."""
    pid: int | None = None
    """Process that answered."""
    at: float = field(default_factory=time.time)

    @property
    def accepted(self) -> bool:
        return self.status == 202


@dataclass
class Wire:
    """What a number of clients posted, by the token that it belongs to."""

    answers: dict[str, Posted] = field(default_factory=dict)
    cancellations: dict[str, Posted] = field(default_factory=dict)
    progress: dict[str, list[tuple[int, Posted]]] = field(default_factory=dict)
    changed_roots: dict[str, list[Posted]] = field(default_factory=dict)
    """By the name of the client."""
    question_ids: dict[tuple[str, Any], set[str]] = field(default_factory=dict)
    """Tokens of the questions that a client has answered, by its name and the questions' id."""
    session_ids: set[str] = field(default_factory=set)
    sessions: dict[str, str] = field(default_factory=dict)
    """Id of each client's session, by its name."""


class _Hooks:
    """Hooks of the HTTP client of one client."""

    def __init__(self, name: str, wire: Wire) -> None:
        self._name = name
        self._wire = wire
        self._calls: dict[Any, str] = {}

    @property
    def hooks(self) -> Mapping[str, list[Callable[..., Any]]]:
        return {"request": [self._on_request], "response": [self._on_response]}

    async def _on_request(self, request: httpx2.Request) -> None:
        if request.method != "POST":
            return
        posted = request.extensions["posted"] = Posted()
        wire = self._wire
        message = json.loads(request.content)
        params = message.get("params") or {}
        match message.get("method"):
            case None:
                # A ping is answered without a token.
                if found := TOKEN.search(request.content):
                    token = found[0].decode()
                    # A question that is answered again was repeated by a stream that the client has resumed.
                    wire.answers.setdefault(token, posted)
                    wire.question_ids.setdefault((self._name, message["id"]), set()).add(token)
            case "tools/call":
                self._calls[message["id"]] = params["arguments"]["token"]
            case "notifications/cancelled":
                wire.cancellations[self._calls[params["requestId"]]] = posted
            case "notifications/progress":
                wire.progress.setdefault(params["message"], []).append((int(params["progress"]), posted))
            case "notifications/roots/list_changed":
                wire.changed_roots.setdefault(self._name, []).append(posted)

    async def _on_response(self, response: httpx2.Response) -> None:
        if session_id := response.headers.get("mcp-session-id"):
            self._wire.session_ids.add(session_id)
            self._wire.sessions[self._name] = session_id
        posted: Posted | None = response.request.extensions.get("posted")
        if posted is not None:
            posted.status = response.status_code
            pid = response.headers.get(PID_HEADER)
            posted.pid = None if pid is None else int(pid)


class Respondent:
    """A client in its session, which answers each question with its own name and the question's token.

    Args:
        name: Its name, which no other client has.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.before_answer: Callable[[str], Awaitable[None]] | None = None
        """Called with the token before a question is answered."""
        self.call_tool: Callable[..., Awaitable[types.CallToolResult]]
        self.session: Any
        """The SDK's client session."""
        self.heard: list[str] = []
        """Tokens of what the server has said outside of calls, and of what it has asked for with roots."""

    async def ask(self, token: str) -> str:
        """Have the server ask what a token says, and return the answer as it came to the server."""
        kind = token.partition("-")[0]
        result = await self.call_tool("sample" if kind == "error" else kind, {"token": token})
        content = result.content[0]
        assert isinstance(content, types.TextContent)
        return content.text

    async def cancel(self, token: str) -> None:
        """Call the tool `wait`, and cancel the call when it runs."""
        with anyio.CancelScope() as scope:

            async def on_progress(progress: float, total: float | None, message: str | None) -> None:
                scope.cancel()

            await self.call_tool("wait", {"token": token}, on_progress)

    async def change_roots(self) -> None:
        """Notify the server that the roots have changed."""
        await self.session.send_notification(types.RootsListChangedNotification())

    async def be_told(self, token: str) -> None:
        """Have the server say or ask, outside of calls, what a token says."""
        if token.startswith("asked"):
            await self.session.send_notification(types.Notification(method=ASK, params=Ask(token=token)))
        else:
            await self.call_tool("tell", {"token": token})

    async def hear(self, message: Any) -> None:
        """Take what the server has said outside of calls."""
        if isinstance(message, types.ServerNotification) and (
            found := TOKEN.search(message.model_dump_json(by_alias=True).encode())
        ):
            self.heard.append(found[0].decode())

    def expected(self, token: str) -> str:
        """Return the answer to a question."""
        return f"{self.name} {token}"

    async def elicited(self, context: Any, token: str) -> dict[str, str]:
        """Return the answer to an elicitation, and report progress before it where that is wanted."""
        if (progress_token := (context.meta or {}).get("progress_token")) is not None:
            for step in STEPS:
                progress = types.ProgressNotificationParams(progress_token=progress_token, progress=step, message=token)
                await context.session.send_notification(types.ProgressNotification(params=progress))
            # The call takes a while, in which processes are killed.
            await anyio.sleep(0.5)
        await self._wait(token)
        return {"said": self.expected(token)}

    async def sampled(self, messages: list[types.SamplingMessage]) -> str:
        content = messages[0].content
        assert isinstance(content, types.TextContent)
        await self._wait(content.text)
        return content.text

    async def listed(self, context: Any) -> list[types.Root]:
        token = context.meta["token"]
        self.heard.append(token)
        await self._wait(token)
        return [types.Root(uri=f"file:///{token}", name=self.expected(token))]  # type: ignore[arg-type]

    async def _wait(self, token: str) -> None:
        if self.before_answer is not None:
            await self.before_answer(token)


@asynccontextmanager
async def respondent(url: str, name: str, wire: Wire, kind: ClientKind = "official") -> AsyncIterator[Respondent]:
    """A client, connected; it ends its session at exit."""
    one = Respondent(name)
    connected = _official if kind == "official" else _fastmcp
    async with connected(url, one, _Hooks(name, wire).hooks):
        yield one


@asynccontextmanager
async def _official(url: str, one: Respondent, hooks: Mapping[str, list[Callable[..., Any]]]) -> AsyncIterator[None]:
    async def elicit(context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:
        said: Any = await one.elicited(context, params.message)
        return types.ElicitResult(action="accept", content=said)

    async def sample(
        context: Any, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.ErrorData:
        token = await one.sampled(params.messages)
        if token.startswith("error"):
            return types.ErrorData(code=-1, message=one.expected(token))
        content = types.TextContent(type="text", text=one.expected(token))
        return types.CreateMessageResult(role="assistant", model="none", content=content)

    async def roots(context: Any) -> types.ListRootsResult:
        return types.ListRootsResult(roots=await one.listed(context))

    async with httpx2.AsyncClient(timeout=60, trust_env=False, verify=False, event_hooks=hooks) as http:
        client = Client(
            streamable_http_client(url, http_client=http),
            mode="legacy",
            client_info=types.Implementation(name=one.name, version="1"),
            elicitation_callback=elicit,
            sampling_callback=sample,
            list_roots_callback=roots,
            message_handler=one.hear,
        )

        async def call_tool(tool: str, arguments: dict[str, Any], on_progress: Any = None) -> types.CallToolResult:
            return await client.call_tool(tool, arguments, progress_callback=on_progress)

        one.call_tool = call_tool
        async with client:
            one.session = client.session
            yield


@asynccontextmanager
async def _fastmcp(url: str, one: Respondent, hooks: Mapping[str, list[Callable[..., Any]]]) -> AsyncIterator[None]:
    # Imported here, as it takes a second.
    import fastmcp
    from fastmcp.client.elicitation import ElicitResult
    from fastmcp.client.transports import StreamableHttpTransport

    async def elicit(message: str, _type: Any, _params: Any, context: Any) -> ElicitResult[Any]:
        return ElicitResult(action="accept", content=await one.elicited(context, message))

    async def sample(messages: list[types.SamplingMessage], _params: Any, _context: Any) -> str:
        token = await one.sampled(messages)
        if token.startswith("error"):
            raise RuntimeError(one.expected(token))
        return one.expected(token)

    async def roots(context: Any) -> list[types.Root]:
        return await one.listed(context)

    def http_client(**options: Any) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(**{"timeout": 60, **options, "verify": False}, trust_env=False, event_hooks=hooks)

    handlers: dict[str, Any] = {"elicitation_handler": elicit, "sampling_handler": sample, "roots": roots}
    factory: Any = http_client
    client = fastmcp.Client(
        StreamableHttpTransport(url, httpx_client_factory=factory),
        mode="legacy",
        client_info=types.Implementation(name=one.name, version="1"),
        message_handler=one.hear,
        **handlers,
    )

    async def call_tool(tool: str, arguments: dict[str, Any], on_progress: Any = None) -> types.CallToolResult:
        return await client.call_tool_mcp(tool, arguments, progress_handler=on_progress)

    one.call_tool = call_tool
    async with client:
        one.session = client.session
        yield
