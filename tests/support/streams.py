"""Streams of events, as clients open them, lose them, and come back to them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

import anyio

from mcp_session_store import session_key
from mcp_session_store.adapter.requests import POSTED, Posted
from mcp_session_store.adapter.streams.event_ids import EventIds
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.internals import is_settled, recorder_of
from tests.support.talking import Talking, told

if TYPE_CHECKING:
    from mcp_session_store.adapter.streams.event_ids import Cursor
    from mcp_session_store.adapter.streams.event_store import SessionEvents
    from tests.support.asgi import Client, Exchange
    from tests.support.instances import Instance
    from tests.support.talking import Call

OLD = "2025-06-18"
"""Protocol version whose clients know no priming events."""
APART: Final = timedelta(seconds=0.5)
"""Time between two openings of a stream on two instances whose order is certain: it is known only up to the time that a
claim takes to the store, and a busy machine may take a while for it."""


async def old_client(one: Instance) -> Client:
    """Return a client of the older version, after its handshake."""
    client = one.client(headers={"mcp-protocol-version": OLD})
    await client.handshake({**INITIALIZE_PARAMS, "protocolVersion": OLD})
    return client


async def opened(client: Client, last_event_id: str | None = None) -> Exchange:
    """Open a stream; return it when it is open, a fresh one with its first event."""
    stream = client.open_stream(last_event_id)
    await stream.start()
    assert stream.status == 200, stream.body
    if last_event_id is None:
        await until(lambda: stream.last_event_id is not None)
    return stream


def place_of(client: Client, event_id: str) -> Cursor:
    """Return the place that an event id of a client's session stands for."""
    cursor = EventIds(session_key(str(client.session_id))).read(event_id)
    assert cursor is not None
    return cursor


async def primed(events: SessionEvents, stream_id: str) -> str | None:
    """Begin a call; return the id in the priming event that its client gets."""
    posted = Posted(b"")
    POSTED.set(posted)
    await events.prime(stream_id, "2025-11-25")
    if posted.priming is None:
        return None
    return posted.priming.decode().partition("\r\n")[0].removeprefix("id: ")


async def one_more_turn() -> None:
    """Let every task run that can."""
    for _ in range(50):
        await anyio.sleep(0)


async def away(talking: Talking, client: Client) -> tuple[Call, str]:
    """Begin a call and break its connection; return the call and the last event id that the client has."""
    call, exchange = await talking.call(client)
    await until(lambda: exchange.last_event_id is not None)
    return call, str(await exchange.leave())


def without_ids(exchange: Exchange, *texts: str) -> bool:
    """Return whether the last events have these texts and no id, not even an empty one, which resets the client's."""
    last = exchange.events[-len(texts) :]
    return told([event.message for event in last]) == list(texts) and {event.id for event in last} == {None}


async def all_stored(one: Instance) -> None:
    """Wait until the backlog is stored."""
    recorder = recorder_of(one.manager)
    await until(lambda: is_settled(recorder))
