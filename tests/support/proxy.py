"""A plain load balancer: each HTTP request goes to the next backend, or to any, without a thought for sessions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal

from tests.support.faults import close_listener
from tests.support.ports import free_port

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from typing import Self

_BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# The field of an event that has an id, and no header whose name ends like it.
_EVENT_ID: Final = b"\nid: "


class RoundRobinProxy:
    """An HTTP proxy on 127.0.0.1, as an async context manager.

    Each request is made the last one of its connection, on both sides, so that the next one comes on a new
    connection and goes to another backend. What follows the head is forwarded as it comes, both ways:
    bodies of any length, and SSE streams. A backend that does not listen is passed over.

    Args:
        backends: Ports on 127.0.0.1.
        version: Of HTTP, that it speaks with them. With 1.0, as nginx by default, a response that is cut ends for
            the client like one that is whole.
        dice: Picks the backend of each request; by default they have their turns.
    """

    def __init__(
        self,
        backends: Sequence[int],
        *,
        version: Literal["1.0", "1.1"] = "1.1",
        dice: random.Random | None = None,
    ) -> None:
        self.port = free_port()
        self.served: list[int] = []
        """The backend of each request so far."""
        self._backends = list(backends)
        self._version = version.encode()
        self._dice = dice
        self._next = 0
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Future[None]] = set()

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
        close_listener(self._listener)
        # A connection that was accepted a moment ago gets its task in the next turns of the event loop.
        for _turn in range(10):
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # An aborted connection is closed in the next turn.
        for _turn in range(3):
            await asyncio.sleep(0)

    def cut_streams(self) -> int:
        """End the open responses whose clients have an event id, so that they can come back; how many there were."""
        streams = [cut for cut in self._streams if not cut.done()]
        for cut in streams:
            cut.set_result(None)
        return len(streams)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = await client_reader.readuntil(b"\r\n\r\n")
            connection = await self._connect()
            if connection is None:
                client.write(_BAD_GATEWAY)
            else:
                backend_reader, backend = connection
                try:
                    backend.write(_closing(head, self._version))
                    await self._forward(head, client_reader, client, backend_reader, backend)
                finally:
                    backend.transport.abort()
            client.close()
            await client.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # One of the two went away, which the closed connection tells the other; or this proxy goes, and asyncio
            # logs the cancellation of a connection's task as an error.
            pass
        finally:
            # What a client has not read would keep the connection open beyond the end of the event loop.
            client.transport.abort()
            self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        if self._dice is not None:
            self._next = self._dice.randrange(len(self._backends))
        # One that is down is passed over: nothing was sent.
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
        head: bytes,
        client_reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        backend_reader: asyncio.StreamReader,
        backend: asyncio.StreamWriter,
    ) -> None:
        cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def note(data: bytes) -> None:
            if _EVENT_ID in b"\n" + data:
                self._streams.add(cut)

        request = asyncio.create_task(_pump(client_reader, backend))
        response = asyncio.create_task(_pump(backend_reader, client, note))
        try:
            # A client that closes its side has gone: HTTP knows no half-closed connection.
            await asyncio.wait({request, response, cut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams.discard(cut)
            for pump in (request, response):
                pump.cancel()
            await asyncio.gather(request, response, return_exceptions=True)


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, note: Callable[[bytes], None] | None = None
) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
        if note is not None:
            note(data)


def _closing(head: bytes, version: bytes) -> bytes:
    """The head of a request after which the connection ends."""
    first, *lines = head[:-4].split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"keep-alive:"))]
    first = first.rpartition(b"/")[0] + b"/" + version
    return b"\r\n".join([first, *kept, b"Connection: close"]) + b"\r\n\r\n"
