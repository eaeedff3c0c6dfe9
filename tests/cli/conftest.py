"""The command line as people use it: a process, with its exit code and its two outputs."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import select
import signal
import subprocess
import termios
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from mcp_session_store.cli import main
from tests.support.commands import (
    COMMAND,
    MODULE,
    CommandFunction,
    InvokeFunction,
    ServeCommandFunction,
    TerminalFunction,
)
from tests.support.forking import ForkedProcess, run_forked
from tests.support.servers import ROOT, ForkedServerProcess, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from click.testing import Result


_TIMEOUT = 120.0


def _environment(environment: Mapping[str, str] | None) -> dict[str, str]:
    # Nor variables that say how wide a terminal is, or what it can show.
    ours = ("MCP_SESSION_STORE_", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | dict(environment or {})


@pytest.fixture
def command() -> CommandFunction:
    """Runs the command line to its end.

    `executed` runs the program itself, and not a fork of a process that has its imports.
    """

    def run(
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
        executed: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        env, given = _environment(environment), stdin or ""
        if not executed:
            return run_forked(MODULE, arguments, cwd=ROOT, env=env, stdin=given, timeout=_TIMEOUT)
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=env,
            input=given,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )

    return run


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> InvokeFunction:
    """Runs the command line within this process: for the many ways to use it wrongly, where a process each is slow."""

    def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
        for name in [name for name in os.environ if name.startswith("MCP_SESSION_STORE_")]:
            monkeypatch.delenv(name)
        result = CliRunner(env=environment).invoke(main, arguments)
        # Anything else would be a traceback for the user.
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def terminal() -> TerminalFunction:
    """Runs the command line on a terminal to its end: the exit code, and all that the terminal got."""

    def run(
        *arguments: str, environment: Mapping[str, str] | None = None, width: int = 80, typed: str = ""
    ) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        with open(ours, "r+b", buffering=0) as screen:
            termios.tcsetwinsize(theirs, (50, width))
            process = ForkedProcess(
                MODULE,
                arguments,
                cwd=ROOT,
                env={**_environment(environment), "TERM": "xterm-256color"},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
            os.close(theirs)
            try:
                screen.write(typed.encode())
                output = b""
                deadline = time.monotonic() + 60
                # On Linux a terminal ends with an error.
                with contextlib.suppress(OSError):
                    while select.select([screen], [], [], max(0.0, deadline - time.monotonic()))[0]:
                        if not (part := screen.read(65536)):
                            break
                        output += part
                return process.wait(60), output.decode().replace("\r\n", "\n")
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()

    return run


@pytest.fixture
def serve_command(tmp_path: Path) -> Iterator[ServeCommandFunction]:
    """Starts `serve` and waits until it listens; it is killed when the test is over.

    `executed` starts the program itself, and not a fork of a process that has its imports.
    """
    with ExitStack() as stack:
        logs = itertools.count()

        def start(
            *arguments: str, environment: Mapping[str, str] | None = None, executed: bool = False
        ) -> ServerProcess:
            kind, command = (ServerProcess, COMMAND) if executed else (ForkedServerProcess, [MODULE])
            server = kind(
                [*command, "serve", *arguments, "--port", "{port}"],
                log=tmp_path / f"serve-{next(logs)}.log",
                environment=environment,
            )
            return stack.enter_context(server)

        yield start
