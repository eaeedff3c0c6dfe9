"""The benchmarks run, with so few operations that their numbers mean nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.servers import ROOT


@pytest.mark.parametrize(
    "arguments",
    [["calls", "--only", "restart", "--mode", "JSON", "--store", "sqlite", "--rounds", "2", "--functions", "1"]],
    ids=lambda arguments: arguments[0],
)
def test_a_benchmark_runs_and_checks_the_answers(arguments: list[str]) -> None:
    module, *options = arguments
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout
