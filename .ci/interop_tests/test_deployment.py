"""The commands of `examples/deploy/compose.yaml` as plain processes: a migration, and two servers behind nginx."""

from __future__ import annotations

import re
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import yaml

from interop_tests.nginx import Nginx
from tests.support.commands import COMMAND
from tests.support.http import RawClient
from tests.support.servers import ROOT, ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

FOLDER = ROOT / "examples" / "deploy"


def server_of(service: dict[str, Any], url: str, log: Path) -> ServerProcess:
    """Return a replica of a service, on a port of 127.0.0.1 instead of one of its container."""
    words = [{"0.0.0.0": "127.0.0.1", "8000": "{port}"}.get(word, word) for word in service["command"]]
    assert "{port}" in words
    environment = {**service["environment"], "MCP_SESSION_STORE_URL": url}
    return ServerProcess([*COMMAND, *words, "--app-dir", str(FOLDER)], log=log, environment=environment)


def recipe_of(text: str) -> str:
    """Return the settings of nginx for two processes of this machine, which have no resolver of Docker's."""
    text = re.sub(r"^resolver .*$|^ *zone .*$", "", text, flags=re.MULTILINE)
    servers = "server 127.0.0.1:8001;\n    server 127.0.0.1:8002;"
    assert "server server:8000 resolve;" in text
    return text.replace("server server:8000 resolve;", servers).replace("listen 8080;", "listen 127.0.0.1:8080;")


async def test_a_session_outlives_a_replica_of_the_compose_file(tmp_path: Path, postgres_url: str) -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    url = postgres_url.replace("+asyncpg", "")
    migration = subprocess.run(
        [*COMMAND, *services["migrate"]["command"], "--url", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert migration.returncode == 0, migration.stderr
    one, two = (server_of(services["server"], url, tmp_path / name) for name in ("one", "two"))
    with (
        one,
        two,
        Nginx(
            "round-robin.conf", [one.port, two.port], tmp_path, text=recipe_of((FOLDER / "nginx.conf").read_text())
        ) as nginx,
    ):
        for server in (one, two):
            async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
                for path in ("/health/live", "/health/ready"):
                    assert (await http.get(server.url + path)).status_code == 200
        # By the name that --allowed-host has; any other one is refused, through nginx, too.
        async with RawClient(nginx.mcp_url, headers={"host": "localhost:8080"}) as client:
            await client.handshake()
            # Each has the session: round robin takes the next one for each request.
            assert {(await client.call_tool("restores")).text for _ in range(4)} == {"0", "1"}
            assert one.terminate() in (0, -signal.SIGTERM), one.log()
            assert (await client.call_tool("restores")).text in ("0", "1")
        async with RawClient(nginx.mcp_url, headers={"host": "evil.example"}) as stranger:
            assert (await stranger.initialize()).status == 421
