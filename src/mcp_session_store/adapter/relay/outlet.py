"""What one copy says outside of calls, on its way to the client's stream, without an event log."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
from mcp.shared.exceptions import NoBackChannelError
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCRequest, jsonrpc_message_adapter

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.relay.delivery import UNREADABLE
from mcp_session_store.adapter.relay.outgoing import Saying
from mcp_session_store.errors import SessionStoreError
from mcp_session_store.records import session_key
from mcp_session_store.stream_mail import StreamMessageKind

if TYPE_CHECKING:
    from mcp_types import JSONRPCMessage

    from mcp_session_store.adapter.relay.stream_messages import StreamMessages
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.stream_mail import StreamPage

__all__ = ["HANDED_OVER_WITHIN", "QueuedOutlet"]

UNPOSTED: Final = 16
"""Number of messages of a session that may wait to be posted before the next one waits for that, as many as the SDK
lets wait for a stream."""
HANDED_OVER_WITHIN: Final = 2.0
"""Seconds that a former holder of the stream has to leave what it has taken and not sent."""
LOOK_INTERVAL: Final = 0.05
"""Seconds between two looks whether a client reads on, where the transport resumes its stream from a user's store."""


class _InFlight:
    """Message that was given to the transport, and which no response has taken yet.

    Args:
        message: The message.
        is_said_here: Whether this copy has said it; it came from the mailbox otherwise.
    """

    __slots__ = ("is_left", "is_said_here", "message")

    def __init__(self, message: JSONRPCMessage, *, is_said_here: bool) -> None:
        self.message = message
        self.is_said_here = is_said_here
        self.is_left = False
        """Whether the response has ended before it took the message."""


