"""The command line: how it is called, and the types of the fixtures that call it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from click.testing import Result

    from tests.support.servers import ServerProcess

MODULE = "mcp_session_store.cli"
COMMAND = [sys.executable, "-m", MODULE]

UNREACHABLE = "postgresql://somebody:s3cret@127.0.0.1:1/sessions"
"""URL at which no database answers, with a password that may appear nowhere."""

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""A control sequence of a terminal."""


def run_printed(text: str, *, password: str | None = None, user: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command that a message ends with, as it stands there, in a shell."""
    command = text.strip().partition("run: mcp-session-store ")[2]
    assert command, text
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCP_SESSION_STORE_")}
    if password is not None:
        named = "the password in PGPASSWORD" if user is None else "the user in PGUSER and the password in PGPASSWORD"
        assert f"with {named}, run: " in text
        environment["PGPASSWORD"] = password
    if user is not None:
        environment["PGUSER"] = user
    return subprocess.run(
        f"{shlex.join(COMMAND)} {command}",
        shell=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class CommandFunction(Protocol):
    """Type of the fixture `command`."""

    def __call__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
        executed: bool = False,
    ) -> subprocess.CompletedProcess[str]: ...


class ServeCommandFunction(Protocol):
    """Type of the fixture `serve_command`."""

    def __call__(
        self, *arguments: str, environment: Mapping[str, str] | None = None, executed: bool = False
    ) -> ServerProcess: ...


class InvokeFunction(Protocol):
    """Type of the fixture `invoke`."""

    def __call__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Result: ...


class TerminalFunction(Protocol):
    """Type of the fixture `terminal`."""

    def __call__(
        self, *arguments: str, environment: Mapping[str, str] | None = None, width: int = 80, typed: str = ""
    ) -> tuple[int, str]: ...
