"""Of two GET streams of a session the newer one is served, and the older one is closed, with no message lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from mcp.server.streamable_http import EventStore

from mcp_session_store.adapter.streams import standalone
from tests.support.asgi import PATIENCE, until
from tests.support.instances import instance
from tests.support.streams import old_client, one_more_turn, opened
from tests.support.talking import hears, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.streamable_http import EventCallback, EventId, StreamId
    from mcp_types import JSONRPCMessage

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Instance
    from tests.support.talking import Talking

pytestmark = pytest.mark.anyio

TEXTS = [str(n) for n in range(100)]
"""More than any buffer holds."""


@pytest.fixture(params=["events", "an older client", "no events"])
async def server(
    request: pytest.FixtureRequest, store: FaultyStore, log: FaultyLog, talking: Talking
) -> AsyncIterator[Client]:
    """A client of an instance, with its session."""
    options: dict[str, Any] = {} if request.param == "no events" else {"events": log}
    async with instance(store, talking.notes, **options) as one:
        if request.param == "an older client":
            yield await old_client(one)
        else:
            client = one.client()
            await client.handshake()
            yield client


async def get(client: Client) -> Exchange:
    """Open the client's GET stream anew."""
    stream = client.open_stream()
    await stream.start()
    assert stream.status == 200, stream.body
    assert stream.headers["mcp-session-id"] == client.session_id
    return stream


async def test_the_newer_one_is_served_and_the_older_one_ends(server: Client, talking: Talking) -> None:
    call, _ = await talking.call(server)
    first = await get(server)
    await call.tell("a")
    await hears(first, "a")
    second = await get(server)
    await first.end()
    await call.tell("b")
    await hears(second, "b")
    assert told(first.messages) == ["a"]
    # Not the newer one ends with the older one.
    third = await get(server)
    await second.end()
    await call.tell("c")
    await hears(third, "c")
    await third.leave()
    await call.tell("unheard")
    fourth = await get(server)
    await call.tell("d")
    await until(lambda: "d" in told(fourth.messages))


async def test_what_the_older_one_has_not_taken_goes_to_the_newer_one(server: Client, talking: Talking) -> None:
    call, _ = await talking.call(server)
    first = await get(server)
    await call.tell("first")
    await hears(first, "first")
    first.stop_reading()
    async with anyio.create_task_group() as tasks:
        # Without events the server waits for a client that does not read.
        tasks.start_soon(call.tell, *TEXTS)
        await one_more_turn()
        second = await get(server)
        third = await get(server)
        await until(lambda: TEXTS[-1] in told(third.messages))
    await second.end()
    first.read_on()
    await first.end()
    heard = told(first.messages)
    assert heard[0] == "first"
    assert [*heard[1:], *told(second.messages), *told(third.messages)] == TEXTS


async def test_what_the_transport_is_about_to_write_goes_to_the_newer_one_and_ends_no_stream(
    server: Client, talking: Talking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "TAKEN_WITHIN", 0)
    call, _ = await talking.call(server)
    streams = [await get(server)]
    async with anyio.create_task_group() as tasks:
        for turns in range(20):
            newer = server.open_stream()
            for _ in range(turns):
                await anyio.sleep(0)
            tasks.start_soon(call.tell, str(turns))
            await newer.start()
            streams.append(newer)
    await until(lambda: sum(len(stream.messages) for stream in streams) >= 20)
    assert [text for stream in streams for text in told(stream.messages)] == [str(turns) for turns in range(20)]


async def test_a_client_resumes_from_the_first_event_of_a_stream_that_it_took_over(one: Instance) -> None:
    client = one.client()
    await client.handshake()
    first = await opened(client)
    second = await opened(client)
    await first.end()
    assert second.last_event_id is not None
    await second.leave()
    resumed = await opened(client, second.last_event_id)
    assert resumed.status == 200


async def test_clients_that_take_it_from_each_other_are_refused_for_a_while(
    server: Client, talking: Talking, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, _ = await talking.call(server)
    latest = await get(server)
    for _ in range(standalone.TAKEN_AT_MOST):
        latest = await get(server)
    refused = await server.open_stream().answer()
    assert refused.status == 409
    assert refused.messages[0]["error"]["message"] == "Conflict: Only one SSE stream is allowed per session"
    await call.tell("a")
    await hears(latest, "a")
    if latest.last_event_id is not None:
        assert (await server.open_stream(latest.last_event_id).answer()).status == 409
    # The one that has it comes back, and takes it from no other.
    await latest.leave()
    latest = await get(server)
    monkeypatch.setattr(standalone, "TAKEN_WITHIN", 0)
    await get(server)
    await latest.end()


async def test_a_client_that_leaves_while_its_stream_is_full_holds_nothing_up(server: Client, talking: Talking) -> None:
    call, _ = await talking.call(server)
    stream = await get(server)
    stream.stop_reading()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.tell, *TEXTS)
        await one_more_turn()
        await stream.leave()
    stream = await get(server)
    with anyio.fail_after(PATIENCE):
        await call.tell("last")
        await until(lambda: told(stream.messages)[-1:] == ["last"])


class _Kept(EventStore):
    """An event store of the user's."""

    def __init__(self) -> None:
        self.kept: list[tuple[StreamId, JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        self.kept.append((stream_id, message))
        return str(len(self.kept))

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        return self.kept[int(last_event_id) - 1][0]


async def test_with_an_event_store_of_the_users_it_is_taken_over_as_well(store: FaultyStore, talking: Talking) -> None:
    async with instance(store, talking.notes, event_store=_Kept()) as one:
        client = one.client()
        await client.handshake()
        call, _ = await talking.call(client)
        first = await get(client)
        second = await get(client)
        await first.end()
        await call.tell("a")
        await hears(second, "a")
        assert second.last_event_id is not None
        await second.leave()
        # One that was resumed is the transport's, which would close a newer one with its own.
        resumed = client.open_stream(second.last_event_id)
        await resumed.start()
        await call.tell("b")
        await hears(resumed, "b")
        assert (await client.open_stream().answer()).status == 409
