"""The application of the process tests, on each framework: it names its process, and notes each handshake.

uvicorn calls the factories by name (`--factory`), in each process of a server.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import mcp_types as types
from mcp.server.lowlevel.server import Server
from mcp.server.mcpserver import Context, MCPServer
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount

from mcp_session_store import durable_app, get_restore_marker
from mcp_session_store.adapter.sdk import session_id_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from fastmcp import FastMCP
    from fastmcp.server.middleware import CallNext as FastMCPCallNext
    from fastmcp.server.middleware import MiddlewareContext
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp.server.session import ServerSession
    from starlette.requests import Request

    from mcp_session_store import EndReason, SessionRecord

_SETTINGS = "PROCESS_TEST_SETTINGS"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the application, which a test passes through the environment."""

    url: str
    """Of the database."""
    handshakes: str
    """The file to which a line of JSON is appended for each `initialize` and `notifications/initialized`."""
    gate: str
    """While this file exists, a replayed `initialize` waits in the application's middleware."""
    calls_gate: str
    """While this file exists, calls of the tool `wait` go on."""
    said: str
    """A folder: a call of the tool `talk` for which it has a file says no more things than the file has bytes."""
    auto_upgrade: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of `durable_app`."""
    clock_ahead: float = 0.0
    """Seconds by which the clock of this process is wrong."""

    @property
    def environment(self) -> dict[str, str]:
        return {_SETTINGS: json.dumps(asdict(self))}


def _settings() -> Settings:
    return Settings(**json.loads(os.environ[_SETTINGS]))


async def _note_handshake(method: str, ctx: object) -> None:
    settings = _settings()
    marker = get_restore_marker(ctx)
    replayed = marker is not None and marker.replaying
    note = {"method": method, "pid": os.getpid(), "replayed_in": marker.session_id if marker and replayed else None}
    # One write to a file opened for appending: lines of several processes do not mix.
    with Path(settings.handshakes).open("ab", buffering=0) as file:
        file.write(json.dumps(note).encode() + b"\n")
    if method == "initialize" and replayed:
        while Path(settings.gate).exists():
            await anyio.sleep(0.01)


def _who(ctx: object, client: types.InitializeRequestParams | None) -> dict[str, Any]:
    """Return the process, the client's name, and the fields of the restore marker."""
    marker = get_restore_marker(ctx)
    return {
        "pid": os.getpid(),
        "client": None if client is None else client.client_info.name,
        "restores": 0 if marker is None else marker.restores,
        "previous_instance": None if marker is None else marker.previous_instance,
    }


