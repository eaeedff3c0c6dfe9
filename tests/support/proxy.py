"""A plain load balancer: each HTTP request goes to the next backend, without a thought for sessions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

_BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class RoundRobinProxy:
    """An HTTP proxy on 127.0.0.1, as an async context manager.

    Each request is made the last one of its connection, on both sides, so that the next one comes on a new
    connection and goes to the next backend. What follows the head is forwarded as it comes, both ways:
    bodies of any length, and SSE streams. A backend that does not listen is passed over.

    Args:
        backends: Ports on 127.0.0.1.
    """

    def __init__(self, backends: Sequence[int]) -> None:
        self.port = free_port()
        self.served: list[int] = []
        """The backend of each request so far."""
        self._backends = list(backends)
        self._next = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def mcp_url(self) -> str:
        """The MCP endpoint behind it, where the frameworks put it by default."""
        return f"{self.url}/mcp"

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = await client_reader.readuntil(b"\r\n\r\n")
            connection = await self._connect()
            if connection is None:
                client.write(_BAD_GATEWAY)
                await client.drain()
                return
            backend_reader, backend = connection
            try:
                backend.write(_closing(head))
                await self._forward(client_reader, client, backend_reader, backend)
            finally:
                backend.transport.abort()
        except (OSError, asyncio.IncompleteReadError):
            # One of the two went away, which the closed connection tells the other.
            pass
        finally:
            client.close()
            self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for _ in self._backends:
            port = self._backends[self._next % len(self._backends)]
            self._next += 1
            try:
                connection = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            self.served.append(port)
            return connection
        return None

    async def _forward(
        self,
        client_reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        backend_reader: asyncio.StreamReader,
        backend: asyncio.StreamWriter,
    ) -> None:
        request = asyncio.create_task(_pump(client_reader, backend))
        response = asyncio.create_task(_pump(backend_reader, client))
        try:
            # A client that closes its side has gone: HTTP knows no half-closed connection.
            await asyncio.wait({request, response}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in (request, response):
                pump.cancel()
            await asyncio.gather(request, response, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()


def _closing(head: bytes) -> bytes:
    """The head of a request after which the connection ends."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith((b"connection:", b"keep-alive:"))]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n"
