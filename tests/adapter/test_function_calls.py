"""What requests cost in function calls of this package, which do not depend on the machine."""

from __future__ import annotations

import pytest

from benchmarks.calls import Profiler, count_calls
from benchmarks.contenders import EVENTS, JSON, MODES, OPERATIONS, Mode, ours

pytestmark = pytest.mark.anyio


async def calls_of_ours(operation: str, mode: Mode) -> float:
    """Return the calls of this package's functions, and of built-in functions by them, with the store in memory."""
    profiler = Profiler()
    with profiler.installed():
        calls, _ = await count_calls(profiler, ours("ours", None), OPERATIONS[operation], mode, rounds=3)
    return calls.by_owner["ours"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.events], ids=lambda mode: mode.name)
async def test_a_call_of_a_resident_session_costs_few_function_calls(mode: Mode) -> None:
    assert 0 < await calls_of_ours("call", mode) <= 60


async def test_a_call_that_can_be_resumed_costs_few_function_calls() -> None:
    # Those of the log in memory included.
    assert 0 < await calls_of_ours("call", EVENTS) <= 164


async def test_the_first_call_after_a_restart_costs_few_function_calls() -> None:
    # Those of the store in memory included.
    assert 0 < await calls_of_ours("restart", JSON) <= 246


async def test_a_handshake_costs_few_function_calls() -> None:
    # Those of the store in memory included, which are a quarter.
    assert 0 < await calls_of_ours("handshake", JSON) <= 236
