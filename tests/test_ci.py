"""What README.md tells people to run is what the project's own checks run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_test_command_of_the_readme_is_the_one_that_the_checks_run() -> None:
    commands = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line]
    assert len(commands) == 1, "README.md gives one command that installs and passes the tests"
    assert commands[0] in [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]


@pytest.mark.parametrize("name", ["run", "interop"])
def test_the_checks_can_be_run(name: str) -> None:
    assert os.access(ROOT / ".ci" / name, os.X_OK)
