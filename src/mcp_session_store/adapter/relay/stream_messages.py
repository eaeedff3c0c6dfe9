"""What is said outside of calls and waits in the mailbox for the client's stream."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
from mcp.shared.exceptions import NoBackChannelError
from mcp_types import JSONRPCError

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock, sdk
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.stream_mail import STREAM_WAIT, Withdrawal

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_types import JSONRPCRequest

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.relay.outbox import Outbox
    from mcp_session_store.adapter.relay.outgoing import Saying
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.session_log import SessionLog
    from mcp_session_store.adapter.sessions.outlets import Outlet
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.errors import SessionStoreError
    from mcp_session_store.stream_mail import StreamPage

__all__ = ["LOOK_INTERVAL", "StreamMessages"]

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at what waits."""
HINT_AGAIN: Final = 1.0
"""Seconds after which an instance is told of a message that opened the stream at the moment at which that was said."""
READ_TIMEOUT: Final = 5.0
"""Seconds that a server loop has to read the error that ends a question."""
GIVEN_UP: Final = "the stream ended"
"""Reason to drop a message: the instance that had taken it for the stream did not leave it to the next one in time."""


class _Pending:
    """What is said of a session here, and may wait for a stream."""

    __slots__ = ("unposted", "until", "version")

    def __init__(self) -> None:
        self.unposted = 0
        """Number of messages that the mailbox does not have yet."""
        self.until = 0.0
        """Moment of `clock` from which on nothing of it waits in the mailbox."""
        self.version = 0
        """Counter of the messages."""


class _Asked(NamedTuple):
    """Question that waits for a stream."""

    until: float
    saying: Saying
    session: ResidentSession
    question: JSONRPCRequest


