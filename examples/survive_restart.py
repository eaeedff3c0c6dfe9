"""Watch a session survive SIGKILL, and one of the stock SDK's die of it.

    python examples/survive_restart.py                                      # on a SQLite file, deleted afterwards
    python examples/survive_restart.py postgresql://user:password@host/db   # on Postgres

The example starts a server process, connects an MCP client, calls a tool, kills the process with SIGKILL, starts it
again on the same port, and calls again in the same session. Then it does the same with the app that the SDK builds,
whose session is gone: the answer is 404. The exit code is 0 only if the first session survived, and the second did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx2
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import Implementation

from mcp_session_store import get_restore_marker

if TYPE_CHECKING:
    from starlette.applications import Starlette

# An ordinary server: its code knows nothing of durable sessions.

# WARNING, because MCPServer configures the root logger, and the client below prints to the same terminal.
server = MCPServer("survive-restart", log_level="WARNING")


@server.tool()
def whoami(ctx: Context) -> dict[str, Any]:
    """Return the id of this process, the name of the client, and the number of restores of this session."""
    marker = get_restore_marker(ctx)
    params = ctx.session.client_params
    return {
        "pid": os.getpid(),
        "client": params.client_info.name if params is not None else None,
        "restores": 0 if marker is None else marker.restores,
    }


def stock_app() -> Starlette:
    """Return the app that the SDK builds, without durable sessions."""
    return server.streamable_http_app()


# The rest of this file watches the server from outside.


class Watch:
    """Record of the client's HTTP traffic, to verify its requests instead of trusting its report."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        """The JSON-RPC methods sent, in order."""
        self.statuses: list[int] = []
        """The status codes received, in order."""
        self.session_ids: set[str] = set()
        """The session ids sent and received."""

    async def on_request(self, request: httpx2.Request) -> None:
        if request.method == "POST":
            self.methods.append(json.loads(request.content).get("method", "(response)"))
        self._note(request.headers)

    async def on_response(self, response: httpx2.Response) -> None:
        self.statuses.append(response.status_code)
        self._note(response.headers)

    def _note(self, headers: httpx2.Headers) -> None:
        if session_id := headers.get("mcp-session-id"):
            self.session_ids.add(session_id)


class SurvivalError(Exception):
    """Raised when the session did not survive, or when this cannot be determined."""


def expect(truth: bool, statement: str) -> None:
    """Print a statement as verified, or fail with it."""
    if not truth:
        raise SurvivalError(f"not true: {statement}")
    print(f"   verified: {statement}")


def free_port() -> int:
    """Return a port that stays free while the server is down: below the range that the kernel gives to clients."""
    while True:
        port = random.randint(24576, 32767)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


DURABLE = ("mcp_session_store.cli", "serve", "survive_restart:server")
STOCK = ("uvicorn", "--factory", "survive_restart:stock_app")


class ServerProcess:
    """Process that serves the server object of this file, by the command line."""

    def __init__(self, arguments: tuple[str, ...], port: int, environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", *arguments]
        self._command += ["--app-dir", str(Path(__file__).resolve().parent), "--port", str(port)]
        self._port = port
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> int:
        """Start the process, wait until it listens, and return its id."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return self._process.pid
        raise SurvivalError("the server did not start")

    def kill(self) -> None:
        """Kill the process with SIGKILL, which leaves it no time for a clean-up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


async def call(client: Client) -> dict[str, Any]:
    result = await client.call_tool("whoami", {})
    if result.is_error or not isinstance(result.structured_content, dict):
        raise SurvivalError(f"the call failed: {result}")
    print(f"   the answer: {result.structured_content}")
    return result.structured_content


def connect(port: int, watch: Watch) -> tuple[httpx2.AsyncClient, Client]:
    """Return an HTTP client that is watched, and an MCP client on it."""
    http = httpx2.AsyncClient(
        timeout=60,
        # Without the proxies of the environment, because the server is on this machine.
        trust_env=False,
        event_hooks={"request": [watch.on_request], "response": [watch.on_response]},
    )
    client = Client(
        streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http),
        # Only the handshake era of MCP (2025-11-25 and before) has sessions.
        mode="legacy",
        client_info=Implementation(name="survivor", version="1"),
    )
    return http, client


