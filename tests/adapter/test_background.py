"""What runs beside the requests: at intervals, whatever fails, until it is cancelled. The sweep is one of them."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EndReason, StoreUnavailable, session_key, telemetry
from mcp_session_store.adapter import background, clock
from mcp_session_store.adapter.background import Pace, Wake, run_again, run_every
from mcp_session_store.adapter.readiness import Readiness
from mcp_session_store.retention import SWEEP_STEP_TIME, RetentionPolicy, SweepReport
from tests.support.asgi import until
from tests.support.instances import instance
from tests.support.internals import rows_of, sweep_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.faulty_stores import FaultyStore, Sessions

GATHERING = 0.02

pytestmark = pytest.mark.anyio

FOREVER = 3600.0


class Counter:
    """Stands for an OpenTelemetry counter."""

    def __init__(self) -> None:
        self.added: list[tuple[int, dict[str, str]]] = []

    def add(self, amount: int, attributes: dict[str, str] | None = None) -> None:
        self.added.append((amount, attributes or {}))


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """What is counted as failed."""
    counter = Counter()
    monkeypatch.setattr(telemetry, "background_failures", counter)
    return counter


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause would have been; none takes any time."""
    pauses: list[float] = []
    sleep = anyio.sleep

    async def no_sleep(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(anyio, "sleep", no_sleep)
    return pauses


class Stop(BaseException):
    """Ends a task that nothing else ends."""


# A task


async def test_a_failure_that_shows_no_trouble_of_the_store_is_logged_quietly(
    slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_session_store")
    readiness = Readiness("default")
    asked: list[None] = []
    readiness.look = lambda: asked.append(None)

    async def cut() -> None:
        if not asked:
            raise StoreUnavailable("the connection was cut")
        raise Stop

    with pytest.raises(Stop):
        await run_again("hints", cut, readiness=readiness)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "the background task hints failed, and tries again: the connection was cut")
    ]
    assert len(asked) == len(slept) == 1


async def test_a_task_runs_at_intervals_that_differ_by_up_to_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Waits(Wake):
        async def wait(self, seconds: float) -> bool:
            pauses.append(seconds)
            if len(pauses) == 200:
                raise Stop
            return False

    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1

    with pytest.raises(Stop):
        await run_every("sweep", 10, work, wake=Waits(gathering=GATHERING))
    assert runs == 199
    assert all(8 <= pause <= 10 for pause in pauses)
    assert max(pauses) - min(pauses) > 1


async def test_a_task_is_woken_before_its_time_and_once_for_all_who_wake_it() -> None:
    wake = Wake(gathering=GATHERING)
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_every("activity", FOREVER, work, wake=wake))
        for expected in (1, 2, 3):
            for _ in range(5):
                wake.set()
            await until(lambda expected=expected: runs == expected)  # type: ignore[misc]
        await anyio.sleep(3 * GATHERING)
        assert runs == 3
        tasks.cancel_scope.cancel()


