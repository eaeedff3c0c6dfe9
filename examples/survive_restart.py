"""A session that survives SIGKILL: watch it happen.

    python examples/survive_restart.py                                      # on a SQLite file, deleted afterwards
    python examples/survive_restart.py postgresql://user:password@host/db   # on Postgres

Starts a real server process, connects a real MCP client, calls a tool, kills the process with SIGKILL, starts it
again on the same port, and calls again in the same session. The exit code is 0 only if the session really survived.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import Implementation

from mcp_session_store import get_restore_marker

# The server. An ordinary one: nothing in it knows that its sessions are durable.

# Quiet: MCPServer configures the root logger, and here the client prints to the same terminal.
server = MCPServer("survive-restart", log_level="WARNING")


@server.tool()
def whoami(ctx: Context) -> dict[str, Any]:
    """Who answers, whom it takes the client for, and whether it has restored this session."""
    marker = get_restore_marker(ctx)
    params = ctx.session.client_params
    return {
        "pid": os.getpid(),
        "client": params.client_info.name if params is not None else None,
        "restores": 0 if marker is None else marker.restores,
    }


# The rest watches it from outside.


class Watch:
    """Sees what the client sends, so that nobody has to trust its word for it."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        """The JSON-RPC methods sent, in order."""
        self.session_ids: set[str] = set()
        """The session ids sent and received."""

    async def on_request(self, request: httpx2.Request) -> None:
        if request.method == "POST":
            self.methods.append(json.loads(request.content).get("method", "(response)"))
        self._note(request.headers)

    async def on_response(self, response: httpx2.Response) -> None:
        self._note(response.headers)

    def _note(self, headers: httpx2.Headers) -> None:
        if session_id := headers.get("mcp-session-id"):
            self.session_ids.add(session_id)


class SurvivalError(Exception):
    """The session did not survive, or it cannot be told."""


def expect(truth: bool, what: str) -> None:
    """Print what was verified, or fail with it."""
    if not truth:
        raise SurvivalError(f"not true: {what}")
    print(f"   verified: {what}")


def free_port() -> int:
    """A port that stays free while the server is down: below those that the kernel gives to clients."""
    while True:
        port = random.randint(10240, 32767)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class ServerProcess:
    """This file's server object, served durably by the command line, in a process of its own."""

    def __init__(self, port: int, environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", "mcp_session_store.cli", "serve", "survive_restart:server"]
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
        """Start it, wait until it listens, and return its process id."""
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
        """SIGKILL: no goodbye, no clean-up."""
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


async def survive(environment: dict[str, str], log: Path) -> None:
    port = free_port()
    watch = Watch()
    http = httpx2.AsyncClient(
        timeout=60,
        # Proxies that the environment names have nothing to do with a server on this machine.
        trust_env=False,
        event_hooks={"request": [watch.on_request], "response": [watch.on_response]},
    )
    client = Client(
        streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http),
        # The handshake era of MCP (2025-11-25 and before) is the one that has sessions.
        mode="legacy",
        client_info=Implementation(name="survivor", version="1"),
    )
    with ServerProcess(port, environment, log) as server_process:
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
            # In a thread, so that the client notices meanwhile what there is to notice.
            second = await asyncio.to_thread(server_process.start)
            print(f"   it is process {second}")
            expect(second != first, "that is another process")

            print("5. call again, with the same client")
            sent_before = len(watch.methods)
            after = await call(client)
            expect(after["pid"] == second, f"process {second} answered")
            expect(after["restores"] == 1, "it restored the session from the database")
            expect(after["client"] == "survivor", "it knows what the client said of itself in its handshake")
            expect(watch.methods[sent_before:] == ["tools/call"], "the client sent that call and nothing else")
            expect(watch.methods.count("initialize") == 1, "the client initialized once only, at the beginning")
            expect(watch.session_ids == {session_id}, "the session id is the same")

            print("6. close the client, which ends the session for good")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url", nargs="?", help="a Postgres URL; by default a SQLite file that is deleted afterwards")
    url = parser.parse_args().url

    with tempfile.TemporaryDirectory(prefix="survive-restart-") as folder:
        # In the environment, not among the arguments: other users can read those.
        environment = {**os.environ, "MCP_SESSION_STORE_NAMESPACE": "survive-restart"}
        if url is None:
            environment["MCP_SESSION_STORE_URL"] = f"sqlite:///{folder}/sessions.db"
            print("0. sessions are kept in a new SQLite file, which is migrated on first use")
        else:
            environment["MCP_SESSION_STORE_URL"] = url
            print("0. sessions are kept in the database given, which nobody migrates unasked: run")
            print("   mcp-session-store upgrade", flush=True)
            upgrade = [sys.executable, "-m", "mcp_session_store.cli", "upgrade"]
            if subprocess.run(upgrade, env=environment, check=False).returncode:
                print("FAILED: the database could not be migrated")
                return 1
        log = Path(folder) / "server.log"
        try:
            asyncio.run(survive(environment, log))
        except Exception as error:
            # Task groups wrap what was raised within them.
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
