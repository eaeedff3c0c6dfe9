"""The body of a request, as far as it was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store.adapter.requests import Incoming

if TYPE_CHECKING:
    from starlette.types import Message

pytestmark = pytest.mark.anyio


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


DISCONNECT: Message = {"type": "http.disconnect"}


class Connection:
    """What a server gives to `receive`, one message after another, and then nothing."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)
        self.more = anyio.Event()

    def send(self, message: Message) -> None:
        self._messages.append(message)
        self.more.set()

    async def receive(self) -> Message:
        while not self._messages:
            await self.more.wait()
        return self._messages.pop(0)


async def test_a_body_is_read_to_its_end_and_given_back_as_one_message() -> None:
    incoming = Incoming(Connection(part(b"12", more=True), part(b"345"), DISCONNECT).receive)
    await incoming.read(100)
    assert (incoming.body, incoming.whole, incoming.gone) == (b"12345", True, False)
    assert await incoming.receive() == part(b"12345")
    assert await incoming.receive() == DISCONNECT


async def test_a_body_is_read_until_it_exceeds_a_limit_and_later_read_on() -> None:
    incoming = Incoming(Connection(*(part(b"12", more=True) for _ in range(3)), part(b"3")).receive)
    await incoming.read(3)
    assert (incoming.body, incoming.whole) == (b"1212", False)
    await incoming.read(3)
    assert incoming.body == b"1212"
    await incoming.read(100)
    assert (incoming.body, incoming.whole) == (b"1212123", True)


async def test_the_part_that_was_read_precedes_the_rest() -> None:
    incoming = Incoming(Connection(part(b"12", more=True), part(b"3")).receive)
    await incoming.read(1)
    assert await incoming.receive() == part(b"12", more=True)
    assert await incoming.receive() == part(b"3")


async def test_a_request_of_which_nothing_was_read_is_received_as_it_is() -> None:
    assert await Incoming(Connection(part(b"12")).receive).receive() == part(b"12")


async def test_a_read_that_is_cancelled_loses_nothing() -> None:
    connection = Connection(part(b"12", more=True))
    incoming = Incoming(connection.receive)
    with anyio.move_on_after(0.01):
        await incoming.read(100)
    assert not incoming.whole
    connection.send(part(b"3"))
    await incoming.read(100)
    assert (incoming.body, incoming.whole) == (b"123", True)


async def test_a_client_that_goes_within_its_body_is_seen_by_reading() -> None:
    incoming = Incoming(Connection(part(b"12", more=True), DISCONNECT).receive)
    await incoming.read(100)
    assert (incoming.whole, incoming.gone) == (False, True)
    with anyio.fail_after(5):
        await incoming.disconnected()
    assert await incoming.receive() == part(b"12", more=True)
    assert await incoming.receive() == DISCONNECT
    assert await incoming.receive() == DISCONNECT


async def test_a_client_that_goes_is_noticed_behind_its_body() -> None:
    connection = Connection(part(b"12"))
    incoming = Incoming(connection.receive)
    await incoming.read(100)
    with anyio.move_on_after(0.01):
        await incoming.disconnected()
    assert not incoming.gone
    connection.send(DISCONNECT)
    with anyio.fail_after(5):
        await incoming.disconnected()
    assert incoming.gone
    assert await incoming.receive() == part(b"12")
    assert await incoming.receive() == DISCONNECT


async def test_a_client_whose_body_is_not_whole_is_not_watched() -> None:
    incoming = Incoming(Connection(part(b"12", more=True), part(b"34", more=True), DISCONNECT).receive)
    await incoming.read(1)
    with anyio.move_on_after(0.01):
        await incoming.disconnected()
    assert (incoming.body, incoming.gone) == (b"12", False)
    await incoming.read(100)
    assert incoming.body == b"1234"
