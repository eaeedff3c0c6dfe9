"""The benchmarks run, with so few operations that their numbers mean nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.servers import ROOT


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("benchmarks.calls --only restart --mode JSON --store sqlite --rounds 2 --functions 1", "ours, sqlite"),
        (
            "benchmarks --only restore --rounds 1 --scale 0 --stored 1000 --resident 2",
            "| restore, one at a time, p50 |",
        ),
        ("benchmarks --only storing --rounds 1 --scale 0.02", "| storing, sessions: 100, 4 KiB |"),
        ("benchmarks.events --only replay --rounds 1 --scale 0.02", "times mcp-persist, FULL"),
        ("benchmarks.trial --only on-sqlite --each 1 --clients 2 --kill-every 0", "| wait | 1 of 1 (0) |"),
        ("benchmarks.floor --rounds 1 --scale 0.05", "| SQLite, only inserted |"),
        ("benchmarks --only sweeping --rounds 1 --scale 0.01", "(goal: at most 2"),
    ],
)
def test_a_benchmark_runs_and_checks_the_answers(command: str, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_restores_are_measured_on_both_databases(postgres_url: str) -> None:
    command = f"benchmarks {postgres_url} --only restart --rounds 1 --scale 0"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| first call after a restart, SSE, events on |" in done.stdout
    assert "| Postgres |" in done.stdout
