"""A load balancer that knows which connection has had what of a client's GET stream, and breaks them."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store import session_key
from mcp_session_store.adapter.streams.event_ids import EventIds
from tests.support.proxy import RoundRobinProxy
from tests.support.respondents import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SESSION_ID: Final = re.compile(rb"\r\nmcp-session-id: *([^\r]+)", re.IGNORECASE)
_LAST_EVENT_ID: Final = re.compile(rb"\r\nlast-event-id: *([^\r]+)", re.IGNORECASE)
_STATUS: Final = re.compile(rb"HTTP/1\.\d (\d+)")
_PID: Final = re.compile(rb"\r\nx-pid: *(\d+)", re.IGNORECASE)


@dataclass
class Opening:
    """A GET stream: from a client to a process of the server."""

    session_id: str
    opened: float = 0.0
    """Time at which the process had begun its response; 0: it has not."""
    cut: float = 0.0
    """Time at which the client was cut off; 0: it was not."""
    ended: float = 0.0
    """Time at which the process had closed its response, or lost its connection."""
    closed_by_server: bool = False
    wants_cut: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    lingers: float = 0.0
    """Seconds for which the process is read on after the client was cut off, as a proxy does that holds it open."""
    data: bytearray = field(default_factory=bytearray, repr=False)
    """What the process has sent."""
    passed: int = 0
    """Bytes of it that went to the client."""

    def take(self, data: bytes) -> None:
        """Take what the process sends."""
        self.data += data
        if not self.opened and _STATUS.match(self.data) and self.status == 200:
            self.opened = time.time()

    @property
    def status(self) -> int:
        found = _STATUS.match(self.data)
        return 0 if found is None else int(found[1])

    @property
    def pid(self) -> int:
        """The process; 0: it has not answered."""
        found = _PID.search(self.data)
        return 0 if found is None else int(found[1])

    @property
    def is_open(self) -> bool:
        """Whether a client has it."""
        return bool(self.opened) and not self.cut and not self.ended

    @property
    def broke_at(self) -> float:
        """Time from which on the client got nothing; infinite: it is open."""
        return self.cut or self.ended or float("inf")

    def tokens(self) -> list[str]:
        """Return the tokens that the process has sent, in order."""
        return [found.decode() for found in TOKEN.findall(bytes(self.data))]

    def passed_tokens(self) -> list[str]:
        """Return those that went to the client."""
        return [found.decode() for found in TOKEN.findall(bytes(self.data[: self.passed]))]


class StreamProxy(RoundRobinProxy):
    """A load balancer that notes all GET streams, and can cut clients off from theirs.

    A response that is cut ends for the client like one that is whole, because the official Python client opens no
    stream after the second that did not.
    """

    def __init__(self, backends: Sequence[int], **options: Any) -> None:
        super().__init__(backends, version="1.0", **options)
        self.openings: list[Opening] = []
        """All GET streams, in the order of their requests."""

    def of(self, session_id: str) -> Iterator[Opening]:
        """Yield the GET streams of a session."""
        return (opening for opening in self.openings if opening.session_id == session_id)

    def cut(self, session_id: str, *, lingers: float) -> None:
        """Cut a client off from its stream, if it is open.

        Args:
            session_id: The client's session.
            lingers: Seconds for which the process does not learn of it.
        """
        for opening in self.of(session_id):
            if opening.is_open:
                opening.lingers = lingers
                opening.wants_cut.set()

    async def _forward(
        self,
        head: bytes,
        client_reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        backend_reader: asyncio.StreamReader,
        backend: asyncio.StreamWriter,
    ) -> None:
        session = _SESSION_ID.search(head)
        if session is None or not head.startswith(b"GET ") or _is_of_call(session[1].decode(), head):
            await super()._forward(head, client_reader, client, backend_reader, backend)
            return
        opening = Opening(session[1].decode())
        self.openings.append(opening)

        async def respond() -> None:
            while data := await backend_reader.read(65536):
                opening.take(data)
                client.write(data)
                opening.passed = len(opening.data)
                await client.drain()
            opening.closed_by_server = True

        tasks = [asyncio.create_task(work) for work in (respond(), client_reader.read(), opening.wants_cut.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if opening.wants_cut.is_set() and not opening.closed_by_server:
                opening.cut = time.time()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                client.close()
                async with asyncio.timeout(opening.lingers):
                    while data := await backend_reader.read(65536):
                        opening.take(data)
                    opening.closed_by_server = True
        except TimeoutError:
            pass
        finally:
            opening.ended = time.time()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _is_of_call(session_id: str, head: bytes) -> bool:
    """Return whether a GET resumes the stream of a call."""
    found = _LAST_EVENT_ID.search(head)
    cursor = None if found is None else EventIds(session_key(session_id)).read(found[1].decode())
    return cursor is not None and not cursor.standalone
