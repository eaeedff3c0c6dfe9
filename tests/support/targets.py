"""Targets of the command `serve`: servers as people have them, and objects that are not servers."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

from mcp.server.lowlevel.server import Server
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
)

from mcp_session_store import get_restore_marker

if TYPE_CHECKING:
    from mcp.server.context import ServerRequestContext


def whoami_text(ctx: object) -> str:
    """The process, and how often it says that the session was restored."""
    marker = get_restore_marker(ctx)
    return f"{os.getpid()} {0 if marker is None else marker.restores}"


mcpserver = MCPServer("targets")


@mcpserver.tool()
def whoami(ctx: Context) -> str:
    return whoami_text(ctx)


@mcpserver.tool()
def frozen_objects() -> str:
    """The number of objects that garbage collections leave out."""
    return str(gc.get_freeze_count())


async def _call_tool(ctx: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
    assert params.name == "whoami"
    return CallToolResult(content=[TextContent(text=whoami_text(ctx))])


async def _list_tools(ctx: ServerRequestContext[Any], params: PaginatedRequestParams | None) -> ListToolsResult:
    return ListToolsResult(tools=[Tool(name="whoami", input_schema={"type": "object"})])


lowlevel: Server[Any] = Server("targets", on_list_tools=_list_tools, on_call_tool=_call_tool)


class Holder:
    """A server object need not stand at the top of its module."""

    server = mcpserver


stateless_app = mcpserver.streamable_http_app(stateless_http=True)
text = "not a server"
