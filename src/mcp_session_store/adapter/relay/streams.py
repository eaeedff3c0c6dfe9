"""The clients' streams of this instance, and what it and other instances tell one another of them."""

from __future__ import annotations

import json
import math
from collections import deque
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio

from mcp_session_store.adapter import clock, sdk
from mcp_session_store.adapter.relay.outgoing import Outgoing
from mcp_session_store.adapter.relay.outlet import HANDED_OVER_WITHIN
from mcp_session_store.adapter.streams.hold import Hold
from mcp_session_store.mailbox import HOLDER, MessageKind
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.activity import StreamHolder
    from mcp_session_store.adapter.question_ids import QuestionIds
    from mcp_session_store.adapter.relay.outbox import Outbox
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.mailbox import Message

__all__ = ["STREAM_KINDS", "ClientStreams", "StreamSource"]

STREAM_KINDS: Final = frozenset(
    {MessageKind.STREAM, MessageKind.STREAM_TAKEN, MessageKind.STREAM_SENT, MessageKind.CLOSE_STREAM}
)
"""What instances tell one another of streams."""


class StreamSource(Protocol):
    """Where the clients' streams have their messages from: the event log, or the mailbox."""

    def hinted(self, session: ResidentSession) -> None:
        """Send what is new for a stream that is open here."""

    def entered(self, session: ResidentSession, *, waiting: bool) -> None:
        """Go on with a stream that is open here, now that the store has entered this instance as its holder.

        Args:
            session: The session.
            waiting: Whether messages wait in the mailbox for the stream.
        """

    def handed_over(self, session: ResidentSession) -> None:
        """Go on with a stream that is open here, now that its former holder has closed its response."""

    async def hand_over(self, key: UUID, session: ResidentSession | None) -> int | None:
        """Close the response of a stream, if it is open, because another instance has it; leave that what is not sent.

        It is closed before this waits for anything. Raises nothing.

        Args:
            key: Key of the session.
            session: The session, where it is in memory.

        Returns:
            The sequence up to which the events of the log were given to the connection, where that is known.
        """


