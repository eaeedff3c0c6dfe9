"""Servers for the tests of the test support itself: the stock SDK, no store."""

from __future__ import annotations

import os

import anyio
from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("support")


@server.tool()
def pid() -> int:
    """The process that answers."""
    return os.getpid()


@server.tool()
def environment(name: str) -> str:
    """The value of a variable of the process that answers."""
    return os.environ.get(name, "not set")


@server.tool()
async def count(ctx: Context, to: int) -> int:
    """Report progress at each step."""
    for step in range(to):
        await ctx.report_progress(step)
        await anyio.sleep(0)
    return to


sse_app = server.streamable_http_app()
json_app = server.streamable_http_app(json_response=True)
