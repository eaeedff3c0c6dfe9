"""Measure the cost of durable sessions beside the stock SDK, in one run, at the ASGI boundary.

    python -m benchmarks.sessions                          # SQLite in a temporary file
    python -m benchmarks.sessions postgresql://user@host/db  # and Postgres, on a database that may be migrated

Three operations are timed, with SSE and with JSON responses, by 16 concurrent clients:

* `tools/call`: calls of a small tool on sessions that are in memory;
* handshake: `initialize` and `notifications/initialized`;
* after a restart: the first call of every session to a process that holds none in memory. A client of
  this package just calls, and the session is restored. A client of the stock SDK initializes anew and calls;
  the 404 that makes it do so is not counted against it.

Each round times the stock SDK and each store, in random order, on new apps. The ratio is taken round by round,
so that a machine that is slower for a while is slower for all. The median, lowest and highest ratio are printed.
Garbage is collected between the timings, for all alike. There is no HTTP server and no client library in between:
with them the differences are smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette

from mcp_session_store import durable_app
from mcp_session_store.sql.schema import migrate

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

CLIENTS = 16
PROTOCOL_VERSION = "2025-11-25"

MakeApp: TypeAlias = Callable[[bool], Starlette]
"""Builds an app, with JSON responses or not."""


@dataclass(frozen=True)
class Contender:
    """A configuration to compare with the others."""

    name: str
    make_app: MakeApp
    durable: bool


def make_server() -> MCPServer[Any]:
    server = MCPServer("benchmark")

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    return server


def headers_of(session_id: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that each request of a session carries."""
    return [(b"mcp-session-id", session_id), (b"mcp-protocol-version", PROTOCOL_VERSION.encode())]


def scope_of(method: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }


async def post(app: ASGIApp, message: dict[str, Any], session_id: bytes | None = None) -> dict[bytes, bytes]:
    """POST one message, and return the headers of the answer once its body is complete."""
    headers = [
        (b"host", b"127.0.0.1:8000"),
        (b"accept", b"application/json, text/event-stream"),
        (b"content-type", b"application/json"),
    ]
    if session_id is not None:
        headers += headers_of(session_id)
    body: list[Message] = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]
    answer: dict[bytes, bytes] = {}
    status = 0

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    async def send(message: Message) -> None:
        nonlocal answer, status
        if message["type"] == "http.response.start":
            status, answer = message["status"], dict(message["headers"])

    await app(scope_of("POST", headers), receive, send)
    if status not in (200, 202):
        raise RuntimeError(f"{message['method']} was answered {status}")
    return answer


async def open_session(app: ASGIApp) -> bytes:
    params = {
        "protocolVersion": PROTOCOL_VERSION,
        "capabilities": {"roots": {"listChanged": True}, "sampling": {}},
        "clientInfo": {"name": "benchmark", "version": "1.0"},
    }
    answer = await post(app, {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
    session_id = answer[b"mcp-session-id"]
    await post(app, {"jsonrpc": "2.0", "method": "notifications/initialized"}, session_id)
    return session_id


_request_ids = itertools.count(1)


async def call_tool(app: ASGIApp, session_id: bytes) -> None:
    params = {"name": "add", "arguments": {"a": 1, "b": 2}}
    message = {"jsonrpc": "2.0", "id": next(_request_ids), "method": "tools/call", "params": params}
    await post(app, message, session_id)


async def rate(count: int, operation: Callable[[int], Awaitable[object]]) -> float:
    """Return the operations per second of `CLIENTS` clients, each of which waits for an answer before the next."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await operation(number)

    # The number of full collections within so short a time is chance, and each takes a fifth of it.
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return count / (time.perf_counter() - began)
    finally:
        gc.enable()


@contextlib.asynccontextmanager
async def running(contender: Contender, json_response: bool) -> AsyncIterator[ASGIApp]:
    app = contender.make_app(json_response)
    async with app.router.lifespan_context(app):
        yield app


async def time_calls(contender: Contender, json_response: bool, count: int) -> float:
    async with running(contender, json_response) as app:
        sessions = [await open_session(app) for _ in range(CLIENTS)]
        await rate(count // 4, lambda number: call_tool(app, sessions[number % CLIENTS]))
        return await rate(count, lambda number: call_tool(app, sessions[number % CLIENTS]))


async def time_handshakes(contender: Contender, json_response: bool, count: int) -> float:
    async with running(contender, json_response) as app:
        await rate(CLIENTS * 4, lambda _: open_session(app))
        return await rate(count, lambda _: open_session(app))


async def time_after_restart(contender: Contender, json_response: bool, count: int) -> float:
    async def initialize_and_call(_: int) -> None:
        await call_tool(app, await open_session(app))

    if not contender.durable:
        async with running(contender, json_response) as app:
            return await rate(count, initialize_and_call)
    async with running(contender, json_response) as app:
        sessions = [await open_session(app) for _ in range(count)]
    async with running(contender, json_response) as app:
        return await rate(count, lambda number: call_tool(app, sessions[number]))


async def compare(contenders: list[Contender], rounds: int, scale: float) -> None:
    stock = contenders[0]
    timings = (
        ("tools/call on a resident session", time_calls, int(800 * scale)),
        ("handshake", time_handshakes, int(400 * scale)),
        ("first call after a restart", time_after_restart, int(400 * scale)),
    )
    for title, timing, count in timings:
        for json_response in (False, True):
            print(f"{title}, {'JSON' if json_response else 'SSE'}")
            rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
            for _ in range(rounds):
                for contender in random.sample(contenders, len(contenders)):
                    rates[contender.name].append(await timing(contender, json_response, count))
            print(f"  {stock.name:<10} {statistics.median(rates[stock.name]):>7.0f} /s")
            for contender in contenders[1:]:
                ratios = [ours / theirs for ours, theirs in zip(rates[contender.name], rates[stock.name], strict=True)]
                print(
                    f"  {contender.name:<10} {statistics.median(rates[contender.name]):>7.0f} /s   "
                    f"ratio {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
                )
            sys.stdout.flush()


async def run(postgres: str | None, rounds: int, scale: float) -> None:
    def stock(json_response: bool) -> Starlette:
        return make_server().streamable_http_app(json_response=json_response)

    def durable(url: str) -> MakeApp:
        return lambda json_response: durable_app(make_server(), url, json_response=json_response)

    with tempfile.TemporaryDirectory() as folder:
        sqlite = f"sqlite:///{Path(folder) / 'sessions.db'}"
        contenders = [Contender("stock SDK", stock, False), Contender("SQLite", durable(sqlite), True)]
        if postgres is not None:
            await migrate.upgrade(postgres)
            contenders.append(Contender("Postgres", durable(postgres), True))
        await compare(contenders, rounds, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("postgres", nargs="?", help="URL of a Postgres database that may be migrated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of operations in a round")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments.postgres, arguments.rounds, arguments.scale))


if __name__ == "__main__":
    main()