async def test_calls_keep_their_pace_and_a_lone_one_waits_for_nothing(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(clock, "now", lambda: now)
    pace = Pace(0.5)
    await pace.wait()
    assert slept == []
    now += 0.2
    await pace.wait()
    assert slept == [pytest.approx(0.3)]
    now += 0.7
    await pace.wait()
    assert len(slept) == 1


@pytest.mark.parametrize("error", [StoreUnavailable("it is down"), RuntimeError("a bug")], ids=["down", "bug"])
async def test_a_task_that_fails_is_counted_logged_ever_less_and_tried_again_with_back_off(
    error: Exception, failures: Counter, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mcp_session_store")
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 14:
            return
        if runs == 15:
            raise Stop
        raise error

    wake = Wake(gathering=GATHERING)
    wake.set()

    with pytest.raises(Stop):
        await run_every("changes", 600, lambda: _woken(wake, work), wake=wake)
    assert failures.added == [(1, {"task": "changes"})] * 13
    level = logging.WARNING if isinstance(error, StoreUnavailable) else logging.ERROR
    assert [(record.levelno, "changes failed" in record.getMessage()) for record in caplog.records] == [
        *[(level, True)] * 4,
        (logging.INFO, False),
    ]
    assert "works again, after it failed 13 times" in caplog.text
    if isinstance(error, StoreUnavailable):
        assert all(record.exc_info is None for record in caplog.records)
    pauses = [pause for pause in slept if pause != GATHERING]
    expected = [min(background.MIN_BACKOFF * 2**n, background.MAX_BACKOFF) for n in range(13)]
    assert len(pauses) == 13
    for pause, longest in zip(pauses, expected, strict=True):
        assert 0.75 * longest <= pause <= longest


async def _woken(wake: Wake, work: Callable[[], Awaitable[None]]) -> None:
    wake.set()
    await work()


async def test_the_back_off_is_never_longer_than_the_interval(failures: Counter, slept: list[float]) -> None:
    async def work() -> None:
        if len(failures.added) == 12:
            raise Stop
        raise StoreUnavailable("it is down")

    wake = Wake(gathering=GATHERING)
    wake.set()
    with pytest.raises(Stop):
        await run_every("changes", 2, work, wake=wake)
    assert max(slept) <= 2


async def test_a_task_that_is_not_meant_to_end_is_begun_again_when_it_fails(
    failures: Counter, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 10:
            raise StoreUnavailable("it is down")

    await run_again("hints", work)
    assert runs == 10
    assert failures.added == [(1, {"task": "hints"})] * 9
    assert slept[0] <= background.MIN_BACKOFF
    assert max(slept) > 20


async def test_a_task_that_worked_for_long_begins_again_at_once(
    failures: Counter, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(anyio, "current_time", lambda: now)
    runs = 0

    async def work() -> None:
        nonlocal runs, now
        runs += 1
        if runs == 12:
            return
        if runs > 9:
            now += background.MAX_BACKOFF + 1
        raise StoreUnavailable("it is down")

    await run_again("hints", work)
    assert len(failures.added) == 11
    assert slept[8] > 20
    assert max(slept[9:]) <= background.MIN_BACKOFF


# The sweep


async def expired(store: FaultyStore, sessions: Sessions, number: int) -> list[str]:
    """Open sessions that have expired when this returns."""
    async with instance(store, sweep_interval=None) as one:
        ids = [await one.client().handshake() for _ in range(number)]
    sessions.ahead += timedelta(hours=25)
    return ids


async def test_a_sweep_runs_by_itself(store: FaultyStore, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, purged = Counter(), Counter()
    monkeypatch.setattr(telemetry, "ended", ended)
    monkeypatch.setattr(telemetry, "purged", purged)
    ids = await expired(store, sessions, 3)
    async with instance(store, sweep_interval=0.02):
        await until(lambda: len(ended.added) > 0)
        assert [await store.ended(session_id) for session_id in ids] == [EndReason.EXPIRED] * 3
        assert ended.added == [(3, telemetry.of("default", reason="expired"))]
        sessions.ahead += timedelta(hours=25)
        await until(lambda: store.records == 0)
        await until(lambda: purged.added == [(3, telemetry.of("default"))])


async def test_a_sweep_goes_on_in_steps_until_there_is_no_more(
    store: FaultyStore, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await expired(store, sessions, 7)
    limits: list[int] = []
    real = sessions.sweep

    async def two_at_once(*, limit: int) -> SweepReport:
        limits.append(limit)
        return await real(limit=2)

    monkeypatch.setattr(sessions, "sweep", two_at_once)
    async with instance(store, sweep_interval=FOREVER) as one:
        store.background.clear()
        await sweep_store(one.manager)
        assert store.background["sweep"] == 4
        assert {await store.ended(session_id) for session_id in ids} == {EndReason.EXPIRED}


async def test_half_of_the_time_of_a_sweep_is_for_the_requests(
    store: FaultyStore, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    steps = 0
    pauses: list[float] = []

    async def slow(*, limit: int) -> SweepReport:
        nonlocal now, steps
        now += 0.5
        steps += 1
        return SweepReport(expired=1, more=steps < 4)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async with instance(store, sweep_interval=FOREVER) as one:
        await one.first_poll()
        with monkeypatch.context() as patched:
            patched.setattr(sessions, "sweep", slow)
            patched.setattr(anyio, "current_time", lambda: now)
            patched.setattr(anyio, "sleep", pause)
            await sweep_store(one.manager)
    assert pauses == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("holds_up", "expected"),
    [(True, [25, 50, 50, 25, 25, 25, 50, 100]), (False, [25, 50, 100, 100, 100, 100, 100, 100])],
)
async def test_the_steps_of_a_sweep_shrink_and_grow_with_the_time_for_which_they_hold_up_others(
    store: FaultyStore, sessions: Sessions, monkeypatch: pytest.MonkeyPatch, holds_up: bool, expected: list[int]
) -> None:
    now = 0.0
    limits: list[int] = []

    async def sweep(*, limit: int) -> SweepReport:
        nonlocal now
        each = SWEEP_STEP_TIME * (0.016 if len(limits) < 2 else 0.2 if len(limits) < 5 else 0.008)
        limits.append(limit)
        # Not what the step took as a whole, waits for the database included.
        now += 1.0
        return SweepReport(expired=limit, more=len(limits) < 8, longest=each * limit if holds_up else 0.0)

    async def pause(seconds: float) -> None:
        pass

    async with instance(store, sweep_interval=FOREVER) as one:
        await one.first_poll()
        with monkeypatch.context() as patched:
            patched.setattr(sessions, "sweep", sweep)
            patched.setattr(anyio, "current_time", lambda: now)
            patched.setattr(anyio, "sleep", pause)
            await sweep_store(one.manager)
    assert limits == expected


async def test_a_sweep_that_fails_is_logged_counted_and_recovers(
    store: FaultyStore,
    sessions: Sessions,
    failures: Counter,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "MIN_BACKOFF", 0.01)
    (session_id,) = await expired(store, sessions, 1)
    store.broken("sweep")
    async with instance(store, sweep_interval=0.02) as one:
        await until(lambda: len(failures.added) >= 3)
        assert failures.added[0] == (1, telemetry.of("default", task="sweep"))
        assert "sweep failed" in caplog.text
        # The app stays up, and the session is expired all the same.
        assert (await one.client(session_id).ping()).status == 404
        await one.client().handshake()
        store.up()
        await until(lambda: rows_of(store.inner)[session_key(session_id)].ended is not None)


async def test_without_an_interval_nobody_sweeps(store: FaultyStore, sessions: Sessions) -> None:
    ids = await expired(store, sessions, 1)
    async with instance(store, sweep_interval=None, end_within=0.02):
        polls = store.background["changes"]
        await until(lambda: store.background["changes"] > polls + 5)
        assert store.background["sweep"] == 0
        assert await store.ended(ids[0]) is None


@pytest.mark.parametrize("operation", ["sweep", "changes", "touch", "listen"])
async def test_shutdown_cancels_what_hangs(store: FaultyStore, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.stopping.SHUTDOWN_TIMEOUT", 0.05)
    with anyio.fail_after(30):
        held = store.hold("listen") if operation == "listen" else None
        async with instance(store, sweep_interval=0.02, end_within=0.04) as one:
            held = held or store.hold(operation)
            if operation == "touch":
                await one.client().begin()
            await held.wait_entered()


async def test_instances_that_sweep_at_once_handle_no_session_twice(
    store: FaultyStore, other_store: FaultyStore, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Counter()
    monkeypatch.setattr(telemetry, "ended", ended)
    sessions.retention = RetentionPolicy(tombstone=None)
    await expired(store, sessions, 20)
    async with instance(store, sweep_interval=0.02), instance(other_store, sweep_interval=0.02):
        counts = {each: each.background["sweep"] for each in (store, other_store)}
        for each, before in counts.items():
            await until(lambda each=each, before=before: each.background["sweep"] > before + 2)  # type: ignore[misc]
    assert sum(amount for amount, _ in ended.added) == 20
