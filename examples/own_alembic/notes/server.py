"""The server: one engine for the notes and for the sessions."""

from __future__ import annotations

import os

from mcp.server.mcpserver import MCPServer
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from mcp_session_store import durable_app
from notes.models import Note

engine = create_async_engine(os.environ["DATABASE_URL"])
database = async_sessionmaker(engine)
server = MCPServer("notes")


@server.tool()
async def add_note(text: str) -> int:
    """Keep a note, and return its number."""
    async with database.begin() as session:
        note = Note(text=text)
        session.add(note)
        await session.flush()
        return note.id


app = durable_app(server, engine)
