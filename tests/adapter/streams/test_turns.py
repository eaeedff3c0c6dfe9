"""Sessions and principals take turns at reading the log: one that reads much holds up only itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import session_key
from mcp_session_store.adapter.streams import turns
from mcp_session_store.adapter.streams.turns import Turns
from mcp_session_store.errors import StoreBusy
from tests.support.asgi import until
from tests.support.instances import principal
from tests.support.internals import lines_of, recorder_of
from tests.support.streams import away, one_more_turn, opened
from tests.support.talking import Talking, hears

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.records import EventPage
    from tests.support.asgi import Client
    from tests.support.faulty_stores import FaultyLog
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

MANY = 40


class _SlowLog:
    """Lets one read of a log go on at a time, as a database's only connection does, and notes whose it was.

    Args:
        log: The log.
        monkeypatch: Changes the log's `read`.
    """

    def __init__(self, log: FaultyLog, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[UUID] = []
        """Keys of the sessions that were read, in the order in which the reads came."""
        self.pages = anyio.Semaphore(0)
        """Pages that may be read."""
        read = log.read

        async def slowly(key: UUID, stream: str, *, after: int) -> EventPage | None:
            self.order.append(key)
            await self.pages.acquire()
            return await read(key, stream, after=after)

        monkeypatch.setattr(log, "read", slowly)

    async def go_on(self) -> None:
        """Let all wait for no more."""
        for _ in range(1000):
            self.pages.release()


@pytest.fixture
def slow(log: FaultyLog, monkeypatch: pytest.MonkeyPatch) -> _SlowLog:
    return _SlowLog(log, monkeypatch)


async def _gone(talking: Talking, one: Instance, user: object = None) -> tuple[Client, str]:
    """Return a client in a session, with a call whose connection has broken, and the last event id that it has."""
    client = one.client(user=user)
    await client.handshake()
    _, last_event_id = await away(talking, client)
    return client, last_event_id


async def test_a_session_has_one_read_at_the_log_however_many_of_its_streams_are_resumed(
    talking: Talking, one: Instance, slow: _SlowLog
) -> None:
    many, its_place = await _gone(talking, one)
    other, other_place = await _gone(talking, one)
    for _ in range(MANY):
        many.open_stream(its_place)
    await until(lambda: slow.order != [])
    resumed = other.open_stream(other_place)
    await until(lambda: len(slow.order) == 2)
    await one_more_turn()
    # The other's read comes right behind the one that is under way.
    assert slow.order == [session_key(str(client.session_id)) for client in (many, other)]
    slow.pages.release()
    slow.pages.release()
    await resumed.start()
    assert resumed.status == 200
    await slow.go_on()
    await until(lambda: slow.order.count(session_key(str(many.session_id))) >= MANY)


async def test_a_principal_has_one_read_at_the_log_and_its_sessions_take_turns(
    talking: Talking, one: Instance, slow: _SlowLog
) -> None:
    clients = [await _gone(talking, one, principal("many")) for _ in range(3)]
    other, other_place = await _gone(talking, one, principal("other"))
    for client, place in clients:
        for _ in range(2):
            client.open_stream(place)
    await until(lambda: slow.order != [])
    resumed = other.open_stream(other_place)
    await until(lambda: len(slow.order) == 2)
    await one_more_turn()
    assert slow.order[1:] == [session_key(str(other.session_id))]
    await slow.go_on()
    await until(lambda: len(slow.order) >= 8)
    await resumed.start()
    of_many = [key for key in slow.order if key != session_key(str(other.session_id))]
    assert of_many[:3] == of_many[3:6] == [session_key(str(client.session_id)) for client, _ in clients]


async def test_a_stream_that_is_followed_reads_in_its_turn(talking: Talking, one: Instance, slow: _SlowLog) -> None:
    await slow.go_on()
    client = one.client()
    await client.handshake()
    stream = await opened(client)
    call, place = await away(talking, client)
    resumed = await opened(client, place)
    await until(lambda: len(slow.order) >= 3)
    while slow.pages.value:
        await slow.pages.acquire()
    slow.order.clear()
    for _ in range(3):
        await call.say("a")
        await call.tell("b")
        await one_more_turn()
    assert len(slow.order) == 1
    await slow.go_on()
    await hears(resumed, "a", "a", "a")
    await hears(stream, "b", "b", "b")


async def test_reads_that_wait_leave_nothing_behind(talking: Talking, one: Instance, slow: _SlowLog) -> None:
    client, place = await _gone(talking, one, principal("one"))
    resumed = [client.open_stream(place) for _ in range(5)]
    await until(lambda: len(slow.order) == 1)
    for exchange in resumed:
        exchange.cancel()
    await one_more_turn()
    assert lines_of(recorder_of(one.manager).turns) == {}
    await slow.go_on()
    stream = await opened(client, place)
    await one_more_turn()
    assert lines_of(recorder_of(one.manager).turns) == {}
    await stream.leave()


async def test_a_read_whose_turn_does_not_come_is_refused_and_no_other_is(
    talking: Talking, one: Instance, slow: _SlowLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, place = await _gone(talking, one)
    other, other_place = await _gone(talking, one)
    first = client.open_stream(place)
    await until(lambda: len(slow.order) == 1)
    monkeypatch.setattr(turns, "PATIENCE", 0.01)
    assert (await client.open_stream(place).answer()).status == 503
    resumed = other.open_stream(other_place)
    await until(lambda: len(slow.order) == 2)
    await slow.go_on()
    for exchange in (first, resumed):
        await exchange.start()
        assert exchange.status == 200


# The lines


async def _take(of: Turns, took: list[str], *owners: str) -> None:
    async with of.take(*owners):
        took.append(owners[0])
        await anyio.sleep(0)


async def test_a_line_keeps_its_order() -> None:
    of = Turns()
    took: list[str] = []
    async with anyio.create_task_group() as tasks, of.take("session", "principal"):
        for session in ("session", "first", "second", "first", "second"):
            tasks.start_soon(_take, of, took, session, "principal")
            await one_more_turn()
        assert took == []
        await _take(of, took, "other")
    assert took == ["other", "first", "second", "session", "first", "second"]
    assert lines_of(of) == {}


async def test_a_line_is_not_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_WAITING", 2)
    of = Turns()
    took: list[str] = []
    async with anyio.create_task_group() as tasks, of.take("session", "principal"):
        for _ in range(2):
            tasks.start_soon(_take, of, took, "session", "principal")
        await one_more_turn()
        with pytest.raises(StoreBusy, match="2 reads of one session"):
            await _take(of, took, "session", "principal")
    assert took == ["session"] * 2
    assert lines_of(of) == {}


async def test_a_turn_ends_with_an_error_and_with_a_cancellation() -> None:
    of = Turns()
    took: list[str] = []
    with pytest.raises(RuntimeError, match="bug"):
        async with of.take("session", "principal"):
            raise RuntimeError("a bug")
    async with of.take("other", "principal"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_take, of, took, "session", "principal")
            await one_more_turn()
            tasks.cancel_scope.cancel()
        assert lines_of(of).keys() == {"other", "principal"}
    assert took == []
    assert lines_of(of) == {}
