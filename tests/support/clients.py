"""The official MCP client, with a record of its methods and session ids."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import Implementation, TextContent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass
class Watched:
    """An MCP client, and its traffic."""

    client: Client
    methods: list[str] = field(default_factory=list)
    """The JSON-RPC methods that it has sent, in order."""
    session_ids: list[str] = field(default_factory=list)
    """The session ids sent and received, each once, in the order in which they came up."""

    async def text(self, tool: str, **arguments: object) -> str:
        """Call a tool and return the text of its result."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result
        (content,) = result.content
        assert isinstance(content, TextContent)
        return content.text

    def note(self, headers: httpx2.Headers) -> None:
        """Remember the session id that a request or an answer carries."""
        session_id = headers.get("mcp-session-id")
        if session_id is not None and session_id not in self.session_ids:
            self.session_ids.append(session_id)


@asynccontextmanager
async def official_client(url: str) -> AsyncIterator[Watched]:
    """The SDK's client in its handshake mode, connected.

    Args:
        url: The MCP endpoint.
    """

    async def on_request(request: httpx2.Request) -> None:
        if request.method == "POST":
            watched.methods.append(json.loads(request.content).get("method", "(response)"))
        watched.note(request.headers)

    async def on_response(response: httpx2.Response) -> None:
        watched.note(response.headers)

    http = httpx2.AsyncClient(
        timeout=60, trust_env=False, event_hooks={"request": [on_request], "response": [on_response]}
    )
    transport = streamable_http_client(url, http_client=http)
    client = Client(transport, mode="legacy", client_info=Implementation(name="official", version="1"))
    watched = Watched(client)
    async with http, client:
        yield watched
