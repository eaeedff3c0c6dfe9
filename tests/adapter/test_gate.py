"""The gate at which calls of the store wait while it is away: order, tries, portions, bounds."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock, outage
from mcp_session_store.adapter.outage import Gate, RequestWait, SharedWait
from mcp_session_store.adapter.readiness import Readiness
from mcp_session_store.adapter.requests import ClientGone, Incoming
from mcp_session_store.adapter.responses import ShuttingDown
from mcp_session_store.errors import SchemaBehind, SessionStoreError, StoreBusy, StoreClosed, StoreUnavailable
from tests.support.asgi import PATIENCE, until
from tests.support.internals import waiting_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from typing import Any

    from anyio.abc import TaskGroup
    from starlette.types import Message

pytestmark = pytest.mark.anyio


class Tasks:
    """A task group, as the gate needs it."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        self._group.start_soon(function, *args)


class Door:
    """A store with one kind of call, the gate in front of it, and the requests that make such calls.

    Args:
        group: Where all of them run.
        patience: The gate's.
    """

    def __init__(self, group: TaskGroup, *, patience: float) -> None:
        self.gate = Gate(Tasks(group), Readiness("default"), patience=patience)  # type: ignore[arg-type]
        self.away = False
        self.tried: list[tuple[object, float]] = []
        """Each call that was made, and when."""
        self.answered: list[object] = []
        self.failures: dict[object, Exception] = {}
        """What calls fail with, whether the store is away or not."""
        self.outcomes: dict[object, object] = {}
        """What the request got: its name, or an error."""
        self.under_way = 0
        self.most_under_way = 0
        self._group = group

    async def call(self, name: object) -> object:
        self.tried.append((name, clock.now()))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            if name in self.failures:
                raise self.failures[name]
            if self.away:
                raise StoreUnavailable("the test says it is away")
        finally:
            self.under_way -= 1
        self.answered.append(name)
        return name

    async def request(self, name: object, wait: RequestWait | SharedWait) -> None:
        try:
            failures = 0
            if self.gate.is_open:
                number = self.gate.outages
                try:
                    self.outcomes[name] = await self.call(name)
                    return
                except StoreUnavailable as error:
                    self.gate.failed(error, number)
                    failures = 1
            self.outcomes[name] = await self.gate.answer_to(partial(self.call, name), wait, failures=failures)
        except Exception as error:
            self.outcomes[name] = error

    def start(self, name: object, method: str = "POST", **options: Any) -> RequestWait:
        wait = RequestWait(method, **options)
        self._group.start_soon(self.request, name, wait)
        return wait

    async def lose(self) -> None:
        """Have the store go away, and a request notice it, which waits from then on."""
        self.away = True
        self.start("first")
        await until(lambda: not self.gate.is_open)
        await until(lambda: waiting_at(self.gate)[3] == 1)

    @property
    def waiting(self) -> int:
        return waiting_at(self.gate)[0]

    async def at_rest(self) -> None:
        """Wait until the gate is open and nothing is left behind."""
        await until(lambda: self.gate.is_open)
        await until(lambda: waiting_at(self.gate) == (0, 0, 0, 0))


@asynccontextmanager
async def door(*, patience: float = 20.0) -> AsyncIterator[Door]:
    async with anyio.create_task_group() as group:
        one = Door(group, patience=patience)
        yield one
        await one.at_rest()
        group.cancel_scope.cancel()


async def test_calls_wait_until_the_store_answers_and_go_on_in_the_order_of_their_requests_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None is tried before all of them wait.
    monkeypatch.setattr(outage, "FIRST_PROBE", 1.0)
    async with door() as one:
        await one.lose()
        later = RequestWait("POST")
        names = list(range(50))
        for name in names:
            one.start(name)
        await until(lambda: one.waiting == 51)
        # It comes late, of a request that has come before the others.
        one._group.start_soon(one.request, "earliest", later)
        await until(lambda: one.waiting == 52)
        one.away = False
        await one.at_rest()
        # The one that was tried went ahead.
        assert [name for name in one.answered if name not in ("first", "earliest")] == names
        assert one.answered.index("earliest") <= 1
        assert all(one.outcomes[name] == name for name in names)


