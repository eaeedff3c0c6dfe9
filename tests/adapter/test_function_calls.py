"""What requests cost in function calls of this package, which do not depend on the machine."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.support.forking import run_forked
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.fixture(scope="module")
def counted() -> Mapping[str, float]:
    """Calls of this package's functions, and of built-in functions by them, with the store in memory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MCP_", "OTEL_"))}
    done = run_forked("tests.support.counted_calls", [], cwd=ROOT, env=environment, stdin="", timeout=120)
    assert done.returncode == 0, done.stderr
    found: Mapping[str, float] = json.loads(done.stdout)
    return found


# Those of the store in memory and of the log in memory are included: of a handshake they are a quarter.
@pytest.mark.parametrize(
    ("operation", "most"),
    [
        pytest.param("call, JSON", 60, id="a call of a resident session, answered by JSON"),
        pytest.param("call, SSE", 60, id="a call of a resident session, answered by SSE"),
        pytest.param("call, SSE, events on", 161, id="a call that can be resumed"),
        pytest.param("restart, JSON", 246, id="the first call after a restart"),
        pytest.param("restart, SSE, events on", 366, id="the first call after a restart, which can be resumed"),
        pytest.param("handshake, JSON", 232, id="a handshake"),
    ],
)
def test_each_operation_costs_few_function_calls(counted: Mapping[str, float], operation: str, most: float) -> None:
    assert 0 < counted[operation] <= most
