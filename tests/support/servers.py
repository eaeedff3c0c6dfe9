"""Real server processes that the tests start, kill and start again on one port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

from tests.support.forking import ForkedProcess
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

ROOT = Path(__file__).resolve().parents[2]

_START_TIMEOUT = 120.0
_STOP_TIMEOUT = 30.0

started: list[ServerProcess] = []
"""The servers of the test that runs; when it fails, the ends of their logs are reported with it."""


class _Process(Protocol):
    """Common interface of `subprocess.Popen` and `ForkedProcess`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


class ServerProcess:
    """A server as a process group of its own: whatever it forks dies with it.

    A context manager: started on entry, killed on exit.

    Args:
        command: Program and arguments; `{port}` in them becomes the port.
        log: The file to which its output is appended, over all restarts.
        environment: Set on top of this process's environment.
        port: The port on 127.0.0.1 that it will listen on; by default one that is free.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self._command = [part.replace("{port}", str(self.port)) for part in command]
        self._log = log
        # Settings in the shell for a real database must not reach the tests.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MCP_SESSION_STORE_")}
        self._environment = {**inherited, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._process: _Process | None = None

    def __enter__(self) -> Self:
        started.append(self)
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mcp_url(self) -> str:
        """The MCP endpoint, where the frameworks put it by default."""
        return f"{self.url}/mcp"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process that was started; with workers, their parent."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def pids(self) -> list[int]:
        """The process and all its descendants: with workers, they are among them."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def log(self) -> str:
        """Return the output so far, over all restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start it and wait until the port takes connections."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start it without waiting."""
        assert not self.running, "the server is running already"
        self._process = self._launch()

    def wait_until_ready(self) -> None:
        """Wait until the port takes connections."""
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise AssertionError(f"the server ended with {code} at start:\n{self.log()[-4000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer within {_START_TIMEOUT:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.02)

    def wait(self) -> int:
        """Wait until it has ended by itself, and return its exit code (negative: the signal)."""
        assert self._process is not None
        try:
            return self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {_STOP_TIMEOUT:.0f} s:\n{self.log()[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL to the process and all that it forked, as when a machine goes; waits for them."""
        if self._process is None:
            return
        group = self._process.pid
        # One that was forked a moment ago has no group yet.
        self._process.send_signal(signal.SIGKILL)
        _signal_group(group, signal.SIGKILL)
        self._process.wait()
        self._process = None
        # Orphans are reaped by init, and until then they may hold the port.
        deadline = time.monotonic() + _STOP_TIMEOUT
        while _signal_group(group, 0):
            if time.monotonic() > deadline:
                raise AssertionError(f"process group {group} survived SIGKILL")
            time.sleep(0.01)

    def terminate(self) -> int:
        """SIGTERM, as an orderly restart sends it; waits, and returns the exit code (negative: a signal)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        code = self.wait()
        self.kill()
        return code

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port."""
        self.kill()
        self.start()

    def _launch(self) -> _Process:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class ForkedServerProcess(ServerProcess):
    """A server that `python -m` runs, with a start that is fast.

    Its command is the name of the module, and arguments.
    """

    def _launch(self) -> _Process:
        module, *arguments = self._command
        with self._log.open("ab") as log:
            return ForkedProcess(
                module, arguments, cwd=ROOT, env=self._environment, stdout=log.fileno(), stderr=log.fileno()
            )


def _signal_group(group: int, number: int) -> bool:
    """Whether the group existed."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        # macOS says this of a group in which only zombies are left.
        return False
    return True


def uvicorn_server(
    app: str,
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    workers: int = 1,
    options: Sequence[str] = (),
) -> ServerProcess:
    """A process that runs an ASGI app by its import string; the repository's root is its first import path.

    Args:
        app: `module:attribute`.
        log: As `ServerProcess` has it, and so have `environment` and `port`.
        environment: See there.
        port: See there.
        workers: uvicorn's `--workers`.
        options: More options for uvicorn.
    """
    command = ["tests.support.forked_uvicorn", app, "--host", "127.0.0.1", "--port", "{port}"]
    # A connection that uvicorn closes after five idle seconds may meet a request that is just being sent.
    command += ["--timeout-keep-alive", "60"]
    if workers > 1:
        # After five seconds without an answer uvicorn replaces a worker, which on a busy machine has only to wait.
        command += ["--workers", str(workers), "--timeout-worker-healthcheck", "60"]
    return ForkedServerProcess([*command, *options], log=log, environment=environment, port=port)


class ServeFunction(Protocol):
    """Type of the fixture `serve`."""

    def __call__(
        self,
        app: str,
        *,
        environment: Mapping[str, str] | None = None,
        workers: int = 1,
        port: int | None = None,
        options: Sequence[str] = (),
    ) -> ServerProcess: ...
