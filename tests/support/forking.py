"""Python processes that start fast: forked from one that has already imported the modules of servers and commands.

A start of the interpreter, with the SDK and SQLAlchemy, takes about a second of a core, and the tests start hundreds of
servers and commands. What is imported here has no threads, and none of it reads the environment at import that a test
may set, except FastMCP its own variables.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.context import ForkServerContext, ForkServerProcess
    from pathlib import Path

_IMPORTED = [
    "aiosqlite",
    "anyio._backends._asyncio",
    "asyncpg",
    "fastmcp.server.server",
    "mcp_session_store.app",
    "mcp_session_store.cli",
    "mcp_session_store.sql.admin.doctor",
    "mcp_session_store.sql.admin.events",
    "mcp_session_store.sql.schema.migrate",
    "sqlalchemy.dialects.postgresql",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.main",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    # The last, because it is about all that the others made.
    "tests.support.frozen",
]


class ForkedProcess:
    """`python -m module arguments`, in a new session, as far as `subprocess.Popen` has the same methods.

    Args:
        module: The module to run as `__main__`.
        arguments: The rest of `sys.argv`.
        cwd: Its working directory; imports come from where this process takes them.
        env: All of its environment, as `os.environ` has it; `/proc` shows that of the process that forked it.
        stdin: A descriptor of this process; by default there is no input.
        stdout: A descriptor of this process.
        stderr: A descriptor of this process.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int,
        stderr: int,
    ) -> None:
        with ExitStack() as stack:
            if stdin is None:
                stdin = stack.enter_context(open(os.devnull, "rb")).fileno()
            # multiprocessing sends the descriptors of its connections along.
            files = [stack.enter_context(Connection(os.dup(file))) for file in (stdin, stdout, stderr)]
            self._process: ForkServerProcess = _context().Process(
                target=_run, args=(module, list(arguments), str(cwd), dict(env), files)
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code if the process has ended (negative: the signal)."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process, and return its exit code.

        Args:
            timeout: In seconds.

        Raises:
            subprocess.TimeoutExpired: It runs still.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _run(module: str, arguments: list[str], cwd: str, env: dict[str, str], files: list[Connection]) -> None:
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
        file.close()
    # As the interpreter makes them at its start, because a terminal is written to in lines. uvicorn hands the number of
    # the first on to workers.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - stays open
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_forked(
    module: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: str, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` to its end, as `subprocess.run` does with its input and its outputs as pipes.

    Args:
        module: The module to run as `__main__`.
        arguments: The rest of `sys.argv`.
        cwd: Its working directory.
        env: All of its environment.
        stdin: Its input, which has room in a pipe.
        timeout: Seconds that it may take.

    Raises:
        subprocess.TimeoutExpired: It took longer, and was killed.
    """
    with ExitStack() as stack:
        pipes = [os.pipe() for _ in range(3)]
        ends = [
            (stack.enter_context(open(read, "rb")), stack.enter_context(open(write, "wb"))) for read, write in pipes
        ]
        (their_input, our_input), (our_output, their_output), (our_errors, their_errors) = ends
        process = ForkedProcess(
            module,
            arguments,
            cwd=cwd,
            env=env,
            stdin=their_input.fileno(),
            stdout=their_output.fileno(),
            stderr=their_errors.fileno(),
        )
        for theirs in (their_input, their_output, their_errors):
            theirs.close()
        our_input.write(stdin.encode())
        our_input.close()
        with ThreadPoolExecutor(2) as readers:
            outputs = [readers.submit(ours.read) for ours in (our_output, our_errors)]
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        output, errors = (read.result().decode() for read in outputs)
    return subprocess.CompletedProcess([module, *arguments], code, output, errors)
