"""Two servers in one Starlette app: an engine for both, a namespace and a prefix for each.

    uvicorn --app-dir examples --factory two_servers:make_app --workers 4  # /notes/mcp and /tasks/mcp

The engine stays the application's, which disposes of it after both servers have stopped.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastmcp import FastMCP
from mcp.server.mcpserver import MCPServer
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.routing import Mount

from mcp_session_store import durable_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

notes = MCPServer("notes")
tasks: FastMCP[Any] = FastMCP("tasks")


@notes.tool()
def name_of_notes() -> str:
    return notes.name


@tasks.tool
def name_of_tasks() -> str:
    return tasks.name


def make_app() -> Starlette:
    """Build the app of one worker."""
    engine = create_async_engine(os.environ["MCP_SESSION_STORE_URL"])  # postgresql+asyncpg://… or sqlite+aiosqlite://…
    # Without a namespace each would find the sessions of the other.
    apps = {
        "/notes": durable_app(notes, engine, namespace="notes"),
        "/tasks": durable_app(tasks, engine, namespace="tasks"),
    }

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as started:
            started.push_async_callback(engine.dispose)
            for app in apps.values():
                await started.enter_async_context(app.router.lifespan_context(app))
            yield

    return Starlette(routes=[Mount(prefix, app) for prefix, app in apps.items()], lifespan=lifespan)
