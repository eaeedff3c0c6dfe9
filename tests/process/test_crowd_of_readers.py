"""One client comes back for a long stream very many times at once: other clients do not wait for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import SqlEventLog, session_key
from mcp_session_store.adapter.streams.event_ids import EventIds
from mcp_session_store.records import EventKind, NewEvent
from tests.support.clients import PATIENCE, Talking, until
from tests.support.http import PROTOCOL_VERSION, RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.http import Stream
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

CROWD = 100
"""Requests that come at once."""
MANY, SIZE = 6000, 2000
"""Events of the long stream, and bytes of each: a dozen pages."""
BEAT = 0.01
"""Seconds between two pings of a client whose requests need no database; a page takes as long."""
AT_MOST = 30
"""Pings for which another client waits; on a busy machine they take longer, as all does."""


async def _long_stream(url: str, client: RawClient, server: ServerProcess) -> str:
    """Store a long stream of a call of a client's, and return the event id before its first event.

    Of a call, because a client that takes its standalone stream very often is refused. The server has no such call, so
    that only the log has what the stream brings.
    """
    call = Talking(client, "short", count=1)
    await call.read(server)
    assert client.session_id is not None
    key = session_key(client.session_id)
    ids = EventIds(key)
    cursor = ids.read(call.event_ids[0])
    assert cursor is not None
    name = f"{cursor.instance}.fffff"
    message = '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"%s"}}' % ("." * SIZE)
    events = [
        NewEvent(stream=name, position=n, kind=EventKind.NOTIFICATION, message=message) for n in range(1, MANY + 1)
    ]
    log = SqlEventLog(url)
    try:
        for n in range(0, MANY, 500):
            await log.append(key, events[n : n + 500])
    finally:
        await log.aclose()
    return ids.write(name, cursor.sequence, 0, 1000)


async def _come_back(server: ServerProcess, client: RawClient, last_event_id: str, answered: list[int]) -> None:
    """Resume a stream, note the bytes of what comes first, and read what follows without a look at it."""
    async with await anyio.connect_tcp("127.0.0.1", server.port) as connection:
        await connection.send(
            f"GET /mcp HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAccept: text/event-stream\r\n"
            f"Mcp-Session-Id: {client.session_id}\r\nMcp-Protocol-Version: {PROTOCOL_VERSION}\r\n"
            f"Last-Event-ID: {last_event_id}\r\nConnection: close\r\n\r\n".encode()
        )
        received = 0
        with contextlib.suppress(anyio.EndOfStream):  # where its turn did not come in time
            while received < SIZE:  # the headers come before the first page, and for all of the crowd soon
                received += len(await connection.receive())
        answered.append(received)
        async for _ in connection:
            pass


async def test_a_client_that_comes_back_very_often_at_once_holds_up_no_other(
    application: Application, store_url: str
) -> None:
    server = application.serve(store_url, events=True)
    beats = 0

    async def beat(client: RawClient) -> None:
        nonlocal beats
        while True:
            assert (await client.request("ping")).result == {}
            beats += 1
            await anyio.sleep(BEAT)

    async with (
        RawClient(server.mcp_url) as many,
        RawClient(server.mcp_url) as other,
        RawClient(server.mcp_url) as ear,
        RawClient(server.mcp_url) as heart,
    ):
        for client in (many, other, heart):
            await client.handshake()
        ear.session_id = other.session_id
        last_event_id = await _long_stream(store_url, many, server)
        call = Talking(other, "short", count=3)
        await call.read(server)

        async def resume() -> None:
            async with other.get_stream(last_event_id=call.event_ids[0]) as stream:
                assert [message async for message in stream] != []

        async def hear(stream: Stream, number: int) -> None:
            await other.call_tool("announce", {"text": str(number), "count": 1})
            assert (await stream.next())["params"]["uri"] == f"said://{number}/0"

        async with ear.get_stream() as stream:
            await stream.next_event()
            answered: list[int] = []
            async with anyio.create_task_group() as crowd:
                crowd.start_soon(beat, heart)
                for _ in range(CROWD):
                    crowd.start_soon(_come_back, server, many, last_event_id, answered)
                await until(lambda: answered != [], "the first of the crowd is answered")
                for number in range(3):
                    began, before = beats, len(answered)
                    with anyio.fail_after(PATIENCE):
                        await resume()
                        await hear(stream, number)
                    assert beats - began < AT_MOST
                    served = sum(received >= SIZE for received in answered[before:])
                    assert number or served < CROWD / 2
                await until(lambda: len(answered) == CROWD, "all of the crowd are answered")
                crowd.cancel_scope.cancel()
