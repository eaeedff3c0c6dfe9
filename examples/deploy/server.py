"""The server of the files in this folder; put yours in its place."""

from __future__ import annotations

from mcp.server.mcpserver import Context, MCPServer

from mcp_session_store import get_restore_marker

server = MCPServer("notes")


@server.tool()
def restores(ctx: Context) -> int:
    """Return how often the session has moved to another process."""
    marker = get_restore_marker(ctx)
    return 0 if marker is None else marker.restores
