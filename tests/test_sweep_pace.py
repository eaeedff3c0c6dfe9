"""The pace of a sweep: steps that are no longer than other writers can wait, and pauses between them."""

from __future__ import annotations

import pytest

from mcp_session_store.event_log import EVENT_SWEEP_LIMIT, LEAST_EVENT_SWEEP
from mcp_session_store.retention import SWEEP_STEP_TIME, EventSweepReport, SweepPace, SweepReport
from mcp_session_store.store import LEAST_SWEEP, SWEEP_LIMIT


def step(longest: float, *, more: bool = True) -> SweepReport:
    return SweepReport(more=more, longest=longest)


def limits(pace: SweepPace, *, fixed: float, each: float, lag: float, holds_up: bool) -> list[int]:
    """Return the limits of twenty steps, with a cost of each step and each session, and a lag outside the database."""
    taken = []
    for _ in range(20):
        taken.append(pace.limit)
        cost = fixed + each * pace.limit
        pace.pause_after(step(cost if holds_up else 0.0), took=cost + lag)
    return taken


def test_a_step_that_takes_long_makes_the_next_one_smaller_at_once() -> None:
    pace = SweepPace(100, least=1)
    for _ in range(10):
        pace.pause_after(step(0.0001), took=0.0001)
    assert pace.limit == 100
    pace.pause_after(step(SWEEP_STEP_TIME), took=1.0)
    assert pace.limit == 100
    pace.pause_after(step(1.1 * SWEEP_STEP_TIME), took=0.0)
    assert pace.limit == 50
    pace.pause_after(step(3.9 * SWEEP_STEP_TIME), took=0.0)
    assert pace.limit == 12


def test_steps_grow_one_size_at_a_time_while_they_stay_short() -> None:
    pace = SweepPace(100, least=1)
    pace.pause_after(step(1000.0), took=1000.0)
    taken = []
    for _ in range(8):
        taken.append(pace.limit)
        pace.pause_after(step(0.49 * SWEEP_STEP_TIME), took=0.0)
    assert taken == [1, 3, 6, 12, 25, 50, 100, 100]
    # One as long as that may be too long when it is twice as large.
    pace = SweepPace(100, least=1)
    pace.pause_after(step(0.51 * SWEEP_STEP_TIME), took=0.0)
    assert pace.limit == 12


def test_a_step_that_was_not_full_is_no_reason_for_a_larger_one() -> None:
    pace = SweepPace(100, least=1)
    pace.pause_after(step(0.0, more=False), took=0.0001)
    assert pace.limit == 12


@pytest.mark.parametrize("fixed", [0.0, 0.003, 0.006, 1.0])
@pytest.mark.parametrize("lag", [0.0, 0.003, 0.006, 1.0])
def test_steps_that_hold_up_no_other_writer_stay_full(fixed: float, lag: float) -> None:
    # As on Postgres, where a step takes round trips, and as long as the event loop is busy.
    pace = SweepPace(SWEEP_LIMIT, least=LEAST_SWEEP)
    first, second, *others = limits(pace, fixed=fixed, each=0.0005, lag=lag, holds_up=False)
    assert (first, second) == (25, 50)
    assert set(others) == {SWEEP_LIMIT}


def test_a_step_is_large_enough_for_its_fixed_cost() -> None:
    # As on SQLite with busy threads beside its own.
    pace = SweepPace(SWEEP_LIMIT, least=LEAST_SWEEP)
    assert set(limits(pace, fixed=1.0, each=0.0, lag=0.0, holds_up=True)) == {LEAST_SWEEP}
    assert limits(pace, fixed=0.0002, each=0.000008, lag=1.0, holds_up=True)[-1] == SWEEP_LIMIT


def test_a_step_stays_within_its_bounds() -> None:
    for most in (1, 2, 7, 100, 100_000):
        pace = SweepPace(most, least=LEAST_SWEEP)
        pace.pause_after(step(1e9), took=1e9)
        assert min(most, LEAST_SWEEP) <= pace.limit < 2 * LEAST_SWEEP
        for _ in range(30):
            pace.pause_after(step(1e-9), took=1e-9)
        assert pace.limit == most
    events = SweepPace(EVENT_SWEEP_LIMIT, least=LEAST_EVENT_SWEEP)
    events.pause_after(EventSweepReport(removed=1, more=True, longest=1e9), took=1e9)
    assert LEAST_EVENT_SWEEP <= events.limit < 2 * LEAST_EVENT_SWEEP


def test_the_pause_is_as_long_as_the_step_and_its_waits() -> None:
    assert SweepPace(100, least=1).pause_after(step(0.001), took=0.25) == 0.25