async def test_while_the_store_is_away_one_call_at_a_time_is_tried_soon_and_then_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert outage.FIRST_PROBE < outage.PROBE_INTERVAL
    # None is tried before all of them wait.
    monkeypatch.setattr(outage, "FIRST_PROBE", 0.8)
    async with door() as one:
        began = clock.now()
        await one.lose()
        for name in range(20):
            one.start(name)
        await until(lambda: one.waiting == 21)
        one.most_under_way = 0
        await until(lambda: len(one.tried) >= 5)
        (_, first), *tries = one.tried
        assert one.most_under_way == 1
        # Those that have not failed yet: a call may fail for a reason of its own.
        assert [name for name, _ in tries] == list(range(len(tries)))
        moments = [moment for _, moment in tries]
        assert moments[0] - max(first, began) >= outage.FIRST_PROBE * 0.9
        # A call may begin a little after its turn has come, and so come nearer to the next one, not to all.
        assert all(b - a >= outage.PROBE_INTERVAL * 0.5 for a, b in pairwise(moments))
        assert moments[-1] - moments[0] >= outage.PROBE_INTERVAL * 0.9 * (len(moments) - 1)
        one.away = False


async def test_those_who_waited_go_on_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "AT_ONCE", 5)
    async with door() as one:
        await one.lose()
        for name in range(100):
            one.start(name)
        await until(lambda: one.waiting == 101)
        one.most_under_way = 0
        one.away = False
        await one.at_rest()
        assert one.most_under_way == 5
        assert len(one.answered) == 101


async def test_the_cost_of_going_on_does_not_grow_with_the_number_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "AT_ONCE", 1)  # one after the other, as where each answer comes by itself
    costs = []
    for number in (100, 1000):
        async with door() as one:
            await one.lose()
            for name in range(number):
                one.start(name)
            await until(lambda: one.waiting == number + 1)  # noqa: B023
            calls = 0

            def count(_frame: object, event: str, _argument: object) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")

            one.away = False
            sys.setprofile(count)
            try:
                await one.at_rest()
            finally:
                sys.setprofile(None)
            costs.append(calls / number)
    assert costs[1] < 1.5 * costs[0]


def test_a_portion_is_smaller_than_a_batch() -> None:
    from mcp_session_store.sql.batching import MAX_BATCH

    assert outage.AT_ONCE < MAX_BATCH


async def test_a_call_that_always_fails_keeps_no_other_from_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PROBE_INTERVAL", 0.02)
    async with door(patience=2.0) as one:
        one.failures["first"] = StoreUnavailable("its row is locked")
        await one.lose()
        one.away = False
        for name in range(10):
            one.start(name)
        await until(lambda: len(one.answered) == 10)
        await until(lambda: "first" in one.outcomes)
        assert isinstance(one.outcomes["first"], StoreUnavailable)
        one.start("next")
        await until(lambda: "next" in one.answered)


async def test_calls_that_have_failed_are_tried_after_those_that_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # None is tried before all of them wait.
    monkeypatch.setattr(outage, "FIRST_PROBE", 1.0)
    async with door() as one:
        names = [f"bad {number}" for number in range(20)]
        for name in names:
            one.failures[name] = StoreUnavailable("for a reason of its own")
            one.start(name)
        await until(lambda: one.waiting == len(names))
        one.start("good")
        await until(lambda: one.waiting == len(names) + 1)
        one.tried.clear()
        await until(lambda: one.outcomes.get("good") == "good")
        assert one.tried[0][0] == "good"
        one.failures.clear()


async def test_a_request_waits_no_longer_than_its_patience_and_the_gate_opens_when_the_store_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Later than the patience is over.
    monkeypatch.setattr(outage, "FIRST_PROBE", 0.8)
    async with door(patience=0.7) as one:
        await one.lose()
        await until(lambda: "first" in one.outcomes)
        assert isinstance(one.outcomes["first"], StoreUnavailable)
        assert "the test says it is away; the request waited" in str(one.outcomes["first"])
        assert not one.gate.is_open
        # Nothing is tried while none waits.
        tried = len(one.tried)
        await anyio.sleep(outage.FIRST_PROBE)
        assert len(one.tried) == tried
        one.gate.store_answered()
        assert one.gate.is_open
        one.away = False


async def test_an_answer_to_others_opens_the_gate_only_where_none_waits() -> None:
    async with door() as one:
        await one.lose()
        one.gate.store_answered()
        assert not one.gate.is_open
        one.away = False