async def survive(environment: dict[str, str], log: Path) -> None:
    port = free_port()
    watch = Watch()
    http, client = connect(port, watch)
    with ServerProcess(DURABLE, port, environment, log) as server_process:
        print(f"1. start a server on port {port}")
        first = server_process.start()
        print(f"   it is process {first}")
        async with http, client:
            print("2. connect an MCP client, and call a tool")
            before = await call(client)
            expect(before["pid"] == first, f"process {first} answered")
            expect(before["restores"] == 0, "the session is new")
            (session_id,) = watch.session_ids

            print(f"3. kill process {first} with SIGKILL")
            server_process.kill()

            print("4. start the server again, on the same port")
            # In a thread, so that the client can notice the lost connection meanwhile.
            second = await asyncio.to_thread(server_process.start)
            print(f"   it is process {second}")
            expect(second != first, "that is another process")

            print("5. call again, with the same client")
            sent_before = len(watch.methods)
            after = await call(client)
            expect(after["pid"] == second, f"process {second} answered")
            expect(after["restores"] == 1, "it restored the session from the database")
            expect(after["client"] == "survivor", "it knows the client's name from the handshake")
            expect(watch.methods[sent_before:] == ["tools/call"], "the client sent that call and nothing else")
            expect(watch.methods.count("initialize") == 1, "the client initialized only once, at the beginning")
            expect(watch.session_ids == {session_id}, "the session id is the same")

            print("6. close the client, which ends the session for good")


async def die(environment: dict[str, str], log: Path) -> None:
    port = free_port()
    watch = Watch()
    http, client = connect(port, watch)
    with ServerProcess(STOCK, port, environment, log) as server_process:
        print("7. the same with the app that the SDK builds")
        server_process.start()
        async with http, client:
            await call(client)
            server_process.kill()
            await asyncio.to_thread(server_process.start)
            try:
                await client.call_tool("whoami", {})
            except MCPError as error:
                print(f"   the answer: {watch.statuses[-1]}, and the client fails: {error}")
            # The client's DELETE gets the same answer, of which it would warn.
            logging.disable(logging.WARNING)
            expect(watch.statuses[-1] == 404, "the second process does not know the session")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?", help="a Postgres URL; by default a SQLite file that is deleted afterwards")
    url = parser.parse_args().url

    with tempfile.TemporaryDirectory(prefix="survive-restart-") as folder:
        # The URL goes into the environment, because other users can read the arguments of a process.
        environment = {**os.environ, "MCP_SESSION_STORE_NAMESPACE": "survive-restart"}
        if url is None:
            environment["MCP_SESSION_STORE_URL"] = f"sqlite:///{folder}/sessions.db"
            print("0. sessions are kept in a new SQLite file, which is migrated on first use")
        else:
            environment["MCP_SESSION_STORE_URL"] = url
            print("0. sessions are kept in the given database, which is migrated only on command: run")
            print("   mcp-session-store upgrade", flush=True)
            upgrade = [sys.executable, "-m", "mcp_session_store.cli", "upgrade"]
            if subprocess.run(upgrade, env=environment, check=False).returncode:
                print("FAILED: the database could not be migrated")
                return 1
        log = Path(folder) / "server.log"
        try:
            asyncio.run(survive(environment, log))
            asyncio.run(die(environment, log))
        except Exception as error:
            # Task groups wrap the errors raised within them.
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            print(f"FAILED: {type(error).__name__}: {error}")
            if log.exists():
                print(f"The server's log:\n{log.read_text(errors='replace')}")
            return 1
    print("The session survived.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
