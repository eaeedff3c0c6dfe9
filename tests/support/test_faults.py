"""The faulty network fails as its methods say."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.faults import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


class _Echo:
    """A server that answers each line with `ok <line>`, and remembers the lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                self.lines.append(line)
                writer.write(b"ok " + line)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def _echo_behind_proxy() -> AsyncIterator[tuple[_Echo, FaultProxy]]:
    echo = _Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    try:
        async with FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
            yield echo, proxy
    finally:
        server.close()


@asynccontextmanager
async def _client(proxy: FaultProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes = b"x\n") -> bytes:
    writer.write(line)
    return await asyncio.wait_for(reader.readline(), 10)


async def test_it_forwards_until_told_otherwise() -> None:
    async with _echo_behind_proxy() as (_, proxy), _client(proxy) as (reader, writer):
        assert await _ask(reader, writer) == b"ok x\n"
        assert (proxy.accepted, proxy.connections) == (1, 1)


async def test_killed_connections_are_reset_and_new_ones_work() -> None:
    async with _echo_behind_proxy() as (_, proxy):
        async with _client(proxy) as (reader, writer):
            await _ask(reader, writer)
            proxy.kill_connections()
            with pytest.raises(ConnectionResetError):
                await _ask(reader, writer)
        async with _client(proxy) as (reader, writer):
            assert await _ask(reader, writer) == b"ok x\n"


async def test_a_hanging_proxy_takes_connections_and_says_nothing_until_it_resumes() -> None:
    async with _echo_behind_proxy() as (echo, proxy):
        proxy.hang()
        async with _client(proxy) as (reader, writer):
            answer = asyncio.create_task(_ask(reader, writer))
            while not proxy.accepted:
                await asyncio.sleep(0)
            await asyncio.wait({answer}, timeout=0.05)
            assert not answer.done()
            assert echo.lines == []
            proxy.resume()
            assert await answer == b"ok x\n"


async def test_a_refusing_proxy_keeps_its_connections_and_its_port() -> None:
    async with _echo_behind_proxy() as (_, proxy), _client(proxy) as (reader, writer):
        await _ask(reader, writer)
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert await _ask(reader, writer) == b"ok x\n"
        await proxy.accept()
        async with _client(proxy) as (other_reader, other_writer):
            assert await _ask(other_reader, other_writer) == b"ok x\n"
        assert proxy.port == port


async def test_a_reply_can_be_lost_after_the_server_has_acted() -> None:
    async with _echo_behind_proxy() as (echo, proxy), _client(proxy) as (reader, writer):
        proxy.kill_on_next_reply(b"ok COMMIT")
        assert await _ask(reader, writer, b"INSERT\n") == b"ok INSERT\n"
        with pytest.raises(ConnectionResetError):
            await _ask(reader, writer, b"COMMIT\n")
        assert echo.lines == [b"INSERT\n", b"COMMIT\n"]
        assert proxy.sprung == 1
        async with _client(proxy) as (reader, writer):
            assert await _ask(reader, writer, b"COMMIT\n") == b"ok COMMIT\n"


async def test_a_request_can_be_lost_before_the_server_has_seen_it() -> None:
    async with _echo_behind_proxy() as (echo, proxy), _client(proxy) as (reader, writer):
        assert await _ask(reader, writer, b"BEGIN\n") == b"ok BEGIN\n"
        proxy.kill_on_next_request(b"COMMIT")
        with pytest.raises(ConnectionResetError):
            await _ask(reader, writer, b"COMMIT\n")
        assert echo.lines == [b"BEGIN\n"]
        assert proxy.sprung == 1


async def test_a_connection_to_a_server_that_is_not_there_is_closed() -> None:
    async with _echo_behind_proxy() as (_, proxy):
        target = proxy.port
    async with FaultProxy("127.0.0.1", target) as proxy, _client(proxy) as (reader, _writer):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readline(), 10)
