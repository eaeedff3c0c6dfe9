"""A FastMCP server for the command line."""

from __future__ import annotations

from fastmcp import Context, FastMCP

from tests.support.targets import whoami_text

# Unnamed, as many are: such a server has another random name in each process.
server = FastMCP[None]()


@server.tool
def whoami(ctx: Context) -> str:
    return whoami_text(ctx)
