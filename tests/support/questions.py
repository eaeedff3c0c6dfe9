"""A server whose tools ask the client, for tests in which the answers come to other processes than the questions.

Each question has a token, which its answer brings back. uvicorn calls the factories by name (`--factory`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import mcp_types as types
from mcp import MCPError
from mcp.server.lowlevel.server import Server
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.message import ServerMessageMetadata

from mcp_session_store import durable_app
from mcp_session_store.adapter.sdk import underlying_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fastmcp import FastMCP
    from mcp.server.context import ServerRequestContext
    from mcp.server.session import ServerSession
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tests.support.servers import ServeFunction, ServerProcess

_SETTINGS: Final = "QUESTIONS_SETTINGS"

PID_HEADER: Final = "x-pid"
"""Header of each answer: the process that it comes from."""
STEPS: Final = (1, 2, 3)
"""What a client reports of its progress with a question of the tool `progress`."""
ASK: Final = "notifications/questions/ask"
"""Notification of a client that wants to be asked for its roots, outside of a call."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server, which a test passes through the environment."""

    url: str | None
    """Of the database; `None`: the SDK alone."""
    notes: str
    """The file to which a line of JSON is appended for each `Note`."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of `durable_app`."""

    @property
    def environment(self) -> dict[str, str]:
        return {_SETTINGS: json.dumps(asdict(self))}


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that happened in a process of the server."""

    what: str
    """`began`, `progress`, `answered` and `cancelled` of a call of a tool, and `roots` for changed ones."""
    token: str
    """Token of the call; for changed roots the client's name."""
    pid: int
    at: float
    """Time by the clock of the machine."""
    value: str = ""


class Ask(types.NotificationParams):
    """Parameters of the notification `ASK`."""

    token: str


def _settings() -> Settings:
    return Settings(**json.loads(os.environ[_SETTINGS]))


def note(what: str, token: str, value: str = "") -> None:
    """Append a note."""
    line = json.dumps(asdict(Note(what=what, token=token, pid=os.getpid(), at=time.time(), value=value)))
    # One write to a file opened for appending: lines of several processes do not mix.
    with Path(_settings().notes).open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


class Notes:
    """The notes of all processes.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._by_token: dict[str, list[Note]] = {}

    def of(self, token: str) -> Sequence[Note]:
        """Return the notes with a token so far, in order."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        # It is being written.
                        break
                    self._read += len(line)
                    new = Note(**json.loads(line))
                    self._by_token.setdefault(new.token, []).append(new)
        return self._by_token.get(token, ())


class Call:
    """Call of one of the tools.

    Args:
        session: The session, as the SDK gives it to the call.
        request_id: Id of the call; `None`: all is said outside of calls, on the client's own stream.
        token: Token of the call.
        report: Reports progress of the call.
    """

    def __init__(
        self,
        session: ServerSession,
        request_id: types.RequestId | None,
        token: str,
        report: Callable[[float], Awaitable[None]],
    ) -> None:
        self._session = session
        # Else a question goes to the standalone stream, which may be open elsewhere.
        self._on_stream = ServerMessageMetadata(related_request_id=request_id)
        self._token = token
        self._report = report

    async def run(self, tool: str) -> str:
        """Run a tool, and return what the client answered, or the text of its error."""
        note("began", self._token)
        try:
            value: str = await getattr(self, tool)()
        except MCPError as error:
            value = error.message
        except anyio.get_cancelled_exc_class():
            note("cancelled", self._token)
            raise
        note("answered", self._token, value)
        return value

    async def elicit(self) -> str:
        return await self._elicit()

    async def progress(self) -> str:
        """Elicit, and note the progress that the client reports meanwhile."""

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            note("progress", self._token, f"{progress:.0f} {message}")

        return await self._elicit(progress_callback=on_progress)

    async def _elicit(self, **options: Any) -> str:
        schema = {"type": "object", "properties": {"said": {"type": "string"}}}
        params = types.ElicitRequestFormParams(message=self._token, requested_schema=schema)
        answer = await self._session.send_request(
            types.ElicitRequest(params=params), types.ElicitResult, metadata=self._on_stream, **options
        )
        assert answer.content is not None
        return str(answer.content["said"])

    async def sample(self) -> str:
        content = types.TextContent(type="text", text=self._token)
        params = types.CreateMessageRequestParams(
            messages=[types.SamplingMessage(role="user", content=content)], max_tokens=9
        )
        answer = await self._session.send_request(
            types.CreateMessageRequest(params=params), types.CreateMessageResult, metadata=self._on_stream
        )
        assert isinstance(answer.content, types.TextContent)
        return answer.content.text

    async def roots(self) -> str:
        meta = types.RequestParamsMeta(token=self._token)  # type: ignore[typeddict-unknown-key]  # an open map
        answer = await self._session.send_request(
            types.ListRootsRequest(params=types.RequestParams(_meta=meta)),
            types.ListRootsResult,
            metadata=self._on_stream,
        )
        return str(answer.roots[0].name)

    async def ping(self) -> str:
        await self._session.send_request(types.PingRequest(), types.EmptyResult, metadata=self._on_stream)
        return "pong"

    async def wait(self) -> str:
        """Run until the call is cancelled; the client learns from progress that it runs."""
        await self._report(1)
        await anyio.sleep_forever()
        return ""

    async def tell(self) -> str:
        """Say on the client's own stream what the kind of the token says."""
        kind, token = self._token.partition("-")[0], self._token
        notification: types.ServerNotification
        match kind:
            case "changed":
                params = types.NotificationParams(_meta={"token": token})
                notification = types.ToolListChangedNotification(params=params)
            case "updated":
                updated = types.ResourceUpdatedNotificationParams(uri=f"said://{token}")
                notification = types.ResourceUpdatedNotification(params=updated)
            case _:
                log = types.LoggingMessageNotificationParams(level="info", data=token)
                notification = types.LoggingMessageNotification(params=log)
        await self._session.send_notification(notification)
        return ""

    async def whoami(self) -> str:
        return str(os.getpid())