class ClientStreams:
    """The clients' GET streams that are open here.

    Of the streams of a session the one is served that was opened last, on any instance. Who has it, the store knows:
    each opening claims the stream with the next report of activity, which answers from which instance it was taken.
    That one is told, hands its stream over, and says how far it got.

    Args:
        registry: Registry of the sessions in memory.
        activity: Reports the claims.
        outbox: Posts messages to other instances.
        source: Where the streams have their messages from.
        tasks: Task group in which streams are handed over.
        question_ids: Has the number of this instance.
    """

    def __init__(
        self,
        registry: Registry,
        activity: ActivityReporter,
        outbox: Outbox,
        source: StreamSource,
        tasks: ManagerTasks,
        question_ids: QuestionIds,
    ) -> None:
        self._registry = registry
        self._activity = activity
        self._outbox = outbox
        self._source = source
        self._tasks = tasks
        activity.on_holder = self._answered
        activity.number = lambda: question_ids.number

    def attach(self, session: ResidentSession) -> None:
        """Have the stream of a copy be closed, too, where the application closes it and it is open elsewhere."""
        sdk.on_close_standalone(session.transport, partial(self.close_elsewhere, session))
        if session.events is not None:
            # It may be open anywhere, and the log has what is said until then.
            session.loop.standalone_stream_open.set()

    def opened(self, session: ResidentSession) -> Hold:
        """Note that a GET opens the stream of a session here, and claim it."""
        assert session.record is not None
        standalone = session.standalone
        before = standalone.hold
        if before is not None:
            before.is_open = False
            before.claimed.set()
        hold = standalone.hold = Hold(session.record.key, clock.now(), before)
        self._activity.claim_stream(session, hold)
        return hold

    def claim_again(self) -> None:
        """Claim all open streams, because this instance has another number, or may have missed hints."""
        for session in self._registry:
            if (hold := session.hold) is not None and hold.is_open:
                self._activity.claim_stream(session, hold)

    def hint(self, key: UUID) -> None:
        """Have the holder of a session's stream look for what is new, if it is another instance."""
        self._outbox.hint(key)

    def close_elsewhere(self, session: ResidentSession) -> None:
        """Have the holder of a session's stream close it, if it is another instance."""
        if session.hold is not None and session.hold.is_open and not session.hold.is_lost:
            return
        key = session_key(session.session_id)
        self._outbox.put(Outgoing(HOLDER, key, MessageKind.CLOSE_STREAM, ""))

    def arrived(self, message: Message) -> None:
        """Take what another instance says of a stream."""
        session = self._registry.with_key(message.key)
        hold = None if session is None else session.hold
        if message.kind is MessageKind.STREAM_TAKEN:
            self._taken(message, session, hold)
        elif session is None or hold is None:
            return  # it was open here before
        elif message.kind is MessageKind.STREAM_SENT:
            # One that has taken the stream from here meanwhile wants to know, too.
            self._sent(message, session, hold)
        elif not hold.is_open:
            return
        elif message.kind is MessageKind.STREAM:
            self._source.hinted(session)
        else:
            session.transport.close_standalone_sse_stream()

    def _answered(self, hold: Hold, holder: StreamHolder, number: int) -> None:
        """Take the store's answer to a claim that was made under a number of this instance."""
        session = self._registry.with_key(hold.key)
        if session is None or session.hold is not hold:
            hold.claimed.set()
            return
        is_first = not hold.claimed.is_set()
        if is_first:
            hold.claimed_at = clock.now()
        if holder.number != number:
            _lose(hold, session)
            self._tasks.start_soon(self._source.hand_over, hold.key, session)
            if is_first:
                hold.handed_over.set()
            hold.claimed.set()
            return
        hold.term = holder.term
        if is_first and hold.before is not None and hold.before.term == hold.term:
            hold.go_on(hold.before)
        elif is_first and holder.former not in (None, number):
            hold.former = holder.former
            self._tell_former(hold)
        elif is_first:
            hold.handed_over.set()
        hold.claimed.set()
        if hold.is_open:
            self._source.entered(session, waiting=holder.waiting)

    def _tell_former(self, hold: Hold) -> None:
        """Tell the former holder that the stream was opened here later."""

        def posted(arrives: bool) -> None:
            if not arrives:
                hold.handed_over.set()  # that instance has stopped, or died long ago

        body = json.dumps({"term": hold.term})
        if self._outbox.put(Outgoing(hold.former, hold.key, MessageKind.STREAM_TAKEN, body, posted)):
            self._tasks.start_soon(self._tell_all_if_silent, hold)
        else:
            hold.handed_over.set()

    async def _tell_all_if_silent(self, hold: Hold) -> None:
        """Tell all instances that the stream was opened here, if the former holder does not answer.

        It may have died before it told its own former holder, which the store does not know any more.
        """
        with anyio.move_on_after(HANDED_OVER_WITHIN):
            await hold.handed_over.wait()
        if hold.is_open and not hold.is_lost and not hold.handed_over.is_set():
            body = json.dumps({"term": hold.term, "to_all": True})
            self._outbox.put(Outgoing(None, hold.key, MessageKind.STREAM_TAKEN, body))

    def _taken(self, message: Message, session: ResidentSession | None, hold: Hold | None) -> None:
        """Hand a stream over to the instance where it was opened later."""
        if session is not None and hold is not None and hold.is_open and not hold.claimed.is_set():
            # This one may have been opened later still: its own claim says so.
            self._tasks.start_soon(self._taken_when_claimed, message, session, hold)
            return
        body = _read(message.body)
        term, taken = body.get("term", 0), None
        open_hold = None if session is None or hold is None or not hold.is_open or hold.is_lost else hold
        hands_over = open_hold is None or 0 < open_hold.term < term
        if body.get("to_all") and (open_hold is None or not hands_over):
            return  # only an older response that is open is of interest
        if hands_over and session is not None and hold is not None:
            _lose(hold, session)
            taken = [round(clock.now() - moment, 3) for moment in session.standalone.taken]
        self._tasks.start_soon(self._hand_over, message, term, taken, session, hands_over)

    async def _taken_when_claimed(self, message: Message, session: ResidentSession, hold: Hold) -> None:
        await hold.claimed.wait()
        self._taken(message, session, session.hold)

    async def _hand_over(
        self, message: Message, term: int, taken: list[float] | None, session: ResidentSession | None, hands_over: bool
    ) -> None:
        """Hand a stream over, and say how far it got.

        Args:
            message: Message of the new holder.
            term: Its term.
            taken: Seconds since the stream was taken from an open response the last times.
            session: The session, where it is in memory.
            hands_over: Whether the new holder's stream was opened later than the one here.
        """
        sent = await self._source.hand_over(message.key, session) if hands_over else None
        body = json.dumps({"term": term, "sent": sent, "taken": taken})
        self._outbox.put(Outgoing(message.sender, message.key, MessageKind.STREAM_SENT, body))

    def _sent(self, message: Message, session: ResidentSession, hold: Hold) -> None:
        """Learn how far the former holder of a stream got, and how often the stream was taken over."""
        body = _read(message.body)
        if taken := body.get("taken"):
            standalone, now = session.standalone, clock.now()
            # Neither instance may know of all. Of the last takeovers but so many, the later moment is the right one.
            theirs = sorted((now - age for age in taken), reverse=True)
            both = zip_longest(reversed(standalone.taken), theirs, fillvalue=-math.inf)
            standalone.taken = deque(reversed([max(moments) for moments in both]), standalone.taken.maxlen)
        if hold.before is not None and hold.before.term == body.get("term"):
            # It is the answer to the hold before, and this one may go on with it.
            hold = hold if hold.term == hold.before.term else hold.before
        if body.get("term") != hold.term or hold.handed_over.is_set():
            return
        hold.learn(body.get("sent"))
        if hold.is_open:
            self._source.handed_over(session)


def _lose(hold: Hold, session: ResidentSession) -> None:
    """Note that another instance has opened the stream of a session later."""
    if hold.is_open and not hold.is_lost:
        session.standalone.taken.append(clock.now())
    hold.is_lost = True


def _read(body: str) -> dict[str, Any]:
    """Return what another instance has written, perhaps of another version."""
    try:
        read = json.loads(body)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
