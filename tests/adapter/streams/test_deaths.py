"""Whom an instance takes for dead: those that hold nothing any more, and nobody who only lost it for a moment."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store.adapter.instances import RELEASED_FOR, Instances
from tests.support.asgi import until
from tests.support.faulty_stores import FaultyLog
from tests.support.instances import instance, lone_instance
from tests.support.streams import away, opened
from tests.support.talking import Talking, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock

pytestmark = pytest.mark.anyio

ONE, TWO = "00000001", "00000002"
SECOND = timedelta(seconds=1)


def known(log: FaultyLog, name: str) -> Instances:
    """An instance, as it knows the others."""
    log.mailbox.holds = True
    return lone_instance(log.mailbox, f"host:1:{name}", dead_after=timedelta(hours=1))


@asynccontextmanager
async def holding(one: Instances) -> AsyncIterator[None]:
    """Meanwhile an instance holds something, which the others know."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.listen)
        with anyio.fail_after(5):
            await one.wake.wait(10)
        await one.beat()
        yield
        tasks.cancel_scope.cancel()


async def looks(two: Instances, clock: Clock, *, seconds: int) -> list[str]:
    """Let an instance look at another once a second; return whom it takes for dead at last."""
    dead = await two.find_dead([ONE])
    for _ in range(seconds):
        clock.advance(SECOND)
        dead = await two.find_dead([ONE])
    return dead


async def test_an_instance_is_dead_when_it_has_held_nothing_for_a_while(
    log: FaultyLog, other_log: FaultyLog, clock: Clock
) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    async with holding(one):
        assert await looks(two, clock, seconds=10) == []
        assert two.check_interval == 1
    assert await looks(two, clock, seconds=int(RELEASED_FOR)) == []
    assert two.check_interval < 1
    assert await looks(two, clock, seconds=1) == [ONE]


async def test_an_instance_that_lost_what_it_held_and_says_so_is_not_dead(
    log: FaultyLog, other_log: FaultyLog, clock: Clock
) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    async with holding(one):
        pass
    assert await looks(two, clock, seconds=2) == []
    await one.beat()
    assert await looks(two, clock, seconds=60) == []
    async with holding(one):
        pass
    # It holds it again, and what was seen before does not count.
    assert await looks(two, clock, seconds=1) == []
    async with holding(one):
        assert await looks(two, clock, seconds=10) == []
    assert await looks(two, clock, seconds=2) == []


async def test_a_pause_of_an_instance_is_not_time_in_which_it_saw_that_others_held_nothing(
    log: FaultyLog, other_log: FaultyLog, clock: Clock
) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    async with holding(one):
        pass
    assert await two.find_dead([ONE]) == []
    clock.advance(30 * SECOND)
    assert await two.find_dead([ONE]) == []


async def test_what_was_seen_the_last_time_that_a_client_waited_does_not_count(
    log: FaultyLog, other_log: FaultyLog, clock: Clock
) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    async with holding(one):
        pass
    assert await looks(two, clock, seconds=2) == []
    # The client goes. The instance holds something again, and loses it again.
    async with holding(one):
        clock.advance(5 * SECOND)
    assert await two.find_dead([ONE]) == []


async def test_an_instance_that_leaves_holds_nothing_before_its_tasks_end(
    log: FaultyLog, other_log: FaultyLog, clock: Clock
) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    async with holding(one):
        await one.leave()
        await one.beat()
    assert await looks(two, clock, seconds=60) == []
    await one.retire()
    assert await two.find_dead([ONE]) == [ONE]


async def test_a_thing_that_is_held_proves_no_life(log: FaultyLog, other_log: FaultyLog, clock: Clock) -> None:
    one, two = known(log, ONE), known(other_log, TWO)
    await two.beat()
    async with holding(one):
        clock.advance(timedelta(hours=1, seconds=1))
        assert await two.find_dead([ONE]) == [ONE]


async def test_a_call_of_an_instance_that_was_killed_is_lost_at_once(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog
) -> None:
    talking, log = Talking(), FaultyLog(store)
    log.mailbox.holds = True
    async with instance(other_store, events=other_log, instance_timeout=3600) as two:
        async with instance(store, talking.notes, events=log, instance_timeout=3600) as one:
            client = one.client()
            session_id = await client.handshake()
            _, last_event_id = await away(talking, client)
            # It begins to hold something beside the start.
            await until(lambda: log.mailbox.background["beat"] >= 2)
            log.down("append", "beat", "retire")
        resumed = await opened(two.client(session_id), last_event_id)
        await resumed.end()
        assert told(resumed.messages) == ["lost"]


async def test_an_instance_that_stops_says_first_that_it_holds_nothing(store: FaultyStore, log: FaultyLog) -> None:
    log.mailbox.holds = True
    async with instance(store, events=log, instance_timeout=3600) as one:
        await until(lambda: log.mailbox.background["beat"] >= 2)
        log.down("retire")
        name = one.manager.instance.rpartition(":")[2]
    assert not (await log.mailbox.inner.last_beats([name]))[name].released


async def test_a_death_is_noticed_although_notifications_cannot_be_asked_for(
    store: FaultyStore, other_store: FaultyStore, other_log: FaultyLog
) -> None:
    talking, log = Talking(), FaultyLog(store)
    other_log.hints = False
    other_log.down("follow")
    async with instance(other_store, events=other_log, instance_timeout=3600) as two:
        async with instance(store, talking.notes, events=log) as one:
            client = one.client()
            session_id = await client.handshake()
            call, last_event_id = await away(talking, client)
            resumed = await opened(two.client(session_id), last_event_id)
            await call.say("a")
            await until(lambda: told(resumed.messages) == ["a"])
            log.down("append")
        await resumed.end()
        assert told(resumed.messages) == ["a", "lost"]