TOOLS: Final = ("elicit", "progress", "sample", "roots", "ping", "wait", "tell", "whoami")


async def _note_roots(ctx: ServerRequestContext[Any, Any], _params: types.NotificationParams) -> None:
    assert ctx.session.client_params is not None
    note("roots", ctx.session.client_params.client_info.name)


async def _ask(ctx: ServerRequestContext[Any, Any], params: Ask) -> None:
    await Call(ctx.session, None, params.token, ctx.session.report_progress).run("roots")


def _lowlevel() -> Server[Any]:
    async def list_tools(
        _ctx: ServerRequestContext[Any, Any], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[types.Tool(name=name, input_schema={"type": "object"}) for name in TOOLS])

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        assert ctx.request_id is not None
        call = Call(ctx.session, ctx.request_id, (params.arguments or {})["token"], ctx.session.report_progress)
        text = types.TextContent(type="text", text=await call.run(params.name))
        return types.CallToolResult(content=[text])

    return Server("questions", on_list_tools=list_tools, on_call_tool=call_tool)


def _tool(name: str, context: type[Any]) -> Callable[..., Awaitable[str]]:
    """Return a tool of `MCPServer` or FastMCP."""

    async def tool(ctx: Any, token: str) -> str:
        return await Call(ctx.session, ctx.request_id, token, ctx.report_progress).run(name)

    tool.__name__ = name
    tool.__annotations__ = {"ctx": context, "token": str, "return": str}
    return tool


def _mcpserver() -> MCPServer:
    server = MCPServer("questions", log_level="WARNING")
    for name in TOOLS:
        server.tool(structured_output=False)(_tool(name, Context))
    return server


def _fastmcp() -> FastMCP[Any]:
    # Imported here: the servers of the other frameworks do without it, as it is an optional dependency.
    import fastmcp

    server: FastMCP[Any] = fastmcp.FastMCP("questions")
    for name in TOOLS:
        # As the others have it: the client checks results by the schema that it was given, whichever process gave it.
        server.tool(_tool(name, fastmcp.Context), output_schema=None)
    return server


def _app(server: MCPServer | Server[Any] | FastMCP[Any]) -> ASGIApp:
    settings = _settings()
    lowlevel_server = underlying_server(server)
    lowlevel_server.add_notification_handler("notifications/roots/list_changed", types.NotificationParams, _note_roots)
    lowlevel_server.add_notification_handler(ASK, Ask, _ask)
    if settings.url is not None:
        return _named(durable_app(server, settings.url, **settings.options))
    # FastMCP's app is not asked for without a store.
    assert isinstance(server, MCPServer | Server)
    return _named(server.streamable_http_app(**settings.options))


def _named(app: ASGIApp) -> ASGIApp:
    """Add the process to the headers of each answer."""
    header = (PID_HEADER.encode(), str(os.getpid()).encode())

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await app(scope, receive, send_named if scope["type"] == "http" else send)

    return named


def lowlevel() -> ASGIApp:
    return _app(_lowlevel())


def mcpserver() -> ASGIApp:
    return _app(_mcpserver())


def fastmcp() -> ASGIApp:
    return _app(_fastmcp())


def serve_questions(
    serve: ServeFunction,
    notes: Path,
    url: str | None,
    framework: str = "lowlevel",
    *,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    **options: Any,
) -> ServerProcess:
    """Start a process of the server.

    Args:
        serve: The fixture `serve`.
        notes: File of the notes.
        url: Of the database; `None`: the SDK alone.
        framework: One of the factories here.
        environment: More variables.
        port: Its port; by default one that is free.
        **options: More arguments of `durable_app`.
    """
    settings = Settings(url=url, notes=str(notes), options=options)
    return serve(
        f"tests.support.questions:{framework}",
        environment={**settings.environment, **(environment or {})},
        port=port,
        options=["--factory", "--no-access-log"],
    )
