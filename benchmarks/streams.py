"""Measure how soon a client's stream has what other instances say, and how fast streams open.

See `benchmarks.relay`.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer

from benchmarks.contenders import CLIENTS, EVENTS, JSON
from benchmarks.endpoint import garbage_kept
from mcp_session_store import durable_app
from tests.support.http import RawClient

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from benchmarks.contenders import Contender
    from tests.support.servers import ServeFunction, ServerProcess

AT_ONCE: Final = 2000
"""Streams that are opened at once after a restart."""


def app() -> Starlette:
    """Make the app of a process, from its environment: a call of its tool speaks on the client's stream."""
    server = MCPServer("talking", log_level="WARNING")

    @server.tool(structured_output=False)
    async def tell(ctx: Context[Any, Any], count: int, pause: float) -> str:
        for _ in range(count):
            await asyncio.sleep(random.uniform(0.01, pause))
            params = types.LoggingMessageNotificationParams(level="info", data=time.time())
            await ctx.session.send_notification(types.LoggingMessageNotification(params=params))
        return "told"

    return durable_app(server)


def serve_talking(serve: ServeFunction, url: str, *, events: bool) -> ServerProcess:
    """Start a process of the server on a database."""
    environment = {"MCP_SESSION_STORE_URL": url, "MCP_SESSION_STORE_EVENTS": str(events).lower()}
    return serve("benchmarks.streams:app", environment=environment, port=None, options=["--factory", "--no-access-log"])


async def measure_notifications(
    speaking: ServerProcess, holding: ServerProcess, count: int, *, pause: float
) -> list[float]:
    """Return the seconds from what one process says until a client reads it on its stream, which another one has."""
    took: list[float] = []
    async with RawClient(speaking.mcp_url) as client:
        await client.handshake()
        client.url = holding.mcp_url
        async with client.get_stream() as stream:
            await asyncio.sleep(1)  # until the claim of the stream is reported
            client.url = speaking.mcp_url
            call = asyncio.create_task(client.call_tool("tell", {"count": count, "pause": pause}))
            async for message in stream:
                if message.get("method") == "notifications/message":
                    took.append(time.time() - message["params"]["data"])
                if len(took) == count:
                    break
            await call
    return took


async def measure_opening(contender: Contender, count: int, *, events: bool = False) -> float:
    """Return the seconds until so many streams are open that are opened at once, of sessions that a restart left."""
    mode = EVENTS if events else JSON
    async with contender.serving(mode) as endpoint:
        sessions = [await endpoint.open_session() for _ in range(count + CLIENTS)]
    async with contender.serving(mode) as endpoint, AsyncExitStack() as streams:
        for session_id in sessions[count:]:
            await streams.enter_async_context(endpoint.stream(session_id))
        opened = [endpoint.stream(session_id) for session_id in sessions[:count]]
        with garbage_kept():
            began = time.perf_counter()
            await asyncio.gather(*(stream.__aenter__() for stream in opened))
            took = time.perf_counter() - began
        await asyncio.gather(*(stream.__aexit__(None, None, None) for stream in opened))
    return took