class QueuedOutlet:
    """Way of what one copy says outside of calls to the client's stream.

    Where the stream is open here, that is the SDK's transport, as on a server that is alone. Where it is not, the
    message is stored for the stream, and the instance that has the stream takes it. What was said here before and is
    not taken yet goes before.

    Args:
        session: The copy.
        messages: What the copies of this instance say.
        stores: Whether the transport keeps what it sends in an event store of the user's.
    """

    __slots__ = (
        "_again",
        "_direct",
        "_given",
        "_giving",
        "_in_flight",
        "_left",
        "_messages",
        "_moved",
        "_over",
        "_session",
        "_stores",
        "_takes",
    )

    def __init__(self, session: ResidentSession, messages: StreamMessages, *, stores: bool) -> None:
        self._session = session
        self._messages = messages
        self._stores = stores
        self._direct = False
        """Whether messages go to the transport: the stream is open here, and nothing said here before waits."""
        self._in_flight: deque[_InFlight] = deque()
        self._left: deque[_InFlight] = deque()
        """Messages that were in flight when a response ended, and may still come from the transport."""
        self._moved = anyio.Event()
        """A message has left the transport, or the response has ended."""
        self._given: dict[int, int] = {}
        """Highest sequences that were given to the connection, by sender, of which the mailbox does not know yet."""
        self._giving = anyio.CancelScope()
        """In which a message waits until the transport takes it."""
        self._takes = False
        """Whether the mailbox may still count messages as taken here, which are to be left to the next holder."""
        self._again = False
        """Whether something may wait in the mailbox that was not looked for yet."""
        self._over: Latch | None = None
        """Set when the task ends that takes messages; `None` while there is none."""

    # Called by the server loop

    async def takes(self, item: SessionMessage) -> bool:
        """Take what the copy says outside of calls, unless it goes to the transport; return whether it was taken.

        Raises:
            NoBackChannelError: It is a question, and too much waits.
        """
        session = self._session
        if not self._direct:
            if session.record is None and session.loop.replay is None:
                return False  # nothing can be stored of a session that is being opened
            key = session_key(session.session_id)
            if not session.standalone.is_open or self._messages.is_pending(key):
                await self._say(item.message)
                return True
            self._direct = True
        if not self._stores:
            self._in_flight.append(_InFlight(item.message, is_said_here=True))
        return False

    async def _say(self, message: JSONRPCMessage) -> None:
        if (saying := self._stored(message)) is None:
            return
        # As on a server that is alone, where a message waits for the client once some wait for it.
        if self._messages.unposted(saying.key) > UNPOSTED and not self._messages.outbox.is_away:
            await saying.over_or_waiting.wait()

    def _stored(self, message: JSONRPCMessage) -> Saying | None:
        """Have a message be stored for the stream; return it, or `None` if it is dropped."""
        is_question = isinstance(message, JSONRPCRequest)
        kind = StreamMessageKind.QUESTION if is_question else StreamMessageKind.NOTIFICATION
        key = session_key(self._session.session_id)

        def over(is_stored: bool) -> None:
            self._messages.said(key, is_stored=is_stored)
            if is_stored:
                # The mailbox hints at nothing to the instance that has said it.
                self.take()
            elif isinstance(message, JSONRPCRequest):
                self._messages.fail(self._session, message)

        body = message.model_dump_json(by_alias=True, exclude_unset=True)
        saying = Saying(key, kind, body, over, session_is_heard=lambda: self._session.standalone.is_open)
        if not self._messages.say(saying):
            if isinstance(message, JSONRPCRequest):
                self._session.loop.forget(message.id)
                raise NoBackChannelError(message.method)
            return None
        if isinstance(message, JSONRPCRequest):
            self._messages.asked(saying, self._session, message)
        return saying

    # Called by the client's stream

    def opened(self) -> None:
        """Note that a response carries the stream, which no other here did."""
        self._direct = not self._messages.is_pending(session_key(self._session.session_id))

    def received(self, message: JSONRPCMessage) -> bool:
        """Note that a response takes a message from the transport; return whether it is to send it."""
        in_flight = self._in_flight
        if any(one.message is message for one in in_flight):
            # Before it there are such as were cancelled on their way.
            while in_flight.popleft().message is not message:
                pass
            self._left.clear()
            self._moved.set()
            return True
        # It was left to the next stream when a response ended.
        return not any(one.message is message for one in self._left)

    def closed(self) -> None:
        """Note that the response has ended that carried the stream, and leave what it has not taken to the next one."""
        self._direct = False
        left, self._in_flight = self._in_flight, deque()
        self._left += left
        self._moved.set()
        self._giving.cancel()
        for one in left:
            one.is_left = True
            if one.is_said_here:
                # The handler of a question that is dropped so waits until its client is away for good.
                with contextlib.suppress(NoBackChannelError):
                    self._stored(one.message)

    # Taking from the mailbox

    def take(self) -> None:
        """Take what waits in the mailbox, in the background, if the stream is open here; else leave what was taken."""
        hold = self._session.hold
        if hold is None or not (self._takes or (self._is_open and hold.claimed.is_set())):
            return
        self._again = True
        if self._over is None:
            self._over = Latch()
            self._messages.tasks.start_soon(self._run, self._over)

    async def rest(self) -> None:
        """Wait until no task takes messages, and those that were not sent are left to the next holder."""
        if self._over is not None:
            await self._over.wait()

    @property
    def _is_open(self) -> bool:
        hold = self._session.hold
        return hold is not None and hold.is_open and not hold.is_lost

    async def _run(self, over: Latch) -> None:
        try:
            while self._again:
                self._again = False
                await self._take_all()
        except SessionStoreError as error:
            self._messages.failed(self, error)
        finally:
            self._over = None
            over.set()

    async def _take_all(self) -> None:
        session, messages = self._session, self._messages
        key = session_key(session.session_id)
        without_others = False
        while self._is_open:
            version = messages.version(key)
            self._takes = True
            page = await messages.mailbox.take(key, messages.number, given=self._given, without_others=without_others)
            self._given = {}
            messages.count(page)
            if page.lost:
                break
            if not await self._give_all(page):
                break
            if page.messages or page.more:
                continue  # what was given is removed by the next call
            if not page.held_up:
                self._takes = False
                self._direct = messages.settle(key, version) and self._is_open
                return
            without_others = await self._others_had_time()
        await messages.mailbox.release(key, messages.number, given=self._given)
        self._given, self._takes = {}, False

    async def _others_had_time(self) -> bool:
        """Wait for the former holder, which has taken messages; return whether it had time to leave them."""
        hold = self._session.hold
        if hold is None or hold.handed_over.is_set():
            # One that is not told, because others have had the stream since, or its answer is on its way.
            await anyio.sleep(LOOK_INTERVAL)
        else:
            with anyio.move_on_after(HANDED_OVER_WITHIN):
                await hold.handed_over.wait()
        return hold is not None and clock.now() > hold.claimed_at + HANDED_OVER_WITHIN

    async def _give_all(self, page: StreamPage) -> bool:
        """Give messages to the transport, one by one as the client reads; return whether the stream is still open."""
        for taken in page.messages:
            if not self._is_open:
                return False
            try:
                message = jsonrpc_message_adapter.validate_json(taken.body)
            except ValueError:
                self._messages.log.dropped(taken.kind, UNREADABLE)
            else:
                if not await self._give(message):
                    return False
            self._given[taken.sender] = taken.sequence
        return True

    async def _give(self, message: JSONRPCMessage) -> bool:
        """Give a message to the transport; return whether a response has taken it."""
        writer = self._session.loop.writer
        assert writer is not None
        one = _InFlight(message, is_said_here=False)
        if self._stores:
            while self._session.standalone.is_full:
                await anyio.sleep(LOOK_INTERVAL)
                if not self._is_open:
                    return False
        else:
            self._in_flight.append(one)
        try:
            with anyio.CancelScope() as self._giving:
                await writer.send(SessionMessage(message))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return False
        while one in self._in_flight:
            self._moved = anyio.Event()
            await self._moved.wait()
        return not one.is_left and not self._giving.cancelled_caught
