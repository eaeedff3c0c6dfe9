"""A program that ends as every tutorial does, but for the one line: `python -m tests.support.durable_program PORT`."""

from __future__ import annotations

import sys

import anyio
from mcp.server.mcpserver import MCPServer

from mcp_session_store import run_durable

server = MCPServer("program", log_level="WARNING")


@server.tool()
async def sleep(seconds: float) -> str:
    await anyio.sleep(seconds)
    return "slept"


if __name__ == "__main__":
    run_durable(server, port=int(sys.argv[1]), shutdown_timeout=8)
