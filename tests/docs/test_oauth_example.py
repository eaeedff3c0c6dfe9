"""The example of an OAuth proxy: a client that has logged in on one worker is logged in on another."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route

from examples.oauth_on_every_worker import make_app
from tests.support.databases import execute, migrated
from tests.support.instances import running
from tests.support.serving import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

BASE_URL = "https://mcp.test"
CALLBACK = "http://localhost:1234/callback"
VERIFIER = "v" * 64


async def authorize(request: Request) -> RedirectResponse:
    query = request.query_params
    return RedirectResponse(f"{query['redirect_uri']}?{urlencode({'code': 'upstream', 'state': query['state']})}")


async def token(request: Request) -> JSONResponse:
    return JSONResponse({"access_token": "secret-of-the-user", "token_type": "Bearer", "expires_in": 3600})


async def introspect(request: Request) -> JSONResponse:
    return JSONResponse({"active": True, "client_id": "user-1", "sub": "user-1", "scope": ""})


@contextlib.asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """An OAuth provider that lets everyone in."""
    app = Starlette(
        routes=[
            Route("/authorize", authorize),
            Route("/token", token, methods=["POST"]),
            Route("/introspect", introspect, methods=["POST"]),
        ]
    )
    async with served(app) as url:
        yield url


def browser(app: Starlette) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=BASE_URL)


async def test_a_login_on_one_worker_is_known_on_another(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrated(sqlite_url)
    async with provider() as provider_url:
        for name, value in {
            "MCP_SESSION_STORE_URL": sqlite_url,
            "PROVIDER": provider_url,
            "CLIENT_ID": "id",
            "CLIENT_SECRET": "a secret that is long enough",
            "BASE_URL": BASE_URL,
        }.items():
            monkeypatch.setenv(name, value)

        def worker() -> Starlette:
            return make_app(require_authorization_consent="external")

        async with running(one := worker()), running(two := worker()), browser(one) as on_one, browser(two) as on_two:
            registered = await on_one.post("/register", json={"redirect_uris": [CALLBACK], "client_name": "c"})
            client = registered.json()
            challenge = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).decode().rstrip("=")
            asked = {
                "response_type": "code",
                "client_id": client["client_id"],
                "redirect_uri": CALLBACK,
                "state": "s",
                "code_challenge": challenge,
                "code_challenge_method": "S256",
            }
            # Each step on another worker than the one before.
            to_provider = await on_two.get("/authorize", params=asked)
            async with httpx2.AsyncClient() as real:
                back = await real.get(to_provider.headers["location"])
            callback = urlsplit(back.headers["location"])
            for name, value in on_two.cookies.items():
                on_one.cookies.set(name, value)
            to_client = await on_one.get(f"{callback.path}?{callback.query}")
            [code] = parse_qs(urlsplit(to_client.headers["location"]).query)["code"]
            tokens = await on_two.post(
                "/token",
                data={
                    "grant_type": "authorization_code",
                    "code": code,
                    "redirect_uri": CALLBACK,
                    "client_id": client["client_id"],
                    "client_secret": client.get("client_secret", ""),
                    "code_verifier": VERIFIER,
                },
            )
            access = tokens.json()["access_token"]
            assert await session_opened(on_one, access) == 200
            assert await session_opened(on_two, "another") == 401
    rows = await execute(sqlite_url, "SELECT * FROM mcp_session_value")
    assert len(rows) > 2
    assert "secret-of-the-user" not in str(rows)


async def session_opened(client: httpx2.AsyncClient, access: str) -> int:
    initialize: dict[str, Any] = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}},
    }
    headers = {"authorization": f"Bearer {access}", "accept": "application/json, text/event-stream"}
    return (await client.post("/mcp", json=initialize, headers=headers)).status_code