async def test_with_no_patience_none_waits() -> None:
    async with door(patience=0) as one:
        one.away = True
        for method in ("POST", "GET", "DELETE"):
            one.start(method, method)
            await until(lambda method=method: method in one.outcomes)  # type: ignore[misc]
            assert str(one.outcomes[method]) == "the test says it is away"
        assert one.gate.is_open
        assert len(one.tried) == 3


@pytest.mark.parametrize("error", [SchemaBehind("behind"), StoreBusy("busy"), StoreClosed("closed"), ValueError("bug")])
async def test_other_errors_wait_for_nothing_and_are_raised_to_whom_they_are_due(error: SessionStoreError) -> None:
    async with door() as one:
        one.failures["other"] = error
        one.start("other")
        await until(lambda: one.outcomes.get("other") is error)
        assert one.gate.is_open
        assert len(one.tried) == 1
        await one.lose()
        del one.outcomes["other"]
        one.start("other")
        one.start("next")
        # It may have been tried already.
        await until(lambda: one.waiting == 3 or "other" in one.outcomes)
        one.away = False
        await one.at_rest()
        assert one.outcomes["other"] is error
        assert one.outcomes["next"] == "next"


async def test_a_failure_from_before_an_outage_that_is_over_closes_nothing() -> None:
    async with door() as one:
        before = one.gate.outages
        await one.lose()
        one.away = False
        await one.at_rest()
        one.gate.failed(StoreUnavailable("late"), before)
        assert one.gate.is_open
        # It is made again all the same.
        assert await one.gate.answer_to(partial(one.call, "late"), RequestWait("POST"), failures=0) == "late"
        assert one.gate.outages == before + 1


# Bounds


async def test_there_is_a_bound_on_how_many_wait_and_streams_have_one_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage, "MAX_WAITING", 2)
    monkeypatch.setattr(outage, "MAX_WAITING_STREAMS", 1)
    async with door() as one:
        await one.lose()
        for name, method in ((1, "POST"), (2, "GET"), (3, "DELETE"), (4, "GET")):
            one.start(name, method)
        await until(lambda: len(one.outcomes) == 2)
        for name in (3, 4):
            assert "too many requests wait" in str(one.outcomes[name])
        assert waiting_at(one.gate)[:2] == (2, 1)
        one.away = False
        await one.at_rest()
        assert {one.outcomes[name] for name in ("first", 1, 2)} == {"first", 1, 2}


def incoming(*parts: bytes, gone: anyio.Event | None = None) -> tuple[Incoming, list[bytes]]:
    """A body that comes in parts, and the parts that were not read yet."""
    left = list(parts)

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        await (gone or anyio.Event()).wait()
        return {"type": "http.disconnect"}

    return Incoming(receive), left


async def test_there_is_a_bound_on_the_bytes_that_those_who_wait_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "MAX_BYTES", 1000)
    async with door() as one:
        await one.lose()
        for name, size in ((1, 600), (2, 300), (3, 101)):
            one.start(name, incoming=incoming(b"x" * size)[0])
            await until(lambda name=name: name in one.outcomes or waiting_at(one.gate)[0] == name + 1)  # type: ignore[misc]
            await until(lambda: waiting_at(one.gate)[2] in (600, 900))
        await until(lambda: 3 in one.outcomes)
        assert "hold too much" in str(one.outcomes[3])
        one.start(4, held=101)
        await until(lambda: 4 in one.outcomes)
        assert isinstance(one.outcomes[4], StoreUnavailable)
        assert waiting_at(one.gate)[2] == 900
        one.away = False


async def test_a_large_body_stays_unread_while_its_request_waits() -> None:
    chunk = 64 * 1024
    async with door() as one:
        await one.lose()
        body, left = incoming(*[b"x" * chunk] * 10)
        one.start("large", incoming=body)
        await until(lambda: waiting_at(one.gate)[2] > 0)
        assert len(left) >= 8
        assert waiting_at(one.gate)[2] <= 2 * chunk
        one.away = False
        await one.at_rest()
        assert one.outcomes["large"] == "large"
        # Nothing of it is lost.
        read = b""
        while True:
            message = await body.receive()
            read += message["body"]
            if not message["more_body"]:
                break
        assert len(read) == 10 * chunk


