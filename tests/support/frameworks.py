"""A server of each framework, with the same tool, route and auth."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.streamable_http import EventStore
from pydantic import AnyHttpUrl
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mcp_session_store import durable_app
from tests.support.instances import Notes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp
    from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

    # What FastMCP imports within its first call, which on a busy machine takes longer than a test waits for an answer.
    for name in ("key_value.aio.adapters.pydantic", "key_value.aio.stores.memory"):
        importlib.import_module(name)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.lowlevel.server import Server
    from starlette.applications import Starlette
    from starlette.requests import Request


class Tokens(TokenVerifier):
    async def verify_token(self, token: str) -> AccessToken | None:
        if token not in ("alice", "bob"):
            return None
        return AccessToken(token=token, client_id="app", subject=token, scopes=["notes"])


AUTH = AuthSettings(
    issuer_url=AnyHttpUrl("https://issuer.example"),
    resource_server_url=AnyHttpUrl("https://server.example/mcp"),
    required_scopes=["notes"],
    validate_token_resource=False,
)


async def health(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("well")


class Made:
    """A server of some framework, with a tool `add`, a custom route, and maybe auth."""

    def __init__(self, kind: str, *, auth: bool = False) -> None:
        self.kind = kind
        self.entered = 0
        self.options: dict[str, Any] = {}
        if kind == "MCPServer":
            self.server: Any = MCPServer(
                "notes",
                lifespan=self.lifespan,
                auth=AUTH if auth else None,
                token_verifier=Tokens() if auth else None,
            )
            self.server.custom_route("/health", methods=["GET"])(health)
            self.server.tool()(add)
        elif kind == "Server":
            self.server = Notes().server
            self.options["custom_starlette_routes"] = [Route("/health", health)]
            if auth:
                self.options |= {"auth": AUTH, "token_verifier": Tokens()}
        else:
            tokens = {name: {"client_id": "app", "sub": name, "scopes": ["notes"]} for name in ("alice", "bob")}
            provider = StaticTokenVerifier(tokens=tokens, required_scopes=["notes"]) if auth else None
            self.server = fastmcp.FastMCP("notes", auth=provider, lifespan=self.lifespan)
            self.server.custom_route("/health", methods=["GET"])(health)
            self.server.tool(add)

    @contextlib.asynccontextmanager
    async def lifespan(self, _server: Any) -> AsyncIterator[dict[str, Any]]:
        self.entered += 1
        yield {}

    def app(self, store: Any, **options: Any) -> Starlette:
        return durable_app(self.server, store, **self.options, **options)

    @property
    def lowlevel(self) -> Server[Any]:
        lowlevel: Server[Any] = {
            "MCPServer": lambda: self.server._lowlevel_server,
            "Server": lambda: self.server,
            "FastMCP": lambda: self.server._mcp_server,
        }[self.kind]()
        return lowlevel


def add(a: int, b: int) -> int:
    return a + b


class Events(EventStore):
    """An event store of the SDK that notes the streams of the events."""

    def __init__(self) -> None:
        self.streams: list[str] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        self.streams.append(stream_id)
        return f"event-{len(self.streams)}"

    async def replay_events_after(self, last_event_id: str, send_callback: Any) -> str | None:
        return None
