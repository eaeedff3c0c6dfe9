"""The example tells the truth by its exit code, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.servers import ROOT


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "survive_restart.py", *arguments],
        env={k: v for k, v in os.environ.items() if not k.startswith("MCP_SESSION_STORE_")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_session_of_the_example_survives(kind: str, request: pytest.FixtureRequest) -> None:
    done = _run(*([request.getfixturevalue("postgres_url")] if kind == "postgres" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "The session survived."
    assert "verified: the session id is the same" in done.stdout
    assert "the answer: 404, and the client fails: Session not found" in done.stdout


def test_the_example_fails_when_the_session_cannot_survive() -> None:
    done = _run("postgresql://127.0.0.1:1/nowhere")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