async def test_a_client_that_gives_up_frees_its_place_and_its_call_is_not_made() -> None:
    gone = anyio.Event()
    async with door() as one:
        await one.lose()
        one.start("leaving", incoming=incoming(b"{}", gone=gone)[0])
        await until(lambda: one.waiting == 2)
        gone.set()
        await until(lambda: one.waiting == 1)
        assert isinstance(one.outcomes["leaving"], ClientGone)
        one.away = False
        await one.at_rest()
        assert "leaving" not in one.answered


# How long each kind waits


async def test_a_stream_waits_for_longer_and_a_delete_no_longer_than_clients_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage, "DELETE_PATIENCE", 0.05)
    async with door(patience=2.0) as one:
        await one.lose()
        one.start("stream", "GET")
        one.start("end", "DELETE")
        await until(lambda: "end" in one.outcomes)
        assert "first" not in one.outcomes
        await until(lambda: "first" in one.outcomes)
        assert isinstance(one.outcomes["end"], StoreUnavailable)
        assert waiting_at(one.gate)[:2] == (0, 1)
        one.away = False
        await one.at_rest()
        assert one.outcomes["stream"] == "stream"
    assert outage.STREAM_PATIENCE == 300


async def test_the_time_before_a_failure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with door(patience=5.0) as one:
        one.away = True
        wait = RequestWait("POST")
        wait.arrived -= 5.0
        await one.request("slow", wait)
        assert "no time was left" in str(one.outcomes["slow"])
        assert len(one.tried) == 1
        one.away = False
        one.gate.store_answered()


# Work that requests share


async def test_shared_work_waits_while_one_request_does_and_ends_when_none_does() -> None:
    async with door(patience=1.0) as one:
        await one.lose()
        for waiters in (1, 0):
            work = SharedWait(clock.now())
            work.waiters = waiters
            name = f"work of {waiters}"
            one._group.start_soon(one.request, name, work)
            if waiters:
                with anyio.fail_after(PATIENCE):
                    await work.over_or_waiting.wait()
                # It has no patience of its own.
                await until(lambda: "first" in one.outcomes)
                assert work.is_waiting
                work.give_up()
            await until(lambda name=name: name in one.outcomes)  # type: ignore[misc]
            assert isinstance(one.outcomes[name], StoreUnavailable)
            assert not work.is_waiting
        one.away = False
        one.gate.store_answered()


# A stop


async def test_a_stop_answers_those_who_wait_and_none_waits_after_it() -> None:
    async with door() as one:
        await one.lose()
        one.start("stream", "GET")
        await until(lambda: waiting_at(one.gate)[1] == 1)
        one.gate.shut_down()
        await until(lambda: len(one.outcomes) == 2)
        assert all(isinstance(outcome, ShuttingDown) for outcome in one.outcomes.values())
        one.start("late")
        await until(lambda: "late" in one.outcomes)
        assert isinstance(one.outcomes["late"], ShuttingDown)
        one.gate.store_answered()


async def test_a_request_that_is_cancelled_leaves_nothing_behind() -> None:
    async with door() as one:
        await one.lose()
        async with anyio.create_task_group() as requests:
            requests.start_soon(one.request, "cancelled", RequestWait("POST", incoming(b"{}")[0]))
            await until(lambda: one.waiting == 2)
            requests.cancel_scope.cancel()
        assert waiting_at(one.gate)[0] == 1
        one.away = False


class Counter:
    """A counter that shows what it counts."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int, _: dict[str, str]) -> None:
        self.value += amount


async def test_the_begin_and_the_end_of_an_outage_are_logged_once_and_those_who_wait_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    outages = Counter()
    monkeypatch.setattr(telemetry, "outages", outages)
    async with door() as one:
        await one.lose()
        for name in range(10):
            one.start(name)
        await until(lambda: len(one.tried) >= 2)
        assert (sum(one.gate.waiting.values()), outages.value) == (11, 1)
        one.away = False
    assert (sum(one.gate.waiting.values()), outages.value) == (0, 1)
    texts = [record.message for record in caplog.records if record.name == "mcp_session_store.adapter.readiness"]
    assert len(texts) == 2
    assert "the session store is away" in texts[0]
    assert texts[1].endswith("s; 11 requests waited for it")
