"""Refused requests: each is answered by what its error means, counted with the true reason, and logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio
from starlette.background import BackgroundTask

from mcp_session_store import telemetry
from mcp_session_store.adapter.responses import (
    SESSION_NOT_FOUND,
    MemoryFull,
    SessionNotFound,
    TooManyWait,
    answer_to,
    response_to,
)
from mcp_session_store.errors import RecordUnreadable, SessionLimitReached, SessionStoreError

if TYPE_CHECKING:
    from uuid import UUID

    from starlette.responses import Response
    from starlette.types import Scope

    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.responses import Answer
    from mcp_session_store.adapter.session_log import SessionLog

__all__ = ["Refusals", "log_refusal", "reason_of", "refuse"]

logger = logging.getLogger(__name__)

MAX_REPORTED: Final = 1000
"""Number of sessions that cannot be read after which they are logged again."""

UNREADABLE: Final = "unreadable"
"""Reason for which a request is refused whose session cannot be read."""
TOO_MANY_WAIT: Final = "too many waiting"
"""Reason for which a request is refused that would be one too many of those that wait for the store."""

READERS: Final = 4
"""Number of long bodies that are read at a time."""
LONGEST_READ: Final = 4 * 1024 * 1024
"""Bytes of a body that is read, the SDK's own limit of bodies: so those that are read hold 16 MiB together."""
MAX_WAITING: Final = 64
"""Number of requests that wait for their body to be read; each holds what was read at once."""
READ_TIMEOUT: Final = 3.0
"""Seconds for a long body to be read, its turn included."""


def reason_of(error: Exception) -> str:
    """Return the true reason for which a request is refused, which metrics and logs have and the client has not."""
    if isinstance(error, SessionNotFound):
        return error.reason
    if isinstance(error, TooManyWait):
        return TOO_MANY_WAIT
    return UNREADABLE if isinstance(error, RecordUnreadable) else answer_to(error).reason


def refuse(error: Exception, session: UUID, log: SessionLog) -> Answer:
    """Return the answer to a request that failed with an error; log the error and count the request as refused.

    Args:
        error: The error.
        session: Key of the session that the request is for.
        log: Log of the manager.
    """
    answer = answer_to(error)
    telemetry.refused.add(1, telemetry.of(log.namespace, reason=reason_of(error)))
    if answer is not SESSION_NOT_FOUND:
        log_refusal(error, session, log)
    elif isinstance(error, RecordUnreadable):
        _report_unreadable(error, session, log)
    return answer


_reported: Final[set[UUID]] = set()
"""Keys of the sessions that cannot be read, and were logged by this process."""


def _report_unreadable(error: RecordUnreadable, session: UUID, log: SessionLog) -> None:
    """Count a request for a session that cannot be read, and log the first one."""
    telemetry.unreadable.add(1, telemetry.of(log.namespace))
    if session in _reported:
        return
    if len(_reported) >= MAX_REPORTED:
        _reported.clear()
    _reported.add(session)
    logger.error(
        "the session %s is answered as unknown, because its record cannot be read (%s); the command check --rows "
        "lists all such rows",
        session,
        error,
    )


class Refusals:
    """Refuses requests, each with the answer that fails no more than it must.

    The id of a JSON-RPC request may be the last key of a long body. So the body of a refused request is read to its
    end, a few bodies at a time; one that is too long or too slow is answered without its id.

    Args:
        max_body: Highest number of bytes of a body.
        log: Log of the manager.
    """

    def __init__(self, max_body: int, log: SessionLog) -> None:
        self._max_read = min(max_body, LONGEST_READ)
        self._log = log
        self._readers = anyio.Semaphore(READERS)

    async def response(self, error: Exception, session: UUID, scope: Scope, incoming: Incoming) -> Response:
        """Return the response to a request that failed with an error; log and count it.

        Args:
            error: The error.
            session: Key of the session that the request is for.
            scope: ASGI scope of the request.
            incoming: Body of the request, as far as it was read.
        """
        answer = refuse(error, session, self._log)
        if answer.for_now and scope["method"] == "POST" and not incoming.whole:
            await self._read(incoming)
        response = response_to(answer, scope, incoming.body if incoming.whole else None)
        if isinstance(error, SessionNotFound):
            # After the answer, whose time must not tell an unknown session from one of another principal.
            response.background = BackgroundTask(_log_not_found, self._log, session, error.reason)
        return response

    async def _read(self, incoming: Incoming) -> None:
        if self._readers.statistics().tasks_waiting < MAX_WAITING:
            with anyio.move_on_after(READ_TIMEOUT):
                async with self._readers:
                    await incoming.read(self._max_read)


async def _log_not_found(log: SessionLog, session: UUID, reason: str) -> None:
    log.refused(session, reason)


def log_refusal(error: Exception, session: UUID, log: SessionLog) -> None:
    """Log why a request is refused, or a call that needs the store.

    Args:
        error: The error of the store, or of a bug of ours.
        session: Key of the session that the request is for.
        log: Log of the manager.
    """
    reason = reason_of(error)
    if isinstance(error, SessionLimitReached):
        log.refused(session, reason, text="the new session %s is refused: %s", cause=error, level=logging.WARNING)
    elif isinstance(error, SessionStoreError | MemoryFull):
        cause = error if isinstance(error, SessionStoreError) else "all sessions in memory are in use"
        text = "a request for the session %s is refused for now: %s"
        log.refused(session, reason, text=text, cause=cause, level=logging.WARNING)
    else:
        text, cause = "a request for the session %s is refused because of an %s", "unexpected error"
        log.refused(session, reason, text=text, cause=cause, level=logging.ERROR, error=error)
