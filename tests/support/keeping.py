"""The application of the process tests of session state, on each framework; uvicorn calls the factories by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mcp.server.mcpserver import Context, MCPServer

from mcp_session_store import get_session_state
from tests.support.application import durable

if TYPE_CHECKING:
    from fastmcp import FastMCP
    from starlette.applications import Starlette

SECRETS = tuple(f"secret_{number}" for number in range(6))
"""Tools of FastMCP's that sessions hide."""


async def _add(ctx: object, mark: str) -> str:
    """Add a mark to the list of the session."""
    marks = await get_session_state(ctx).update("marks", lambda marks: [*marks, mark], default=[])
    return json.dumps(marks)


def mcpserver() -> Starlette:
    server = MCPServer("keeping", log_level="WARNING")

    @server.tool(structured_output=False)
    async def add(mark: str, ctx: Context) -> str:
        return await _add(ctx, mark)

    @server.tool(structured_output=False)
    async def note(name: str, text: str, ctx: Context) -> str:
        state = get_session_state(ctx)
        await state.set(name, text)
        return json.dumps(await state.get(name))

    @server.tool(structured_output=False)
    async def read(names: list[str], ctx: Context) -> str:
        items = await get_session_state(ctx).items()
        return json.dumps({name: items.get(name) for name in ("marks", *names)})

    return durable(server)


def fastmcp() -> Starlette:
    # Imported here: the servers of the other framework do without it, as it is an optional dependency.
    import fastmcp

    server: FastMCP[Any] = fastmcp.FastMCP("keeping")

    async def add(mark: str, ctx: fastmcp.Context) -> str:
        return await _add(ctx, mark)

    async def note(name: str, text: str, ctx: fastmcp.Context) -> str:
        await ctx.set_state(name, text)
        return json.dumps(await ctx.get_state(name))

    async def read(names: list[str], ctx: fastmcp.Context) -> str:
        notes = {name: await ctx.get_state(name) for name in names}
        return json.dumps({"marks": await get_session_state(ctx).get("marks"), **notes})

    async def hide(name: str, ctx: fastmcp.Context) -> str:
        await ctx.disable_components(names={name})
        return "hidden"

    async def secret() -> str:
        return "secret"

    for tool in (add, note, read, hide):
        # Postponed annotations are looked up among this module's names, where it is not.
        tool.__annotations__["ctx"] = fastmcp.Context
        server.tool(tool)
    for name in SECRETS:
        server.tool(secret, name=name)
    return durable(server)