async def _server_middleware(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    if ctx.method in ("initialize", "notifications/initialized"):
        await _note_handshake(ctx.method, ctx)
    return await call_next(ctx)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """The arguments of the tool `talk`, which says things on the stream of its call: progress, and then its result."""

    call: str
    """Name of the call."""
    count: int
    """Number of progress reports: 0, 1, 2 …"""
    pause: float = 0.0
    """Seconds between two things that it says."""
    leaves_before: tuple[int, ...] = ()
    """Things that it says only after it has closed its stream, so that the client comes back."""
    padding: int = 0
    """Dots at the end of each thing that it says."""
    answer_padding: int = 0
    """Dots at the end of its result."""


async def _talk(
    talk: Talk,
    ctx: object,
    report: Callable[[float, float, str], Awaitable[None]],
    leave: Callable[[], Awaitable[None]],
) -> str:
    """Talk, and return the process that did."""
    await _note_handshake(f"talk {talk.call}", ctx)
    for number in range(talk.count):
        await _may_say(talk.call, number)
        if number in talk.leaves_before:
            await leave()
        await report(number, talk.count, f"{talk.call} {number}{'.' * talk.padding}")
        await anyio.sleep(talk.pause)
    await _may_say(talk.call, talk.count)
    await _note_handshake(f"talked {talk.call}", ctx)
    return f"{os.getpid()}{'.' * talk.answer_padding}"


async def _may_say(call: str, number: int) -> None:
    """Wait until it may say this thing."""
    allowed = Path(_settings().said) / call
    with contextlib.suppress(FileNotFoundError):
        while allowed.stat().st_size <= number:
            await anyio.sleep(0.005)


async def _announce(session: ServerSession, text: str, count: int) -> str:
    """Say things that belong to no call, and return the process that did."""
    for number in range(count):
        await session.send_resource_updated(f"said://{text}/{number}")
    return str(os.getpid())


def _mcpserver() -> MCPServer:
    server = MCPServer("process", log_level="WARNING", middleware=[_server_middleware])

    @server.tool()
    def whoami(ctx: Context) -> dict[str, Any]:
        return _who(ctx, ctx.session.client_params)

    @server.tool(structured_output=False)
    async def talk(
        ctx: Context,
        call: str,
        count: int,
        pause: float = 0.0,
        leaves_before: tuple[int, ...] = (),
        padding: int = 0,
        answer_padding: int = 0,
    ) -> str:
        arguments = Talk(
            call=call,
            count=count,
            pause=pause,
            leaves_before=leaves_before,
            padding=padding,
            answer_padding=answer_padding,
        )
        return await _talk(arguments, ctx, ctx.report_progress, ctx.close_sse_stream)

    @server.tool(structured_output=False)
    async def announce(ctx: Context, text: str, count: int) -> str:
        return await _announce(ctx.session, text, count)

    @server.custom_route("/bookkeeping", ["GET"])  # type: ignore[untyped-decorator]  # the SDK left it so
    async def bookkeeping(_request: Request) -> JSONResponse:
        """How much each table of the session manager holds."""
        manager = vars(server.session_manager)
        return JSONResponse({n: len(v) for n, v in manager.items() if isinstance(v, (dict, set, list))})

    return server


async def _stay() -> None:
    """Leave a stream open that the SDK has no way to close."""


def _lowlevel() -> Server[Any]:
    async def list_tools(
        _ctx: ServerRequestContext[Any, Any], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        names = ("whoami", "talk", "announce")
        return types.ListToolsResult(tools=[types.Tool(name=name, input_schema={"type": "object"}) for name in names])

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        arguments = params.arguments or {}
        if params.name == "talk":
            text = await _talk(Talk(**arguments), ctx, ctx.session.report_progress, ctx.close_sse_stream or _stay)
        elif params.name == "announce":
            text = await _announce(ctx.session, **arguments)
        else:
            text = json.dumps(_who(ctx, ctx.session.client_params))
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)])

    server: Server[Any] = Server("process", on_list_tools=list_tools, on_call_tool=call_tool)
    server.middleware.append(_server_middleware)
    return server


def _fastmcp() -> FastMCP[Any]:
    # Imported here: the servers of the other frameworks do without it, as it is an optional dependency.
    import fastmcp
    from fastmcp.server.middleware import Middleware

    class NoteHandshakes(Middleware):
        async def on_message(self, context: MiddlewareContext[Any], call_next: FastMCPCallNext[Any, Any]) -> Any:
            if context.method in ("initialize", "notifications/initialized"):
                await _note_handshake(context.method, context)
            return await call_next(context)

    server: FastMCP[Any] = fastmcp.FastMCP("process", middleware=[NoteHandshakes()])

    async def whoami(ctx: fastmcp.Context) -> dict[str, Any]:
        return _who(ctx, ctx.session.client_params)

    async def talk(
        ctx: fastmcp.Context, call: str, count: int, pause: float = 0.0, leaves_before: tuple[int, ...] = ()
    ) -> str:
        arguments = Talk(call=call, count=count, pause=pause, leaves_before=leaves_before)
        return await _talk(arguments, ctx, ctx.report_progress, ctx.close_sse_stream)

    async def announce(ctx: fastmcp.Context, text: str, count: int) -> str:
        return await _announce(ctx.session, text, count)

    for tool in (whoami, talk, announce):
        # Postponed annotations are looked up among this module's names, where it is not.
        tool.__annotations__["ctx"] = fastmcp.Context
        server.tool(tool)
    return server


def durable(server: MCPServer | Server[Any] | FastMCP[Any], **options: Any) -> Starlette:
    settings = _settings()
    if settings.clock_ahead:
        _put_clock_forward(settings.clock_ahead)
    return durable_app(
        server, settings.url, auto_upgrade=settings.auto_upgrade, on_end=_note_end, **settings.options, **options
    )


async def _note_end(record: SessionRecord, reason: EndReason) -> None:
    await _note_handshake(f"end: {reason}", None)


def _put_clock_forward(seconds: float) -> None:
    """Have everything in this process that asks for the time of day get a wrong one."""
    right_time = time.time

    class WrongDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls.fromtimestamp(right_time() + seconds, tz)

    time.time = lambda: right_time() + seconds
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is datetime.datetime:
            setattr(module, "datetime", WrongDatetime)  # noqa: B010 - a module has no such attribute to a type checker


