"""A FastAPI app with an MCP server under a prefix, and a lifespan of its own.

    uvicorn --app-dir examples fastapi_app:api --workers 4  # clients connect to /notes/mcp

The lifespan of the app around it starts the MCP app, which is mounted after the routes that share its prefix.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from mcp_session_store import durable_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add_note(text: str) -> int:
    notes.append(text)
    return len(notes)


# The SDK answers 421 to every Host but this machine's, unless it is told under which names it is reached.
hosts = TransportSecuritySettings(allowed_hosts=["mcp.example.com", "127.0.0.1:*", "localhost:*"])
mcp_app = durable_app(
    server, os.environ.get("MCP_SESSION_STORE_URL", "sqlite:///sessions.db"), transport_security=hosts
)


@asynccontextmanager
async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
    notes.append("what the application itself sets up")
    # An app that is mounted is not started by the one around it.
    async with mcp_app.router.lifespan_context(mcp_app):
        yield
    notes.clear()


api = FastAPI(lifespan=lifespan)


@api.get("/notes/all")
def all_notes() -> list[str]:
    return notes


# After the routes below the same prefix. Dependencies of FastAPI do not reach what is mounted; middleware does.
api.mount("/notes", mcp_app)