class StreamMessages:
    """What copies of this instance say outside of calls while the client's stream is not open here.

    Args:
        instances: This instance, with its mailbox and its number.
        outbox: Posts what is said.
        tasks: Task group in which messages are taken from the mailbox.
        log: Counts and logs what becomes of messages.
    """

    def __init__(self, instances: Instances, outbox: Outbox, tasks: ManagerTasks, log: SessionLog) -> None:
        self.mailbox: Final = instances.mailbox
        self.outbox: Final = outbox
        self.tasks: Final = tasks
        self.log: Final = log
        self._question_ids = instances.question_ids
        self._pending: dict[UUID, _Pending] = {}
        self._asked: deque[_Asked] = deque()
        """Questions by the moments at which they have waited for too long."""
        self._unheard: dict[UUID, float] = {}
        """Moments at which hints are posted for sessions whose stream was open nowhere when something was said."""
        self._failed: dict[Outlet, None] = {}
        """Outlets that could not take what waits, or not leave it to the next holder."""
        self._is_failing = False
        """Whether the log says that the mailbox does not answer."""
        outbox.on_unheard = self._note_unheard

    @property
    def number(self) -> int:
        """Number of this instance."""
        return self._question_ids.number

    def say(self, saying: Saying) -> bool:
        """Post what a copy says for the stream; return whether it is accepted."""
        pending = self._pending.setdefault(saying.key, _Pending())
        pending.unposted += 1
        pending.version += 1
        if not self.outbox.put(saying):
            pending.unposted -= 1
            return False
        return True

    def said(self, key: UUID, *, is_stored: bool) -> None:
        """Note that the mailbox has a message, or that it is dropped."""
        pending = self._pending[key]
        pending.unposted -= 1
        pending.version += 1
        if is_stored:
            pending.until = clock.now() + STREAM_WAIT.total_seconds()

    def unposted(self, key: UUID) -> int:
        """Return the number of messages of a session that the mailbox does not have yet."""
        pending = self._pending.get(key)
        return 0 if pending is None else pending.unposted

    def is_pending(self, key: UUID) -> bool:
        """Return whether something that was said of a session here may wait for its stream."""
        pending = self._pending.get(key)
        return pending is not None and (pending.unposted > 0 or clock.now() < pending.until)

    def version(self, key: UUID) -> int:
        """Return what is given to `settle` when all was taken that waits."""
        pending = self._pending.get(key)
        return 0 if pending is None else pending.version

    def settle(self, key: UUID, version: int) -> bool:
        """Note that nothing waits for a session's stream; return whether that is so, or more was said meanwhile."""
        pending = self._pending.get(key)
        if pending is None:
            return True
        if pending.unposted or pending.version != version:
            return False
        del self._pending[key]
        return True

    def asked(self, saying: Saying, session: ResidentSession, question: JSONRPCRequest) -> None:
        """Have a question fail that waits for a stream for too long."""
        self._asked.append(_Asked(clock.now() + STREAM_WAIT.total_seconds(), saying, session, question))

    def fail(self, session: ResidentSession, question: JSONRPCRequest) -> None:
        """Answer a question by an error, because it reaches no client."""
        if question.id in session.loop.asked and not session.stopping:
            self.tasks.start_soon(self._fail, session, question)

    async def _fail(self, session: ResidentSession, question: JSONRPCRequest) -> None:
        error = NoBackChannelError(question.method).error
        with anyio.move_on_after(READ_TIMEOUT):
            try:
                answer = JSONRPCError(jsonrpc="2.0", id=question.id, error=error)
                await sdk.deliver(session.transport, answer, None)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # the loop has ended, and its questions with it

    def count(self, page: StreamPage) -> None:
        """Count the messages of a page."""
        namespace = self.log.namespace
        for kind, number in page.dropped.items():
            telemetry.dropped_messages.add(number, telemetry.of(namespace, kind=kind, reason=GIVEN_UP))
        for message in page.messages:
            attributes = telemetry.of(namespace, kind=message.kind.value)
            telemetry.delivered_messages.add(1, attributes)
            telemetry.deliveries.record(message.age.total_seconds(), attributes)

    # What waits

    def _note_unheard(self, key: UUID) -> None:
        self._unheard.setdefault(key, clock.now() + HINT_AGAIN)

    def failed(self, outlet: Outlet, error: SessionStoreError) -> None:
        """Have an outlet try again that could not take what waits, because the mailbox did not answer."""
        if outlet not in self._failed:
            self._failed[outlet] = None
            report_failure("stream messages", error, namespace=self.log.namespace, log=not self._is_failing)
            self._is_failing = True

    async def look(self) -> None:
        """Look once at what waits.

        Raises:
            SessionStoreError: The mailbox did not answer.
        """
        now = clock.now()
        for key in [key for key, due in self._unheard.items() if due <= now]:
            del self._unheard[key]
            self.outbox.hint(key)
        for key in [key for key, pending in self._pending.items() if not pending.unposted and pending.until < now]:
            del self._pending[key]
        while self._asked and self._asked[0].until <= now:
            await self._withdraw(self._asked[0])
            self._asked.popleft()
        if self._failed:
            # One first, so that not all meet a mailbox that is away.
            first_outlet = next(iter(self._failed))
            del self._failed[first_outlet]
            first_outlet.take()
            await first_outlet.rest()
            if first_outlet in self._failed:
                return
            self._is_failing = False
            failed, self._failed = self._failed, {}
            for outlet in failed:
                outlet.take()

    async def _withdraw(self, asked: _Asked) -> None:
        """Have a question fail that has waited for too long, unless a stream has it."""
        question, session = asked.question, asked.session
        if question.id not in session.loop.asked or session.stopping or self.outbox.withdraw(asked.saying):
            return
        message = asked.saying.message
        assert message is not None  # one that is neither given to the mailbox nor waits here was answered by an error
        withdrawal = await self.mailbox.withdraw(message.key, message.sender, message.sequence)
        if withdrawal is Withdrawal.WITHDRAWN:
            self.fail(session, question)
        elif withdrawal is Withdrawal.TAKEN:
            # An instance may leave it that has taken it.
            self.asked(asked.saying, session, question)
