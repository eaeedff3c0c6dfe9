"""Python processes that start fast: forked from one that has already imported the modules of all servers.

A start of the interpreter, with the SDK and SQLAlchemy, takes about a second of a core, and the tests start hundreds of
servers. What is imported here has no threads, and none of it reads the environment at import that a test may set.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.context import ForkServerContext, ForkServerProcess
    from pathlib import Path

_IMPORTED = [
    "aiosqlite",
    "asyncpg",
    "fastmcp",
    "mcp_session_store.app",
    "sqlalchemy.dialects.postgresql",
    "uvicorn.main",
]


class ForkedProcess:
    """`python -m module arguments`, in a new session, as far as `subprocess.Popen` has the same methods.

    Args:
        module: The module to run as `__main__`.
        arguments: The rest of `sys.argv`.
        log: The file to which its output is appended.
        cwd: Its working directory; imports come from where this process takes them.
        env: All of its environment, as `os.environ` has it; `/proc` shows that of the process that forked it.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str]) -> None:
        self._process: ForkServerProcess = _context().Process(
            target=_run, args=(module, list(arguments), str(log), str(cwd), dict(env))
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


def _run(module: str, arguments: list[str], log: str, cwd: str, env: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for opened, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(opened, standard)
    # multiprocessing has put something else in its place; uvicorn hands its number on to workers.
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
