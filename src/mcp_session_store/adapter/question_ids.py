"""Ids of questions, the requests that servers send to clients: each names the instance that asks."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.jsonrpc_dispatcher import progress_token_from_params

from mcp_session_store.mailbox import MAX_NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp.shared.message import SessionMessage
    from mcp_types import JSONRPCRequest, ProgressToken, RequestId

__all__ = ["MAX_QUESTIONS", "Question", "QuestionIds", "as_asked", "number_of", "renamed"]

COUNTER_BITS: Final = 29
"""With the 24 bits of a number, ids stay below 2 ** 53, up to which JSON's numbers are exact for every client
(RFC 8259, section 6)."""

MAX_COUNTER: Final = (1 << COUNTER_BITS) - 1

MAX_QUESTIONS: Final = 1000
"""Most questions that one copy of a session remembers; beyond it, it forgets the oldest. The SDK does not withdraw all
that it has given up."""


def number_of(request_id: object) -> int | None:
    """Return the number of the instance that an id of a question names; `None`: no instance of ours has made the id.

    Args:
        request_id: Id of a request or a progress token, as a client sent it: a number, or the text of one.
    """
    if isinstance(request_id, str):
        request_id = coerce_request_id(request_id)
    if not isinstance(request_id, int):
        return None
    number = request_id >> COUNTER_BITS
    return number if 1 <= number <= MAX_NUMBER else None


class QuestionIds:
    """Makes the ids of all questions of this process, whichever copy of whichever session asks.

    A requestor must not use an id twice within a session (MCP 2025-11-25, basic, requests), on whatever instance the
    session is. And the answer may be posted to an instance that has never seen the session: the id names the one that
    asked. Made when a manager begins to run, because processes fork before.
    """

    __slots__ = ("_before", "_counter", "number", "on_asked", "on_drawn")

    def __init__(self) -> None:
        self.on_drawn: Callable[[], None] | None = None
        """Called when the number has become another one, which other instances have to learn."""
        self.on_asked: Callable[[], None] | None = None
        """Called with each question."""
        self._before: set[int] = set()
        """Former numbers, under which this process has asked."""
        self._counter = 0
        self.number = secrets.randbelow(MAX_NUMBER) + 1
        """Number of this instance. Not from `random`, which applications seed alike in all processes."""

    def draw(self) -> None:
        """Take another number, because this one is used up, or another instance has it."""
        if self._counter > 0:
            self._before.add(self.number)
        self._counter = 0
        before = self.number
        while self.number == before or self.number in self._before:
            self.number = secrets.randbelow(MAX_NUMBER) + 1
        if self.on_drawn is not None:
            self.on_drawn()

    def new(self) -> int:
        """Return an id for a question."""
        if self._counter == MAX_COUNTER:
            self.draw()
        self._counter += 1
        if self.on_asked is not None:
            self.on_asked()
        return self.number << COUNTER_BITS | self._counter


class Question(NamedTuple):
    """A question that the client has not answered, by the names that the copy has for it."""

    request_id: RequestId
    """Id that the SDK, or the application, has given it."""
    token: ProgressToken | None
    """Its progress token."""
    call: RequestId | None
    """Call for which it is asked, where that is known."""
    lull: int
    """Number of times that, before it was asked, the last handler of the copy had returned."""
    method: str

    @property
    def outside(self) -> bool:
        """Whether it is asked outside of calls, as far as is known, and its answer is work for the copy.

        A ping is not: it asks for nothing but a sign of life, and a server may send one from every copy.
        """
        return self.call is None and self.method != "ping"


def as_asked(
    item: SessionMessage, message: JSONRPCRequest, question_id: int, call: RequestId | None, lull: int
) -> tuple[Question, SessionMessage]:
    """Return a question by the names that the copy has for it, and the message under the id that the client gets.

    Args:
        item: The message, as the server writes it.
        message: The same, without what is around it.
        question_id: Id that the client gets; its progress token, if it has any, is the same.
        call: Call for which it is asked, where that is known.
        lull: See `Question`.
    """
    token = progress_token_from_params(message.params)
    params = message.params
    if token is not None and params is not None:
        params = {**params, "_meta": {**params["_meta"], "progressToken": question_id}}
    question = Question(coerce_request_id(message.id), token, call, lull, message.method)
    return question, renamed(item, id=question_id, params=params)


def renamed(item: SessionMessage, **changes: Any) -> SessionMessage:
    """Return a message with other fields; the original is the transport's or the server's."""
    message = item.message
    # Change only fields that were set: the transport leaves out the others.
    changed = {name: value for name, value in changes.items() if name in message.model_fields_set}
    return replace(item, message=message.model_copy(update=changed))
