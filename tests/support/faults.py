"""A network that fails on command: a TCP proxy between a client and its database."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from tests.support.ports import free_port

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable
    from typing import Self

# Linger for zero seconds: close() then sends RST, as a crashed peer's kernel does, and no orderly FIN.
_RESET = struct.pack("ii", 1, 0)


def close_listener(listener: asyncio.Server) -> None:
    """Refuse connections from now on, and close the listening socket in the next turn of the event loop.

    asyncio never closes a connection that it accepts in the turn in which its listener is closed.
    """
    loop = asyncio.get_running_loop()
    for listening in listener.sockets:
        loop.remove_reader(listening.fileno())
        # The kernel would take connections until the socket is closed, and reset them then.
        listening.shutdown(socket.SHUT_RDWR)
    loop.call_soon(listener.close)


class _Connection:
    """A client's connection, and the connection to the server for it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None

    def abort(self) -> None:
        for writer in (self.client, self.server):
            if writer is None:
                continue
            if not writer.transport.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class _Trap:
    """Waits for a text in a stream that comes in pieces."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._tail: dict[_Connection, bytes] = {}

    def sprung_by(self, data: bytes, connection: _Connection) -> bool:
        seen = self._tail.get(connection, b"") + data
        self._tail[connection] = seen[len(seen) - len(self._text) + 1 :] if len(self._text) > 1 else b""
        return self._text in seen


class FaultProxy:
    """Forwards TCP connections to a server, and fails on command.

    An async context manager; all methods are called in the event loop that entered it.

    Args:
        host: Where the server is.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = free_port()
        """The port on 127.0.0.1 to connect to. The same for the proxy's whole life."""
        self.accepted = 0
        """Connections taken so far."""
        self.sprung = 0
        """How many times `kill_on_next_reply` or `kill_on_next_request` has killed."""
        self._target = (host, port)
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._request_trap: _Trap | None = None
        self._reply_trap: _Trap | None = None

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        self._flowing.set()
        # A connection that was accepted a moment ago gets its task in the next turn of the event loop.
        for _turn in range(10):
            await asyncio.sleep(0)
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # An aborted connection is closed in the next turn.
        for _turn in range(3):
            await asyncio.sleep(0)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def kill_connections(self) -> None:
        """Abort all open connections with RST, on both sides. New ones are taken as before."""
        for connection in self._connections.values():
            connection.abort()

    def hang(self) -> None:
        """Forward nothing any more, in neither direction; connections are taken, and stay silent."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, beginning with the bytes that were held back."""
        self._flowing.set()

    def refuse(self) -> None:
        """Stop listening: new connections are refused. Open ones go on, see `kill_connections`.

        One that was accepted a moment ago, and is not served yet, is reset.
        """
        if self._listener is not None:
            close_listener(self._listener)
            self._listener = None

    async def accept(self) -> None:
        """Listen again, on the same port."""
        if self._listener is None:
            await asyncio.sleep(0)  # in which the former one closes
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def kill_on_next_reply(self, containing: bytes = b"") -> None:
        """Abort, once, the connection on which the server answers next, and swallow that answer.

        The statement has run, and the client never learns of it.

        Args:
            containing: Only an answer with these bytes counts, for example `INSERT 0` or `COMMIT`, the tags
                with which Postgres answers when the statement is done. Without it every byte counts, those
                that answer the preparation of a statement included.
        """
        self._reply_trap = _Trap(containing)

    def kill_on_next_request(self, containing: bytes = b"") -> None:
        """Abort, once, the connection on which the client sends next, and swallow what it sent.

        The statement has not run, and the client does not know that.

        Args:
            containing: Only a request with these bytes counts.
        """
        self._request_trap = _Trap(containing)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        # When this proxy goes; asyncio logs the cancellation of a connection's task as an error.
        with contextlib.suppress(asyncio.CancelledError):
            await self._connect(client_reader, client)

    async def _connect(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(client)
        if self._listener is None:
            connection.abort()
            return
        self._connections[task] = connection
        self.accepted += 1
        try:
            server_reader, connection.server = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(client_reader, connection.server, connection, replies=False))
                group.create_task(self._pump(server_reader, client, connection, replies=True))
        except* OSError:
            # The server is not there, or one of the two went away: the other learns it below.
            pass
        finally:
            connection.abort()
            del self._connections[task]

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        connection: _Connection,
        *,
        replies: bool,
    ) -> None:
        while data := await source.read(65536):
            await self._flowing.wait()
            if sink.transport.is_closing():
                return
            if self._springs(data, connection, replies=replies):
                connection.abort()
                return
            sink.write(data)
            await sink.drain()
        await self._flowing.wait()
        if sink.can_write_eof() and not sink.transport.is_closing():
            sink.write_eof()

    def _springs(self, data: bytes, connection: _Connection, *, replies: bool) -> bool:
        trap = self._reply_trap if replies else self._request_trap
        if trap is None or not trap.sprung_by(data, connection):
            return False
        if replies:
            self._reply_trap = None
        else:
            self._request_trap = None
        self.sprung += 1
        return True


@asynccontextmanager
async def breaking(proxy: FaultProxy, dice: random.Random, longest_pause: float = 0.05) -> AsyncIterator[None]:
    """Meanwhile connections to a Postgres server break all the time: on the way there, on the way back, or idle.

    Args:
        proxy: In front of the server.
        dice: Says when and how.
        longest_pause: Seconds between the first two of them, at most. It grows, so that at last all succeeds on a
            machine, too, that is so slow that nothing fits into a pause.
    """
    ways: list[Callable[[], None]] = [
        proxy.kill_connections,
        proxy.kill_on_next_request,
        partial(proxy.kill_on_next_reply, b"INSERT 0"),
        partial(proxy.kill_on_next_reply, b"UPDATE"),
        partial(proxy.kill_on_next_reply, b"SELECT"),
    ]

    async def break_connections() -> None:
        longest = longest_pause
        while True:
            # Only the moment is random; no test waits for it.
            await asyncio.sleep(dice.uniform(0, longest))
            longest *= 1.01
            dice.choice(ways)()

    task = asyncio.create_task(break_connections())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
