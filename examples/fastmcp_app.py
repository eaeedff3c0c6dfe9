"""A FastMCP server with durable sessions, in the place of `mcp.run(transport="http")`.

    python examples/fastmcp_app.py                                         # one process
    uvicorn --app-dir examples --factory fastmcp_app:make_app --workers 4

Nothing else changes: what `ctx.set_state` stores is part of the session.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastmcp import Context, FastMCP

from mcp_session_store import durable_app, run_durable

if TYPE_CHECKING:
    from starlette.applications import Starlette

URL = os.environ.get("MCP_SESSION_STORE_URL", "sqlite:///sessions.db")

mcp: FastMCP[Any] = FastMCP("notes")


@mcp.tool
async def remember(note: str, ctx: Context) -> list[str]:
    notes: list[str] = [*(await ctx.get_state("notes") or []), note]
    await ctx.set_state("notes", notes)
    return notes


def make_app() -> Starlette:
    """Build the app of one worker, in the place of `mcp.http_app()`."""
    return durable_app(mcp, URL)


if __name__ == "__main__":
    # Was: mcp.run(transport="http", host="127.0.0.1", port=8000)
    run_durable(mcp, URL, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