def _both(build: Callable[[], MCPServer | Server[Any] | FastMCP[Any]]) -> Starlette:
    """Two servers in one app: under /sse, with SSE responses, and under /json, with JSON responses."""
    sse, plain = durable(build(), json_response=False), durable(build(), json_response=True)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with sse.router.lifespan_context(sse), plain.router.lifespan_context(plain):
            yield

    return Starlette(routes=[Mount("/sse", sse), Mount("/json", plain)], lifespan=lifespan)


def mcpserver() -> Starlette:
    return durable(_mcpserver())


def lowlevel() -> Starlette:
    return durable(_lowlevel())


def fastmcp() -> Starlette:
    return durable(_fastmcp())


def stateful() -> Starlette:
    """One with a tool that waits until its gate opens, and with state that clients set for their session.

    Each setting of it is noted as a handshake's message, with its params. The tool `say` says on the session's stream
    what the state in its copy lets through: a log message of each level, and an update of each resource.
    """
    tools = ("whoami", "wait", "say")
    levels: dict[str | None, str] = {}
    subscriptions: set[tuple[str | None, str]] = set()

    async def list_tools(
        _ctx: ServerRequestContext[Any, Any], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[types.Tool(name=tool, input_schema={"type": "object"}) for tool in tools])

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        if params.name == "wait":
            await _note_handshake("waiting", ctx)
            while Path(_settings().calls_gate).exists():
                await anyio.sleep(0.01)
        text = json.dumps(_who(ctx, ctx.session.client_params))
        if params.name == "say":
            text = await say(ctx)
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)])

    async def say(ctx: ServerRequestContext[Any, Any]) -> str:
        session_id = session_id_of(ctx)
        said: list[str] = []
        for level in ("info", "error"):
            if level == "error" or levels.get(session_id) != "error":
                params = types.LoggingMessageNotificationParams(level=level, data=level)
                await ctx.session.send_notification(types.LoggingMessageNotification(params=params))
                said.append(level)
        for uri in ("note://a", "note://b"):
            if (session_id, uri) in subscriptions:
                await ctx.session.send_resource_updated(uri)
                said.append(uri)
        return json.dumps(said)

    async def set_level(ctx: ServerRequestContext[Any, Any], params: types.SetLevelRequestParams) -> types.EmptyResult:
        await _note_handshake(f"level {params.level}", ctx)
        levels[session_id_of(ctx)] = params.level
        return types.EmptyResult()

    async def subscribe(ctx: ServerRequestContext[Any, Any], params: types.SubscribeRequestParams) -> types.EmptyResult:
        await _note_handshake(f"subscribe {params.uri}", ctx)
        subscriptions.add((session_id_of(ctx), str(params.uri)))
        return types.EmptyResult()

    async def unsubscribe(
        ctx: ServerRequestContext[Any, Any], params: types.UnsubscribeRequestParams
    ) -> types.EmptyResult:
        await _note_handshake(f"unsubscribe {params.uri}", ctx)
        subscriptions.discard((session_id_of(ctx), str(params.uri)))
        return types.EmptyResult()

    server: Server[Any] = Server(
        "process",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_set_logging_level=set_level,
        on_subscribe_resource=subscribe,
        on_unsubscribe_resource=unsubscribe,
    )
    server.middleware.append(_server_middleware)
    return durable(server)


def asking() -> Starlette:
    """One that asks each client for its roots when it is initialized, and notes the answer as a handshake's."""

    async def ask(ctx: ServerRequestContext[Any, Any], _params: types.NotificationParams) -> None:
        roots = await ctx.session.list_roots()
        await _note_handshake(f"roots: {roots.roots[0].name}", ctx)

    server = _lowlevel()
    server.add_notification_handler("notifications/initialized", types.NotificationParams, ask)
    return durable(server)


def questioning() -> Starlette:
    """One whose tools ask the client's user something, on the stream of the call."""

    async def list_tools(
        _ctx: ServerRequestContext[Any, Any], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[types.Tool(name="ask", input_schema={"type": "object"})])

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], _params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        await ctx.session.elicit_form("?", {"type": "object", "properties": {}}, related_request_id=ctx.request_id)
        return types.CallToolResult(content=[])

    return durable(Server("process", on_list_tools=list_tools, on_call_tool=call_tool))


def mcpserver_both() -> Starlette:
    return _both(_mcpserver)


def lowlevel_both() -> Starlette:
    return _both(_lowlevel)


def fastmcp_both() -> Starlette:
    return _both(_fastmcp)
